/* See uring.h. One thread uses a ring. */
#define _GNU_SOURCE
#include "uring.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Make a ring; NULL where the kernel has none for us (too old, or forbidden in a container). */
struct hv_uring *hv_uring_new(void)
{
    struct io_uring_params params;
    memset(&params, 0, sizeof params);
    int fd = (int)syscall(SYS_io_uring_setup, HV_URING_ENTRIES, &params);
    if (fd < 0)
        return NULL;
    struct hv_uring *ring = calloc(1, sizeof *ring);
    if (!ring || !(params.features & IORING_FEAT_SINGLE_MMAP)) {
        free(ring);
        close(fd);
        return NULL;
    }
    size_t sq_size = params.sq_off.array + params.sq_entries * sizeof(uint32_t);
    size_t cq_size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    ring->fd = fd;
    ring->rings_size = sq_size > cq_size ? sq_size : cq_size;
    ring->sqes_size = params.sq_entries * sizeof(struct io_uring_sqe);
    char *rings = mmap(NULL, ring->rings_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQ_RING);
    void *sqes = mmap(NULL, ring->sqes_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, IORING_OFF_SQES);
    ring->rings = rings == MAP_FAILED ? NULL : rings;
    ring->sqes = sqes == MAP_FAILED ? NULL : sqes;
    if (!ring->rings || !ring->sqes) {
        hv_uring_free(ring);
        return NULL;
    }
    ring->sq_tail = (uint32_t *)(rings + params.sq_off.tail);
    ring->sq_mask = *(uint32_t *)(rings + params.sq_off.ring_mask);
    ring->cq_head = (uint32_t *)(rings + params.cq_off.head);
    ring->cq_tail = (uint32_t *)(rings + params.cq_off.tail);
    ring->cq_mask = *(uint32_t *)(rings + params.cq_off.ring_mask);
    ring->cqes = (struct io_uring_cqe *)(rings + params.cq_off.cqes);
    uint32_t *array = (uint32_t *)(rings + params.sq_off.array);
    for (uint32_t i = 0; i < params.sq_entries; i++)
        array[i] = i;
    return ring;
}

/* Give it back; nothing is in flight. */
void hv_uring_free(struct hv_uring *ring)
{
    if (ring->sqes)
        munmap(ring->sqes, ring->sqes_size);
    if (ring->rings)
        munmap(ring->rings, ring->rings_size);
    close(ring->fd);
    free(ring);
}

/* Queue a read or a write; no more than HV_URING_ENTRIES may be in flight. `pieces` stay until it is done. `elsewhere`: by a thread of
 * the kernel's own from the start, also where this one could do it without waiting. */
void hv_uring_move(struct hv_uring *ring, int fd, int write, const struct iovec *pieces, uint32_t count, uint64_t offset,
                   int elsewhere, uint64_t tag)
{
    uint32_t tail = *ring->sq_tail;
    struct io_uring_sqe *sqe = &ring->sqes[tail & ring->sq_mask];
    memset(sqe, 0, sizeof *sqe);
    sqe->opcode = write ? IORING_OP_WRITEV : IORING_OP_READV;
    sqe->flags = elsewhere ? IOSQE_ASYNC : 0;
    sqe->fd = fd;
    sqe->off = offset;
    sqe->addr = (uint64_t)pieces;
    sqe->len = count;
    sqe->user_data = tag;
    __atomic_store_n(ring->sq_tail, tail + 1, __ATOMIC_RELEASE);
    ring->unsubmitted++;
    ring->in_flight++;
}

/* Hand what was queued to the kernel; with `wait` return when something is done at least. */
void hv_uring_submit(struct hv_uring *ring, int wait)
{
    while (ring->unsubmitted || wait) {
        long taken = syscall(SYS_io_uring_enter, ring->fd, ring->unsubmitted, wait ? 1 : 0, wait ? IORING_ENTER_GETEVENTS : 0,
                             NULL, 0);
        if (taken < 0 && (errno == EINTR || errno == EAGAIN || errno == EBUSY))
            continue;
        if (taken < 0)
            abort(); /* the ring and what is asked of it are our own: this cannot be */
        ring->unsubmitted -= (uint32_t)taken;
        wait = 0;
    }
}

/* Take the next thing that is done: its tag, and bytes or a negative errno. Returns 0 when there is none. */
int hv_uring_next(struct hv_uring *ring, uint64_t *tag, int32_t *result)
{
    uint32_t head = *ring->cq_head;
    if (head == __atomic_load_n(ring->cq_tail, __ATOMIC_ACQUIRE))
        return 0;
    const struct io_uring_cqe *cqe = &ring->cqes[head & ring->cq_mask];
    *tag = cqe->user_data;
    *result = cqe->res;
    __atomic_store_n(ring->cq_head, head + 1, __ATOMIC_RELEASE);
    ring->in_flight--;
    return 1;
}
