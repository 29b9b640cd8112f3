/* The split queue (Virtio 1.2, section 2.7) in C: see devices/virtio/queue.py, which says the same in Python. */
#include "dataplane.h"

#include <string.h>
#include <unistd.h>

enum { NEXT_AVAILABLE, NEXT_USED, SIGNALLED, FIRED };
enum { F_NEXT = 1, F_WRITE = 2, F_INDIRECT = 4 };

struct descriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags, next;
};

static uint16_t load16(uint64_t address)
{
    return __atomic_load_n((const uint16_t *)address, __ATOMIC_ACQUIRE);
}

static void store16(uint64_t address, uint16_t value)
{
    __atomic_store_n((uint16_t *)address, value, __ATOMIC_RELEASE);
}

static uint64_t used_event(const struct hv_queue *queue)
{
    return queue->available + 4 + 2 * (uint64_t)queue->size;
}

static uint64_t avail_event(const struct hv_queue *queue)
{
    return queue->used + 4 + 8 * (uint64_t)queue->size;
}

/* The address in this process of `size` bytes of RAM at `gpa`; 0 where not all of them are RAM. */
static uint64_t translate(const struct hv_path *path, uint64_t gpa, uint64_t size)
{
    for (uint32_t i = 0; i < path->ranges; i++) {
        const struct hv_ram_range *range = &path->ram[i];
        if (gpa >= range->gpa && gpa - range->gpa < range->size && size <= range->size - (gpa - range->gpa))
            return range->host + (gpa - range->gpa);
    }
    return 0;
}

/* Read a descriptor once: the guest may change it while we look. */
static struct descriptor fetch(uint64_t table, uint32_t index)
{
    struct descriptor copy;
    const volatile uint64_t *words = (const volatile uint64_t *)(table + 16 * (uint64_t)index);
    uint64_t first = words[0], second = words[1];
    memcpy(&copy, &first, 8);
    memcpy((char *)&copy + 8, &second, 8);
    return copy;
}

/* Look at the chain that is `ahead` behind the next one. Returns 1 with the chain, 0 when there is none, -1 when it is for
 * the device model: malformed, or longer than this code takes. */
int hv_queue_next(const struct hv_path *path, const struct hv_queue *queue, uint32_t ahead, struct hv_chain *chain)
{
    uint16_t position = (uint16_t)(queue->cursor[NEXT_AVAILABLE] + ahead);
    uint16_t offered = (uint16_t)(load16(queue->available + 2) - queue->cursor[NEXT_AVAILABLE]);
    if (offered <= ahead)
        return 0;
    if (offered > queue->size)
        return -1;
    uint64_t table = queue->descriptors;
    uint32_t size = queue->size, limit = size, steps = 0, nested = 0;
    uint32_t index = load16(queue->available + 4 + 2 * (uint64_t)(position & (queue->size - 1)));
    uint32_t pieces = 0;
    chain->head = (uint16_t)index;
    chain->readable = chain->writable = 0;
    chain->read_size = chain->write_size = 0;
    for (;;) {
        if (index >= size || ++steps > limit)
            return -1;
        struct descriptor one = fetch(table, index);
        if (one.flags & F_INDIRECT) {
            uint32_t entries = one.length / 16;
            if (nested || (one.flags & F_NEXT) || !queue->indirect || one.length % 16 || !entries || entries > queue->most)
                return -1;
            table = translate(path, one.address, one.length);
            if (!table || table % 8)
                return -1;
            nested = 1;
            size = entries;
            limit = steps + entries;
            index = 0;
            continue;
        }
        if (one.length) {
            uint64_t host = translate(path, one.address, one.length);
            if (!host || pieces == HV_PIECES)
                return -1;
            if (one.flags & F_WRITE) {
                chain->writable++;
                chain->write_size += one.length;
            } else if (chain->writable) {
                return -1;
            } else {
                chain->readable++;
                chain->read_size += one.length;
            }
            chain->piece[pieces++] = (struct iovec){ (void *)host, one.length };
        }
        if (!(one.flags & F_NEXT)) /* the used ring could not say that a longer one was filled (2.7.5.2) */
            return chain->read_size + chain->write_size > UINT32_MAX ? -1 : 1;
        index = one.next;
    }
}

/* Whether there is a chain `ahead` behind the next one. */
int hv_queue_has(const struct hv_queue *queue, uint32_t ahead)
{
    return (uint16_t)(load16(queue->available + 2) - queue->cursor[NEXT_AVAILABLE]) > ahead;
}

/* The next `count` chains have been looked at and will be given back. */
void hv_queue_take(struct hv_queue *queue, uint32_t count)
{
    queue->cursor[NEXT_AVAILABLE] = (uint16_t)(queue->cursor[NEXT_AVAILABLE] + count);
}

/* Note a chain in the used ring, `at` entries behind those that the driver has been shown. */
void hv_queue_put(struct hv_queue *queue, uint32_t at, uint16_t head, uint32_t written)
{
    uint16_t position = (uint16_t)(queue->cursor[NEXT_USED] + at);
    volatile uint32_t *entry = (volatile uint32_t *)(queue->used + 4 + 8 * (uint64_t)(position & (queue->size - 1)));
    entry[0] = head;
    entry[1] = written;
    hv_mark(queue->marks, entry, 8);
}

/* Show the driver `count` more entries. */
void hv_queue_publish(struct hv_queue *queue, uint32_t count)
{
    queue->cursor[NEXT_USED] = (uint16_t)(queue->cursor[NEXT_USED] + count);
    store16(queue->used + 2, queue->cursor[NEXT_USED]);
    hv_mark(queue->marks, (void *)queue->used, 4);
}

/* Interrupt the driver if it wants to know of what was published since the last call (2.7.7). */
void hv_queue_notify(struct hv_queue *queue)
{
    uint16_t now = queue->cursor[NEXT_USED], then = queue->cursor[SIGNALLED];
    if (now == then)
        return;
    queue->cursor[SIGNALLED] = now;
    atomic_thread_fence(memory_order_seq_cst); /* the used idx is stored before used_event is loaded */
    if (queue->event_idx) {
        if ((uint16_t)(now - load16(used_event(queue)) - 1) >= (uint16_t)(now - then))
            return;
    } else if (load16(queue->available) & 1) {
        return;
    }
    __atomic_store_n(queue->isr, 1, __ATOMIC_SEQ_CST);
    if (queue->call_fd >= 0) {
        queue->cursor[FIRED] = 1;
        uint64_t one = 1;
        ssize_t written = write(queue->call_fd, &one, sizeof one);
        (void)written; /* EAGAIN: so many are held back that one more makes no difference */
    }
}

void hv_queue_ignore_kicks(struct hv_queue *queue)
{
    if (queue->event_idx)
        return;
    store16(queue->used, 1);
    hv_mark(queue->marks, (void *)queue->used, 2);
}

/* Ask the driver to kick for what comes behind the next `beyond` chains; returns whether it has come already. */
int hv_queue_expect_kicks(struct hv_queue *queue, uint32_t beyond)
{
    uint16_t awaited = (uint16_t)(queue->cursor[NEXT_AVAILABLE] + beyond);
    uint64_t asking = queue->event_idx ? avail_event(queue) : queue->used;
    store16(asking, queue->event_idx ? awaited : 0);
    hv_mark(queue->marks, (void *)asking, 2);
    atomic_thread_fence(memory_order_seq_cst); /* what the driver reads is stored before its idx is loaded */
    return load16(queue->available + 2) != awaited;
}
