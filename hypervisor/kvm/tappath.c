/* Frames between a TAP and the receive and transmit queues of a network device (Virtio 1.2, section 5.1.6). */
#define _GNU_SOURCE
#include "dataplane.h"

#include <errno.h>
#include <poll.h>
#include <string.h>
#include <unistd.h>

enum { RX = 0, TX = 1, BATCH = 64, NUM_BUFFERS = 10, SHORTEST = 1526, LONGEST = 65535 + 18 };

/* Why no more buffers were looked at. */
enum { NO_MORE, ODD, FULL };

/* Receive buffers that have been looked at and not been used yet. */
struct window {
    uint32_t first, chains; /* of `chain`: those before `first` are used */
    uint32_t pieces;        /* of `piece`, from `at` on */
    uint32_t at;
    uint64_t room;
    uint64_t held, kept; /* size of a frame that waits for more buffers, and how much of it lies in those that are here */
    int end;
    struct {
        uint16_t head;
        uint32_t pieces;
        uint64_t size;
    } chain[HV_WINDOW];
    struct iovec piece[HV_PIECES];
};

static __thread char beyond[LONGEST]; /* what found no room: a frame is never cut short silently */

static void forget(struct window *window)
{
    window->first = window->chains = window->pieces = window->at = 0;
    window->room = window->held = 0;
}

/* Give a frame up that waits, if there is one. */
static void drop(struct hv_path *path, struct window *window)
{
    path->drops += window->held != 0;
    window->held = 0;
}

/* Look at buffers until there is room for the longest frame. Returns -1 when one is for the device model, and there is
 * none before it. */
static int fill(struct hv_path *path, struct window *window, struct hv_chain *chain)
{
    struct hv_queue *queue = &path->queue[RX];
    uint32_t wanted = !path->mergeable ? 1 : queue->size < HV_WINDOW ? queue->size : HV_WINDOW;
    if (window->first && window->room < LONGEST + path->header_size) { /* make room at the end of the arrays */
        uint32_t left = window->chains - window->first, pieces = window->pieces - window->at;
        memmove(window->chain, window->chain + window->first, left * sizeof window->chain[0]);
        memmove(window->piece, window->piece + window->at, pieces * sizeof window->piece[0]);
        window->chains = left;
        window->pieces = pieces;
        window->first = window->at = 0;
    }
    while (window->chains - window->first < wanted && window->chains < HV_WINDOW && window->room < LONGEST + path->header_size) {
        int found = hv_queue_next(path, queue, window->chains - window->first, chain);
        if (found == 0)
            break;
        if (found > 0 && (chain->readable || !chain->writable))
            found = -1;
        if (found < 0 || window->pieces + chain->writable >= HV_PIECES) {
            window->end = found < 0 ? ODD : FULL;
            return window->chains == window->first ? -1 : 0;
        }
        memcpy(window->piece + window->pieces, chain->piece, chain->writable * sizeof chain->piece[0]);
        window->pieces += chain->writable;
        window->chain[window->chains].head = chain->head;
        window->chain[window->chains].pieces = chain->writable;
        window->chain[window->chains].size = chain->write_size;
        window->chains++;
        window->room += chain->write_size;
    }
    window->end = window->chains - window->first < wanted ? NO_MORE : FULL;
    return 0;
}

/* Write num_buffers into the header, wherever the pieces cut it. */
static void set_num_buffers(const struct iovec *piece, uint16_t count)
{
    uint8_t bytes[2] = { (uint8_t)count, (uint8_t)(count >> 8) };
    size_t skip = NUM_BUFFERS;
    for (uint32_t i = 0; i < 2; piece++) {
        for (; i < 2 && skip < piece->iov_len; skip++)
            ((volatile uint8_t *)piece->iov_base)[skip] = bytes[i++];
        skip -= skip < piece->iov_len ? skip : piece->iov_len;
    }
}

/* Give the driver the frame of `size` bytes that lies in the window. */
static void deliver(struct hv_path *path, struct window *window, uint64_t size)
{
    struct hv_queue *queue = &path->queue[RX];
    uint32_t used = 0;
    const struct iovec *start = window->piece + window->at;
    for (uint64_t left = size; left; used++) {
        uint32_t at = window->first++;
        uint64_t part = left < window->chain[at].size ? left : window->chain[at].size;
        hv_queue_put(queue, used, window->chain[at].head, (uint32_t)part);
        window->room -= window->chain[at].size;
        window->at += window->chain[at].pieces;
        left -= part;
    }
    set_num_buffers(start, (uint16_t)used);
    hv_mark_pieces(path->marks, start, HV_PIECES, size);
    hv_queue_take(queue, used);
    hv_queue_publish(queue, used);
    path->requests++;
    path->bytes += size - path->header_size;
}

