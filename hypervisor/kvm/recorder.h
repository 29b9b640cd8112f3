/* What every exit is recorded as: a row for each reason, direction, size and address, with histograms of its times, always;
 * and, on request, a record of each exit in a ring that a thread writes to a file. */
#ifndef HV_RECORDER_H
#define HV_RECORDER_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

#define HV_ROWS 1024      /* rows of a vCPU; a guest decides how many addresses it touches, not how much memory that takes */
#define HV_SPARE_ROWS 64  /* the last of them: for addresses that found no row of their own, one a reason and direction */
#define HV_BUCKETS 640    /* of a histogram: see hv_bucket */
#define HV_SUB_BUCKETS 16 /* to a power of two: a bucket is at most 1/16 of its value wide */
#define HV_ELSEWHERE UINT64_MAX /* the address of a spare row */
#define HV_RECENT 64      /* the last exits, for the story of a death; a power of two */
#define HV_TRACE_RECORDS (1 << 16)
#define HV_SPACES 4096    /* address spaces (CR3) that are told apart */

/* Times in TSC ticks. */
struct hv_histogram {
    uint64_t total, max;
    uint64_t bucket[HV_BUCKETS];
};

struct hv_row {
    uint64_t address; /* port, guest-physical address; of an exit that has none 0 */
    uint8_t reason, kind, size;
    uint64_t count, operations; /* exits; accesses: a string instruction's elements */
    struct hv_histogram guest, handler; /* in KVM_RUN before the exit; from the exit to the next KVM_RUN */
};

struct hv_record {
    uint64_t tick, address, operations;
    uint8_t reason, kind, size;
};

/* One exit in a trace: 24 bytes. */
struct hv_trace_record {
    uint64_t tick;    /* when it left the guest */
    uint64_t rip;     /* 0 where it was not sampled */
    uint32_t handler; /* ticks until it entered again; with HV_COARSE in units of 1024 */
    uint16_t row;     /* of its vCPU; with HV_COARSE its highest bit is set */
    uint16_t space;   /* number of its CR3, from 1; 0 where it was not sampled, or is one too many */
};
#define HV_COARSE 0x8000

struct hv_trace {
    _Atomic uint64_t head, tail;
    uint64_t dropped, lost; /* by the vCPU, because the ring was full; by the writer, because the file had ended */
    int32_t event_fd;       /* tells the writer that half of the ring is full */
    struct hv_trace_record record[HV_TRACE_RECORDS];
};

struct hv_recorder {
    uint64_t row_count;   /* grows only; a row is complete before it is counted */
    struct hv_row *row;   /* mapped, and taken from the host as they are used */
    uint64_t guest_ticks, handler_ticks, answered_in_c;
    uint64_t recent_count;
    struct hv_record recent[HV_RECENT];
    uint32_t every;       /* sample RIP and CR3 at one exit in `every`; 0: never */
    uint32_t enabled;     /* 0 measures what recording costs */
    uint64_t space_count;
    uint64_t space[HV_SPACES]; /* CR3 without its flags */
    /* private */
    struct hv_trace *_Atomic trace;
    uint32_t until_sample, sampled;
    uint64_t rip, left_at; /* of the exit that is being handled; left_at 0: none is */
    uint16_t place, last_space;
    struct hv_row *last;
    uint16_t index[4 * HV_ROWS]; /* hash table: row number + 1 */
    uint16_t space_index[4 * HV_SPACES];
};

int hv_recorder_init(struct hv_recorder *recorder);
void hv_recorder_free(struct hv_recorder *recorder);
uint32_t hv_bucket(uint64_t ticks);
uint64_t hv_tick(void); /* the TSC */

/* An exit, after `ran` ticks in the guest. One that a kick caused is counted, and is no part of a story. */
void hv_record_exit(struct hv_recorder *recorder, const struct hv_record *exit, uint64_t ran, int kicked);
/* RIP and CR3 of the exit that was just recorded. */
void hv_record_place(struct hv_recorder *recorder, uint64_t rip, uint64_t cr3);
/* The exit is handled: the guest is entered again at `now`. */
void hv_record_entry(struct hv_recorder *recorder, uint64_t now);

#endif
