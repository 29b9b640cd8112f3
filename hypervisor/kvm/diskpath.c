/* A disk's reads and writes (Virtio 1.2, section 5.2.6), straight between guest memory and a file. */
#define _GNU_SOURCE
#include "dataplane.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

enum { T_IN = 0, T_OUT = 1, SECTOR = 512, NOTIFY_EVERY = 8 };

struct request {
    uint32_t type, reserved;
    uint64_t sector;
};

/* Move all bytes of `pieces`, which are used up on the way. Returns 0, or -1 at an error or the file's end. */
static int move(int fd, int write, struct iovec *pieces, uint32_t count, uint64_t offset)
{
    while (count) {
        ssize_t done = write ? pwritev(fd, pieces, (int)count, (off_t)offset) : preadv(fd, pieces, (int)count, (off_t)offset);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1;
        offset += (uint64_t)done;
        while (count && (size_t)done >= pieces->iov_len) {
            done -= (ssize_t)pieces->iov_len;
            pieces++;
            count--;
        }
        if (done) {
            pieces->iov_base = (char *)pieces->iov_base + done;
            pieces->iov_len -= (size_t)done;
        }
    }
    return 0;
}

/* Answer one chain; returns the bytes written to it, or -1 when the device model is to do that: then it does all anew. */
static int64_t answer(struct hv_path *path, struct hv_chain *chain)
{
    if (!chain->readable || !chain->writable || chain->piece[0].iov_len != sizeof(struct request))
        return -1;
    struct iovec *status = &chain->piece[chain->readable + chain->writable - 1];
    struct request request;
    memcpy(&request, chain->piece[0].iov_base, sizeof request); /* once: it lies in guest memory */
    int write = request.type == T_OUT;
    if ((request.type != T_IN && !write) || status->iov_len != 1 || (write && path->readonly))
        return -1;
    uint64_t size = write ? chain->read_size - sizeof request : chain->write_size - 1;
    uint64_t nothing = write ? chain->write_size - 1 : chain->read_size - sizeof request;
    uint64_t sectors = size / SECTOR;
    if (nothing || !size || size % SECTOR || sectors > path->sectors || request.sector > path->sectors - sectors)
        return -1;
    uint32_t count = write ? chain->readable - 1 : chain->writable - 1;
    if (move(path->fd, write, chain->piece + 1, count, request.sector * SECTOR))
        return -1;
    *(volatile uint8_t *)status->iov_base = 0;
    path->requests++;
    path->bytes += size;
    return write ? 1 : (int64_t)size + 1;
}

int hv_disk_run(struct hv_path *path)
{
    struct hv_queue *queue = &path->queue[0];
    struct pollfd wait[2] = { { .fd = queue->kick_fd, .events = POLLIN }, { .fd = path->stop_fd, .events = POLLIN } };
    struct hv_chain chain;
    for (;;) {
        if (poll(&wait[1], 1, 0) > 0)
            return HV_STOPPED;
        hv_queue_ignore_kicks(queue);
        int found;
        for (uint32_t turn = 1; (found = hv_queue_next(path, queue, 0, &chain)) > 0; turn++) {
            int64_t written = answer(path, &chain);
            if (written < 0) {
                found = -1;
                break;
            }
            hv_queue_take(queue, 1);
            hv_queue_put(queue, 0, chain.head, (uint32_t)written);
            hv_queue_publish(queue, 1);
            if (turn % NOTIFY_EVERY == 0)
                hv_queue_notify(queue);
            if (turn >= queue->size) /* see whether to stop, however busy the driver is */
                break;
        }
        hv_queue_notify(queue);
        if (found < 0)
            return (int)queue->index;
        if (found > 0 || hv_queue_expect_kicks(queue, 0))
            continue;
        poll(wait, 2, -1);
        if (wait[0].revents & POLLIN) {
            uint64_t kicks;
            ssize_t got = read(queue->kick_fd, &kicks, sizeof kicks);
            (void)got;
        }
    }
}
