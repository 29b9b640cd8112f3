/* See recorder.h. */
#define _GNU_SOURCE
#include "recorder.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

static size_t rows_size(void)
{
    return HV_ROWS * sizeof(struct hv_row);
}

int hv_recorder_init(struct hv_recorder *recorder)
{
    void *rows = mmap(NULL, rows_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (rows == MAP_FAILED)
        return -1;
    recorder->row = rows;
    recorder->enabled = 1;
    return 0;
}

void hv_recorder_free(struct hv_recorder *recorder)
{
    munmap(recorder->row, rows_size());
}

uint64_t hv_tick(void)
{
    return __rdtsc();
}

/* The bucket of a time: below 16 each tick has its own; above, each power of two has 16 of equal width. */
uint32_t hv_bucket(uint64_t ticks)
{
    if (ticks < HV_SUB_BUCKETS)
        return (uint32_t)ticks;
    uint32_t power = 63 - (uint32_t)__builtin_clzll(ticks);
    uint32_t bucket = (power - 3) * HV_SUB_BUCKETS + (uint32_t)(ticks >> (power - 4) & (HV_SUB_BUCKETS - 1));
    return bucket < HV_BUCKETS ? bucket : HV_BUCKETS - 1;
}

static void add(struct hv_histogram *histogram, uint64_t ticks)
{
    histogram->total += ticks;
    if (ticks > histogram->max)
        histogram->max = ticks;
    histogram->bucket[hv_bucket(ticks)]++;
}

static uint32_t mix(uint64_t address, uint32_t kind)
{
    return (uint32_t)((address * 0x9E3779B97F4A7C15u + kind * 0xC2B2AE3D27D4EB4Fu) >> 40);
}

static int is(const struct hv_row *row, uint8_t reason, uint8_t kind, uint8_t size, uint64_t address)
{
    return row->address == address && row->reason == reason && row->kind == kind && row->size == size;
}

/* Find the row of an exit, or make it. */
static struct hv_row *find(struct hv_recorder *recorder, uint8_t reason, uint8_t kind, uint8_t size, uint64_t address)
{
    uint32_t mask = 4 * HV_ROWS - 1;
    uint32_t at = mix(address, (uint32_t)reason << 16 | (uint32_t)kind << 8 | size) & mask;
    for (; recorder->index[at]; at = (at + 1) & mask) { /* a quarter full at most: this ends */
        struct hv_row *row = &recorder->row[recorder->index[at] - 1];
        if (is(row, reason, kind, size, address))
            return row;
    }
    uint64_t count = recorder->row_count;
    if (count >= HV_ROWS - HV_SPARE_ROWS && (address != HV_ELSEWHERE || size))
        return find(recorder, reason, kind, 0, HV_ELSEWHERE);
    if (count >= HV_ROWS)
        return &recorder->row[HV_ROWS - 1]; /* there are fewer reasons and directions than spare rows */
    struct hv_row *row = &recorder->row[count];
    row->address = address;
    row->reason = reason;
    row->kind = kind;
    row->size = size;
    recorder->index[at] = (uint16_t)(count + 1);
    __atomic_store_n(&recorder->row_count, count + 1, __ATOMIC_RELEASE);
    return row;
}

void hv_record_exit(struct hv_recorder *recorder, const struct hv_record *exit, uint64_t ran, int kicked)
{
    recorder->guest_ticks += ran;
    recorder->left_at = exit->tick;
    recorder->sampled = 0;
    if (!kicked)
        recorder->recent[recorder->recent_count++ & (HV_RECENT - 1)] = *exit;
    if (!recorder->enabled)
        return;
    struct hv_row *row = recorder->last; /* often the same as the last time */
    if (!row || !is(row, exit->reason, exit->kind, exit->size, exit->address))
        row = find(recorder, exit->reason, exit->kind, exit->size, exit->address);
    recorder->last = row;
    row->count++;
    row->operations += exit->operations;
    add(&row->guest, ran);
}

/* The number of an address space, from 1; 0 when there are too many. */
static uint16_t space_number(struct hv_recorder *recorder, uint64_t cr3)
{
    uint16_t last = recorder->last_space;
    if (last && recorder->space[last - 1] == cr3)
        return last;
    uint32_t mask = 4 * HV_SPACES - 1, at = mix(cr3, 0) & mask;
    for (; recorder->space_index[at]; at = (at + 1) & mask) {
        if (recorder->space[recorder->space_index[at] - 1] == cr3)
            return recorder->last_space = recorder->space_index[at];
    }
    uint64_t count = recorder->space_count;
    if (count >= HV_SPACES)
        return 0;
    recorder->space[count] = cr3;
    recorder->space_index[at] = recorder->last_space = (uint16_t)(count + 1);
    __atomic_store_n(&recorder->space_count, count + 1, __ATOMIC_RELEASE);
    return recorder->last_space;
}

void hv_record_place(struct hv_recorder *recorder, uint64_t rip, uint64_t cr3)
{
    recorder->rip = rip;
    recorder->place = space_number(recorder, cr3);
    recorder->sampled = 1;
}

static void trace(struct hv_recorder *recorder, struct hv_trace *ring, uint64_t taken)
{
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    uint64_t used = tail - atomic_load_explicit(&ring->head, memory_order_acquire);
    if (used >= HV_TRACE_RECORDS) {
        ring->dropped++;
        return;
    }
    int coarse = taken > UINT32_MAX;
    if (coarse && (taken >>= 10) > UINT32_MAX)
        taken = UINT32_MAX;
    ring->record[tail & (HV_TRACE_RECORDS - 1)] = (struct hv_trace_record){
        .tick = recorder->left_at,
        .rip = recorder->sampled ? recorder->rip : 0,
        .handler = (uint32_t)taken,
        .row = (uint16_t)((recorder->last - recorder->row) | (coarse ? HV_COARSE : 0)),
        .space = recorder->sampled ? recorder->place : 0,
    };
    atomic_store_explicit(&ring->tail, tail + 1, memory_order_release);
    if (used == HV_TRACE_RECORDS / 2) {
        uint64_t one = 1;
        ssize_t written = write(ring->event_fd, &one, sizeof one);
        (void)written; /* EAGAIN: the writer has been told many times over */
    }
}

void hv_record_entry(struct hv_recorder *recorder, uint64_t now)
{
    if (!recorder->left_at)
        return;
    uint64_t taken = now - recorder->left_at;
    recorder->handler_ticks += taken;
    if (recorder->enabled) {
        add(&recorder->last->handler, taken);
        struct hv_trace *ring = atomic_load_explicit(&recorder->trace, memory_order_acquire);
        if (ring)
            trace(recorder, ring, taken);
    }
    recorder->left_at = 0;
}
