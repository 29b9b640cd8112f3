/* Profile files: chunks behind one another, each written whole or not at all, and the thread that writes traces into them. */
#ifndef HV_TRACEFILE_H
#define HV_TRACEFILE_H

#include "recorder.h"

#include <pthread.h>
#include <stdint.h>

#define HV_MOST_RECORDERS 256

struct hv_chunk {
    char kind[4];
    uint32_t vcpu;
    uint64_t size; /* of what follows, in bytes */
};

struct hv_row_key {
    uint64_t address;
    uint32_t number;
    uint8_t reason, kind, size, unused;
};

struct hv_trace_file {
    int32_t fd, stop_fd, event_fd;
    int32_t error; /* errno of the write that ended it; 0 while all is well */
    uint64_t size; /* bytes so far: where the next chunk begins */
    uint32_t recorders;
    struct hv_recorder *recorder[HV_MOST_RECORDERS]; /* by vCPU */
    /* private */
    pthread_mutex_t lock;
    uint64_t rows[HV_MOST_RECORDERS], spaces[HV_MOST_RECORDERS]; /* written already */
};

struct hv_trace_file *hv_trace_file_new(int fd, int stop_fd, int event_fd);
void hv_trace_file_free(struct hv_trace_file *file);
int hv_trace_file_add(struct hv_trace_file *file, struct hv_recorder *recorder);
int hv_trace_file_write(struct hv_trace_file *file, const char *kind, uint32_t vcpu, const void *data, uint64_t size);
void hv_trace_file_run(struct hv_trace_file *file);
uint64_t hv_trace_dropped(const struct hv_recorder *recorder); /* exits that its trace lacks */

#endif
