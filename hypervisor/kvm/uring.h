/* As much of io_uring as the data paths need: vectored reads and writes that complete later. See io_uring(7). */
#ifndef HV_URING_H
#define HV_URING_H

#include <linux/io_uring.h>
#include <stdint.h>
#include <sys/uio.h>

#define HV_URING_ENTRIES 64

struct hv_uring {
    int fd;
    uint32_t unsubmitted, in_flight; /* queued here; queued here or on their way in the kernel */
    /* private: where the kernel has its rings */
    uint32_t *sq_tail, *cq_head, *cq_tail;
    uint32_t sq_mask, cq_mask;
    struct io_uring_sqe *sqes;
    struct io_uring_cqe *cqes;
    void *rings;
    size_t rings_size, sqes_size;
};

struct hv_uring *hv_uring_new(void);
void hv_uring_free(struct hv_uring *ring);
void hv_uring_move(struct hv_uring *ring, int fd, int write, const struct iovec *pieces, uint32_t count, uint64_t offset,
                   int elsewhere, uint64_t tag);
void hv_uring_submit(struct hv_uring *ring, int wait);
int hv_uring_next(struct hv_uring *ring, uint64_t *tag, int32_t *result);

#endif