/* Copy into the new buffers what found no room in the old ones. */
static void complete(struct window *window)
{
    uint64_t skip = window->kept, done = 0, size = window->held - window->kept;
    for (const struct iovec *piece = window->piece + window->at; done < size; piece++) {
        if (skip >= piece->iov_len) {
            skip -= piece->iov_len;
            continue;
        }
        uint64_t part = piece->iov_len - skip;
        if (part > size - done)
            part = size - done;
        memcpy((char *)piece->iov_base + skip, beyond + done, part);
        done += part;
        skip = 0;
    }
}

/* Receive a batch. Returns -1 when the device model is to look at it (an odd buffer; the TAP is gone), 1 when there are
 * too few buffers, else 0. */
static int receive(struct hv_path *path, struct window *window, struct hv_chain *chain, int *drained)
{
    for (uint32_t turn = 0; turn < BATCH; turn++) {
        if (fill(path, window, chain)) {
            drop(path, window);
            return -1;
        }
        if (window->held && window->held <= window->room) {
            complete(window);
            deliver(path, window, window->held);
            window->held = 0;
            continue;
        }
        if (window->held || window->chains == window->first || window->room < SHORTEST) {
            if (window->end == NO_MORE)
                return 1;
            drop(path, window); /* the driver cannot make more room */
            if (window->end == ODD)
                return -1;
        }
        uint32_t pieces = window->pieces - window->at;
        window->piece[window->pieces] = (struct iovec){ beyond, sizeof beyond };
        ssize_t got = readv(path->fd, window->piece + window->at, (int)pieces + 1);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN) {
            *drained = 1;
            return 0;
        }
        if (got <= 0) {
            hv_mark_pieces(path->marks, window->piece + window->at, pieces, window->room);
            path->gone = 1;
            return -1;
        }
        hv_mark_pieces(path->marks, window->piece + window->at, pieces, (uint64_t)got); /* also what is dropped later */
        if ((uint64_t)got < path->header_size) {
            path->drops++;
        } else if ((uint64_t)got > window->room) {
            window->held = (uint64_t)got;
            window->kept = window->room;
        } else {
            deliver(path, window, (uint64_t)got);
        }
    }
    return 0;
}

/* Transmit a batch. Returns -1 when a chain is for the device model, 1 when there may be more, else 0. */
static int transmit(struct hv_path *path, struct hv_chain *chain)
{
    struct hv_queue *queue = &path->queue[TX];
    for (uint32_t turn = 0; turn < BATCH; turn++) {
        int found = hv_queue_next(path, queue, 0, chain);
        if (found == 0)
            return 0;
        if (found < 0 || chain->writable || chain->read_size <= path->header_size ||
            chain->read_size > path->header_size + LONGEST)
            return -1;
        ssize_t sent;
        do
            sent = writev(path->fd, chain->piece, (int)chain->readable);
        while (sent < 0 && errno == EINTR);
        if (sent < 0) { /* the TAP's queue is full, or its kernel does not like the frame */
            path->drops++;
        } else {
            path->requests++;
            path->bytes += chain->read_size - path->header_size;
        }
        hv_queue_take(queue, 1);
        hv_queue_put(queue, 0, chain->head, 0);
        hv_queue_publish(queue, 1);
    }
    return 1;
}

static void take_kicks(const struct pollfd *poll)
{
    uint64_t kicks;
    if (poll->revents & POLLIN) {
        ssize_t got = read(poll->fd, &kicks, sizeof kicks);
        (void)got;
    }
}

int hv_tap_run(struct hv_path *path)
{
    struct hv_queue *rx = &path->queue[RX], *tx = &path->queue[TX];
    struct pollfd wait[4] = {
        { .fd = path->stop_fd, .events = POLLIN },
        { .fd = rx->kick_fd, .events = POLLIN },
        { .fd = tx->kick_fd, .events = POLLIN },
        { .fd = path->fd, .events = POLLIN },
    };
    struct hv_chain chain;
    struct window window;
    forget(&window);
    for (int woken = 0;;) {
        if (woken ? wait[0].revents : poll(wait, 1, 0) > 0)
            return HV_STOPPED;
        woken = 0;
        hv_queue_ignore_kicks(tx);
        hv_queue_ignore_kicks(rx);
        int sent = transmit(path, &chain);
        hv_queue_notify(tx);
        if (sent < 0) {
            drop(path, &window);
            return (int)tx->index;
        }
        int drained = (int)path->gone, starving = 0;
        if (!path->gone) {
            starving = receive(path, &window, &chain, &drained);
            hv_queue_notify(rx);
            if (starving < 0)
                return (int)rx->index;
        }
        if (sent > 0 || (!starving && !drained))
            continue;
        if (hv_queue_expect_kicks(tx, 0))
            continue;
        if (starving && hv_queue_expect_kicks(rx, window.chains - window.first))
            continue;
        wait[3].fd = path->gone || starving ? -1 : path->fd;
        woken = poll(wait, 4, -1) > 0;
        take_kicks(&wait[1]);
        take_kicks(&wait[2]);
    }
}
