/* A disk's reads and writes (Virtio 1.2, section 5.2.6), straight between guest memory and a file. */
#define _GNU_SOURCE
#include "dataplane.h"
#include "uring.h"

#include <errno.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { T_IN = 0, T_OUT = 1, SECTOR = 512 };
enum { NOTIFY_EVERY = 8, LARGE = 256 << 10, MOST = 1 << 30, SLOT_PIECES = 256 }; /* requests, bytes, bytes, pieces */

struct request {
    uint32_t type, reserved;
    uint64_t sector;
};

/* Reads that the host's page cache answers at once are done on the spot, and so are writes, which go there. A read that has
 * to wait for the disk goes to io_uring, so that as many wait at once as the driver asks for; and so do large requests when
 * there are several, which the kernel's threads then copy on other processors. */
struct slot {
    uint16_t head;
    int write;
    uint32_t size, count, next_free;
    uint64_t offset;
    uint8_t *status;
    struct iovec *at, piece[SLOT_PIECES]; /* `at`: the first of those that are not filled yet */
};

struct hv_disk {
    struct hv_uring *ring; /* NULL: there is none to be had */
    uint32_t first_free, failures;
    uint16_t failed[HV_URING_ENTRIES]; /* heads of the chains that the device model is to do anew */
    struct slot slot[HV_URING_ENTRIES];
};

/* What `start` returns besides the bytes written to a chain that is done. */
enum { FOR_THE_MODEL = -1, ON_ITS_WAY = -2 };

/* Step over `done` bytes of `*pieces`. */
static void skip(struct iovec **pieces, uint32_t *count, size_t done)
{
    while (*count && done >= (*pieces)->iov_len) {
        done -= (*pieces)->iov_len;
        ++*pieces;
        --*count;
    }
    if (done) {
        (*pieces)->iov_base = (char *)(*pieces)->iov_base + done;
        (*pieces)->iov_len -= done;
    }
}

/* A read into guest memory has been tried. All of it counts as written: one that fails may have begun. */
static void mark_read(const struct hv_path *path, const struct iovec *pieces, uint32_t count)
{
    hv_mark_pieces(path->marks, pieces, count, UINT64_MAX);
}

/* Move all bytes of `pieces`, which are used up on the way. Returns 0, or -1 at an error or the file's end. */
static int move(const struct hv_path *path, int write, struct iovec *pieces, uint32_t count, uint64_t offset)
{
    int fd = path->fd;
    while (count) {
        ssize_t done = write ? pwritev(fd, pieces, (int)count, (off_t)offset) : preadv(fd, pieces, (int)count, (off_t)offset);
        if (!write)
            mark_read(path, pieces, count);
        if (done < 0 && errno == EINTR)
            continue;
        if (done <= 0)
            return -1;
        offset += (uint64_t)done;
        skip(&pieces, &count, (size_t)done);
    }
    return 0;
}

static struct hv_disk *disk_of(struct hv_path *path)
{
    if (!path->disk && (path->disk = calloc(1, sizeof *path->disk))) {
        path->disk->ring = hv_uring_new();
        for (uint32_t i = 0; i < HV_URING_ENTRIES; i++)
            path->disk->slot[i].next_free = i + 1;
    }
    return path->disk;
}

void hv_disk_close(struct hv_path *path)
{
    if (path->disk && path->disk->ring)
        hv_uring_free(path->disk->ring);
    free(path->disk);
    path->disk = NULL;
}

/* Send what is left of a request on its way. Returns 0, or -1 where that cannot be. */
static int send(struct hv_path *path, const struct hv_chain *chain, int write, const struct iovec *pieces, uint32_t count,
                uint64_t offset, uint64_t size, int elsewhere)
{
    struct hv_disk *disk = disk_of(path);
    if (!disk || !disk->ring || count > SLOT_PIECES || disk->first_free == HV_URING_ENTRIES)
        return -1;
    struct slot *slot = &disk->slot[disk->first_free];
    uint32_t tag = disk->first_free;
    disk->first_free = slot->next_free;
    memcpy(slot->piece, pieces, count * sizeof *pieces);
    slot->at = slot->piece;
    slot->head = chain->head;
    slot->write = write;
    slot->count = count;
    slot->offset = offset;
    slot->size = (uint32_t)size;
    slot->status = chain->piece[chain->readable + chain->writable - 1].iov_base;
    hv_uring_move(disk->ring, path->fd, write, slot->at, count, offset, elsewhere, tag);
    path->sent++;
    return 0;
}

