/* See tracefile.h. A trace goes from each vCPU's ring to the file without the GIL and without making the vCPU wait: what the
 * disk does not take in time is dropped from the trace, and counted. */
#define _GNU_SOURCE
#include "tracefile.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

enum { LOOK_MS = 50 }; /* how long records of a slow guest may wait */

/* Go on with a file from where `fd` stands; nobody else writes to it. NULL without memory. */
struct hv_trace_file *hv_trace_file_new(int fd, int stop_fd, int event_fd)
{
    struct hv_trace_file *file = calloc(1, sizeof *file);
    if (file) {
        file->fd = fd;
        off_t at = lseek(fd, 0, SEEK_CUR);
        file->size = at > 0 ? (uint64_t)at : 0;
        file->stop_fd = stop_fd;
        file->event_fd = event_fd;
        pthread_mutex_init(&file->lock, NULL);
    }
    return file;
}

/* The vCPUs and hv_trace_file_run have ended. */
void hv_trace_file_free(struct hv_trace_file *file)
{
    for (uint32_t i = 0; i < file->recorders; i++) {
        struct hv_recorder *recorder = file->recorder[i];
        free(atomic_exchange(&recorder->trace, NULL));
    }
    pthread_mutex_destroy(&file->lock);
    free(file);
}

/* Trace one more vCPU, before it runs. Returns 0, or -1 without memory. */
int hv_trace_file_add(struct hv_trace_file *file, struct hv_recorder *recorder)
{
    struct hv_trace *trace = calloc(1, sizeof *trace);
    if (!trace || file->recorders == HV_MOST_RECORDERS) {
        free(trace);
        return -1;
    }
    trace->event_fd = file->event_fd;
    file->recorder[file->recorders++] = recorder;
    atomic_store(&recorder->trace, trace);
    return 0;
}

/* Write a chunk of up to two pieces whole; where that fails take it back, and write nothing any more. */
static int put(struct hv_trace_file *file, const char *kind, uint32_t vcpu, const void *one, uint64_t one_size, const void *two,
               uint64_t two_size)
{
    struct hv_chunk chunk = { .vcpu = vcpu, .size = one_size + two_size };
    memcpy(chunk.kind, kind, sizeof chunk.kind);
    struct iovec piece[3] = { { &chunk, sizeof chunk }, { (void *)one, one_size }, { (void *)two, two_size } };
    struct iovec *at = piece;
    int count = 3;
    uint64_t left = sizeof chunk + chunk.size;
    pthread_mutex_lock(&file->lock);
    while (left && !file->error) {
        ssize_t done = writev(file->fd, at, count);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0) {
            file->error = done ? errno : ENOSPC;
            if (ftruncate(file->fd, (off_t)file->size) || lseek(file->fd, (off_t)file->size, SEEK_SET) < 0)
                break; /* no file that can be cut: its reader finds the end by itself */
            break;
        }
        left -= (uint64_t)done;
        while (count && (size_t)done >= at->iov_len) {
            done -= (ssize_t)at->iov_len;
            at++;
            count--;
        }
        if (count) {
            at->iov_base = (char *)at->iov_base + done;
            at->iov_len -= (size_t)done;
        }
    }
    int error = file->error;
    if (!error)
        file->size += sizeof chunk + chunk.size;
    pthread_mutex_unlock(&file->lock);
    return error;
}

/* Write a chunk. Returns 0, or the errno by which the file ended. From any thread. */
int hv_trace_file_write(struct hv_trace_file *file, const char *kind, uint32_t vcpu, const void *data, uint64_t size)
{
    return put(file, kind, vcpu, data, size, NULL, 0);
}

/* What the records to come refer to: rows and address spaces that are new. */
static void put_keys(struct hv_trace_file *file, uint32_t vcpu)
{
    struct hv_recorder *recorder = file->recorder[vcpu];
    uint64_t rows = __atomic_load_n(&recorder->row_count, __ATOMIC_ACQUIRE), first = file->rows[vcpu];
    if (rows > first) {
        struct hv_row_key keys[HV_ROWS];
        for (uint64_t i = first; i < rows; i++) {
            const struct hv_row *row = &recorder->row[i];
            keys[i - first] = (struct hv_row_key){ row->address, (uint32_t)i, row->reason, row->kind, row->size, 0 };
        }
        put(file, "ROWS", vcpu, keys, (rows - first) * sizeof keys[0], NULL, 0);
        file->rows[vcpu] = rows;
    }
    uint64_t spaces = __atomic_load_n(&recorder->space_count, __ATOMIC_ACQUIRE);
    first = file->spaces[vcpu];
    if (spaces > first) {
        put(file, "SPAC", vcpu, recorder->space + first, (spaces - first) * sizeof recorder->space[0], NULL, 0);
        file->spaces[vcpu] = spaces;
    }
}

/* Move one vCPU's records to the file; a trace that cannot be written any more is dropped. */
static void drain(struct hv_trace_file *file, uint32_t vcpu)
{
    struct hv_trace *trace = atomic_load(&file->recorder[vcpu]->trace);
    uint64_t tail = atomic_load_explicit(&trace->tail, memory_order_acquire);
    uint64_t head = atomic_load_explicit(&trace->head, memory_order_relaxed);
    if (tail == head)
        return;
    put_keys(file, vcpu); /* after `tail` was read: no record refers to a later row */
    uint64_t at = head & (HV_TRACE_RECORDS - 1), count = tail - head;
    uint64_t first = HV_TRACE_RECORDS - at < count ? HV_TRACE_RECORDS - at : count;
    size_t each = sizeof trace->record[0];
    if (put(file, "TRAC", vcpu, trace->record + at, first * each, trace->record, (count - first) * each))
        trace->lost += count;
    atomic_store_explicit(&trace->head, tail, memory_order_release);
}

/* Write until stop_fd is readable, and then what is left. */
void hv_trace_file_run(struct hv_trace_file *file)
{
    struct pollfd wait[2] = { { .fd = file->stop_fd, .events = POLLIN }, { .fd = file->event_fd, .events = POLLIN } };
    int stopping = 0;
    while (!stopping) {
        stopping = poll(wait, 2, LOOK_MS) > 0 && wait[0].revents;
        if (wait[1].revents & POLLIN) {
            uint64_t events;
            ssize_t got = read(file->event_fd, &events, sizeof events);
            (void)got;
        }
        for (uint32_t vcpu = 0; vcpu < file->recorders; vcpu++)
            drain(file, vcpu);
    }
}

uint64_t hv_trace_dropped(const struct hv_recorder *recorder)
{
    const struct hv_trace *trace = atomic_load(&recorder->trace);
    return trace ? trace->dropped + trace->lost : 0;
}
