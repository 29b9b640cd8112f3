/* The hot loops of disks and TAPs, on the queues of devices/virtio/queue.py and outside the GIL. They take chains of the
 * common shape; every other one, malformed ones too, stays where it is for the device model. Guest memory is hostile:
 * each field is read once and judged after that, and every walk is bounded. */
#ifndef HV_DATAPLANE_H
#define HV_DATAPLANE_H

#include "dirty.h"

#include <stdatomic.h>
#include <stdint.h>
#include <sys/uio.h>

#define HV_STOPPED (-1) /* what the loops return when told to stop; else the number of a queue that needs its model */
#define HV_NEXT (-1)    /* hv_path.head: the model is to do the next chain, else the one with this head, taken already */
#define HV_RAM_RANGES 4
#define HV_PIECES 1024 /* descriptors of one chain: as many as readv takes */
#define HV_WINDOW 64   /* receive buffers that are looked at ahead */

struct hv_ram_range {
    uint64_t gpa, size, host;
};

struct hv_queue {
    /* set by the caller: addresses in this process, checked to be RAM */
    uint64_t descriptors, available, used;
    uint16_t *cursor; /* NEXT_AVAILABLE, NEXT_USED, SIGNALLED, FIRED */
    uint8_t *isr;
    int32_t call_fd, kick_fd; /* eventfds: to interrupt the driver (-1: none), and by which it kicks */
    uint32_t size, most, index;
    uint32_t event_idx, indirect;
    struct hv_marks *marks; /* NULL: nobody wants to know what is written */
};

/* One of each a thread; the counters may be read by others. */
struct hv_path {
    struct hv_ram_range ram[HV_RAM_RANGES];
    uint32_t ranges;
    int32_t fd, stop_fd;
    uint32_t readonly, header_size, mergeable; /* readonly of a disk, the others of a TAP */
    uint32_t gone;                             /* the TAP has vanished, and the model was told */
    uint64_t sectors;
    struct hv_queue queue[2]; /* a disk's, or receive and transmit */
    uint64_t requests, bytes, drops;
    uint64_t sent;        /* a disk's requests that went to io_uring */
    int32_t head;         /* when a disk's loop returns a queue's number: HV_NEXT or a head */
    uint32_t waits;       /* the disk's file cannot tell whether a read would wait */
    struct hv_disk *disk; /* what is on its way */
    struct hv_marks *marks; /* as the queues' */
};

struct hv_chain {
    uint16_t head;
    uint32_t readable, writable;    /* pieces: the readable ones first */
    uint64_t read_size, write_size; /* bytes of them */
    struct iovec piece[HV_PIECES];
};

int hv_queue_next(const struct hv_path *path, const struct hv_queue *queue, uint32_t ahead, struct hv_chain *chain);
void hv_queue_take(struct hv_queue *queue, uint32_t count);
void hv_queue_put(struct hv_queue *queue, uint32_t at, uint16_t head, uint32_t written);
void hv_queue_publish(struct hv_queue *queue, uint32_t count);
void hv_queue_notify(struct hv_queue *queue);
void hv_queue_ignore_kicks(struct hv_queue *queue);
int hv_queue_expect_kicks(struct hv_queue *queue, uint32_t beyond);

int hv_queue_has(const struct hv_queue *queue, uint32_t ahead);

int hv_disk_run(struct hv_path *path);
void hv_disk_close(struct hv_path *path);
int hv_tap_run(struct hv_path *path);

#endif