/* Read into `pieces`, at once if that needs no waiting. Returns 0, or one of the above. */
static int start_read(struct hv_path *path, struct hv_chain *chain, uint64_t offset, uint64_t size)
{
    struct iovec *pieces = chain->piece + 1;
    uint32_t count = chain->writable - 1;
    if (path->waits)
        return move(path, 0, pieces, count, offset) ? FOR_THE_MODEL : 0;
    ssize_t done = preadv2(path->fd, pieces, (int)count, (off_t)offset, RWF_NOWAIT);
    mark_read(path, pieces, count);
    if (done < 0 && errno == EOPNOTSUPP)
        path->waits = 1;
    else if (!done || (done < 0 && errno != EAGAIN && errno != EINTR))
        return FOR_THE_MODEL; /* the file's end, or an error */
    if ((uint64_t)done == size)
        return 0;
    if (done > 0) {
        skip(&pieces, &count, (size_t)done);
        offset += (uint64_t)done;
    }
    if (!path->waits && !send(path, chain, 0, pieces, count, offset, size, 0))
        return ON_ITS_WAY;
    return move(path, 0, pieces, count, offset) ? FOR_THE_MODEL : 0;
}

static int64_t complete(struct hv_path *path, uint8_t *status, uint64_t size, int64_t written)
{
    *(volatile uint8_t *)status = 0;
    hv_mark(path->marks, status, 1);
    path->requests++;
    path->bytes += size;
    return written;
}

/* Begin to answer one chain; returns the bytes written to it when that is done already, or one of the above. What is for the
 * device model it does all anew. `others`: more requests wait behind it. */
static int64_t start(struct hv_path *path, struct hv_chain *chain, int others)
{
    if (!chain->readable || !chain->writable || chain->piece[0].iov_len != sizeof(struct request))
        return FOR_THE_MODEL;
    struct iovec *status = &chain->piece[chain->readable + chain->writable - 1];
    struct request request;
    memcpy(&request, chain->piece[0].iov_base, sizeof request); /* once: it lies in guest memory */
    int write = request.type == T_OUT;
    if ((request.type != T_IN && !write) || status->iov_len != 1 || (write && path->readonly))
        return FOR_THE_MODEL;
    uint64_t size = write ? chain->read_size - sizeof request : chain->write_size - 1;
    uint64_t nothing = write ? chain->write_size - 1 : chain->read_size - sizeof request;
    uint64_t sectors = size / SECTOR;
    if (nothing || !size || size % SECTOR || size > MOST || sectors > path->sectors || request.sector > path->sectors - sectors)
        return FOR_THE_MODEL;
    uint64_t offset = request.sector * SECTOR;
    uint8_t *answer = status->iov_base;
    uint32_t count = write ? chain->readable - 1 : chain->writable - 1;
    if (size >= LARGE && others && !send(path, chain, write, chain->piece + 1, count, offset, size, 1))
        return ON_ITS_WAY;
    int state = write ? move(path, 1, chain->piece + 1, count, offset) : start_read(path, chain, offset, size);
    return state ? state : complete(path, answer, size, write ? 1 : (int64_t)size + 1);
}

static void give_back(struct hv_queue *queue, uint16_t head, int64_t written)
{
    hv_queue_put(queue, 0, head, (uint32_t)written);
    hv_queue_publish(queue, 1);
}

/* How many requests io_uring has. */
static uint32_t on_their_way(const struct hv_path *path)
{
    return path->disk && path->disk->ring ? path->disk->ring->in_flight : 0;
}

/* Give back what io_uring has done; with `wait` until something is done at least. */
static void collect(struct hv_path *path, int wait)
{
    struct hv_disk *disk = path->disk;
    if (!on_their_way(path))
        return;
    hv_uring_submit(disk->ring, wait);
    uint64_t tag;
    int32_t result;
    while (hv_uring_next(disk->ring, &tag, &result)) {
        struct slot *slot = &disk->slot[tag];
        int bad = result < 0 && result != -EINTR && result != -EAGAIN;
        if (!slot->write)
            mark_read(path, slot->at, slot->count);
        if (!bad) { /* the kernel may stop half-way, at the end of the file or not */
            uint32_t done = result > 0 ? (uint32_t)result : 0;
            skip(&slot->at, &slot->count, done);
            bad = move(path, slot->write, slot->at, slot->count, slot->offset + done);
        }
        slot->next_free = disk->first_free;
        disk->first_free = (uint32_t)tag;
        if (bad)
            disk->failed[disk->failures++] = slot->head;
        else
            give_back(&path->queue[0], slot->head,
                      complete(path, slot->status, slot->size, slot->write ? 1 : (int64_t)slot->size + 1));
    }
}

/* Wait until nothing is on its way, so that the device model and the driver's reset find the queue at rest. */
static void drain(struct hv_path *path)
{
    while (on_their_way(path))
        collect(path, 1);
    hv_queue_notify(&path->queue[0]);
}

/* Whether more chains may be taken: as many may be on their way as there are slots. */
static int has_room(const struct hv_path *path)
{
    return !path->disk || path->disk->first_free < HV_URING_ENTRIES;
}

/* Begin what the driver has made available, at most as many chains as the queue is long. Returns what hv_queue_next says. */
static int take_chains(struct hv_path *path, struct hv_chain *chain)
{
    struct hv_queue *queue = &path->queue[0];
    int found = 0;
    for (uint32_t turn = 1; has_room(path) && (found = hv_queue_next(path, queue, 0, chain)) > 0; turn++) {
        int64_t written = start(path, chain, hv_queue_has(queue, 1));
        if (written == FOR_THE_MODEL)
            return -1;
        hv_queue_take(queue, 1);
        if (written != ON_ITS_WAY)
            give_back(queue, chain->head, written);
        if (turn % NOTIFY_EVERY == 0)
            hv_queue_notify(queue);
        if (turn >= queue->size) /* see whether to stop, however busy the driver is */
            break;
    }
    return found;
}

int hv_disk_run(struct hv_path *path)
{
    struct hv_queue *queue = &path->queue[0];
    struct pollfd wait[3] = {
        { .fd = path->stop_fd, .events = POLLIN },
        { .fd = queue->kick_fd, .events = POLLIN },
        { .fd = -1, .events = POLLIN },
    };
    struct hv_chain chain;
    for (;;) {
        if (path->disk && path->disk->failures) {
            drain(path);
            path->head = path->disk->failed[--path->disk->failures];
            return (int)queue->index;
        }
        int stopping = poll(wait, 1, 0) > 0, found = 0;
        if (!stopping) {
            hv_queue_ignore_kicks(queue);
            found = take_chains(path, &chain);
            collect(path, 0);
            hv_queue_notify(queue);
        }
        if (stopping || found < 0)
            drain(path);
        if (path->disk && path->disk->failures)
            continue;
        if (stopping)
            return HV_STOPPED;
        if (found < 0) {
            path->head = HV_NEXT;
            return (int)queue->index;
        }
        if (has_room(path) && (found > 0 || hv_queue_expect_kicks(queue, 0)))
            continue;
        wait[2].fd = on_their_way(path) ? path->disk->ring->fd : -1;
        poll(wait, 3, -1);
        if (wait[1].revents & POLLIN) {
            uint64_t kicks;
            ssize_t got = read(queue->kick_fd, &kicks, sizeof kicks);
            (void)got;
        }
    }
}
