/* See dirty.h.
 *
 * A page is never missed while others write: whoever writes does so first and then sets the bit, by an instruction that
 * is a full fence; whoever collects takes the bit first and then reads the page. So a bit that was taken too early leaves
 * another one behind. Switching on needs more: a writer that has just seen "off" may still have its data on the way. */
#define _GNU_SOURCE
#include "dirty.h"

#include <errno.h>
#include <linux/kvm.h>
#include <linux/membarrier.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { PAGE = 1 << HV_PAGE_SHIFT, WORD = 64 };

static uint64_t words_of(uint64_t pages)
{
    return (pages + WORD - 1) / WORD;
}

struct hv_marks *hv_marks_new(uint64_t base, uint64_t pages)
{
    struct hv_marks *marks = calloc(1, sizeof *marks);
    if (marks) {
        marks->base = base;
        marks->pages = pages;
    }
    return marks;
}

void hv_marks_free(struct hv_marks *marks)
{
    free(marks->store);
    free(marks);
}

/* Have every thread of this process pass a full fence. Returns 0 or a negative errno. */
static int fence_everywhere(void)
{
    if (!syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) &&
        !syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0))
        return 0;
    return syscall(SYS_membarrier, MEMBARRIER_CMD_GLOBAL, 0, 0) ? -errno : 0;
}

/* Begin to take marks, from none on, or end it. When this returns, what is written is marked, and what was written
 * unmarked can be read. Returns 0 or a negative errno. */
int hv_marks_switch(struct hv_marks *marks, int on)
{
    if (!on) {
        __atomic_store_n(&marks->bits, NULL, __ATOMIC_SEQ_CST);
        return 0;
    }
    uint64_t words = words_of(marks->pages);
    if (!marks->store && !(marks->store = calloc(words ? words : 1, sizeof *marks->store)))
        return -ENOMEM;
    memset(marks->store, 0, words * sizeof *marks->store);
    __atomic_store_n(&marks->bits, marks->store, __ATOMIC_SEQ_CST);
    int result = fence_everywhere();
    if (result)
        __atomic_store_n(&marks->bits, NULL, __ATOMIC_SEQ_CST);
    return result;
}

void hv_mark_pages(struct hv_marks *marks, uint64_t at, uint64_t size)
{
    uint64_t *bits = __atomic_load_n(&marks->bits, __ATOMIC_ACQUIRE), offset = at - marks->base;
    if (!bits || !size || offset >= marks->pages << HV_PAGE_SHIFT)
        return;
    uint64_t first = offset >> HV_PAGE_SHIFT, last = (offset + size - 1) >> HV_PAGE_SHIFT;
    if (last >= marks->pages)
        last = marks->pages - 1;
    for (uint64_t word = first / WORD; word <= last / WORD; word++) {
        uint64_t mask = UINT64_MAX;
        if (word == first / WORD)
            mask &= UINT64_MAX << first % WORD;
        if (word == last / WORD)
            mask &= UINT64_MAX >> (WORD - 1 - last % WORD);
        __atomic_fetch_or(&bits[word], mask, __ATOMIC_SEQ_CST); /* also where they are set: it is the fence */
    }
}

/* Take what KVM logged of a slot, and have it log anew. */
static int fetch_log(int vm, const struct hv_log_slot *slot, int by_hand, uint64_t *bits)
{
    struct kvm_dirty_log log = { .slot = slot->slot, .dirty_bitmap = bits + slot->first / WORD };
    if (ioctl(vm, KVM_GET_DIRTY_LOG, &log))
        return -errno;
    if (!by_hand)
        return 0;
    struct kvm_clear_dirty_log clear = {
        .slot = slot->slot,
        .num_pages = (uint32_t)slot->pages,
        .dirty_bitmap = log.dirty_bitmap,
    };
    return ioctl(vm, KVM_CLEAR_DIRTY_LOG, &clear) ? -errno : 0;
}

/* Take which pages have changed since the last time, of KVM's log and of our marks, into `bits`.
 * `by_hand`: the log is cleared by an ioctl of its own. Returns their number, or a negative errno. */
int64_t hv_collect(struct hv_marks *marks, int vm, const struct hv_log_slot *slots, uint32_t count, int by_hand, uint64_t *bits)
{
    int64_t changed = 0;
    uint64_t *ours = __atomic_load_n(&marks->bits, __ATOMIC_ACQUIRE), words = words_of(marks->pages);
    memset(bits, 0, words * sizeof *bits);
    for (uint32_t i = 0; i < count; i++) {
        int result = fetch_log(vm, &slots[i], by_hand, bits);
        if (result)
            return result;
    }
    for (uint64_t word = 0; word < words; word++) {
        if (ours && __atomic_load_n(&ours[word], __ATOMIC_RELAXED))
            bits[word] |= __atomic_exchange_n(&ours[word], 0, __ATOMIC_SEQ_CST);
        if (bits[word])
            changed += __builtin_popcountll(bits[word]);
    }
    return changed;
}

/* Find the next run of set bits from page `*from` on; return its length with `*from` its first page, 0 when there is none. */
static uint64_t next_run(const uint64_t *bits, uint64_t pages, uint64_t *from)
{
    uint64_t at = *from, end;
    while (at < pages) { /* the first that is set */
        uint64_t word = bits[at / WORD] >> at % WORD;
        if (word) {
            at += (uint64_t)__builtin_ctzll(word);
            break;
        }
        at = (at / WORD + 1) * WORD;
    }
    if (at >= pages)
        return 0;
    for (end = at; end < pages;) { /* the first behind it that is not */
        uint64_t word = ~bits[end / WORD] >> end % WORD;
        if (word) {
            end += (uint64_t)__builtin_ctzll(word);
            break;
        }
        end = (end / WORD + 1) * WORD;
    }
    *from = at;
    return (end < pages ? end : pages) - at;
}

/* Copy every page whose bit is set from `base` to `ram`, and return how many those are. */
uint64_t hv_copy_back(void *ram, const void *base, const uint64_t *bits, uint64_t pages)
{
    uint64_t copied = 0, run;
    for (uint64_t at = 0; (run = next_run(bits, pages, &at)); at += run) {
        memcpy((char *)ram + (at << HV_PAGE_SHIFT), (const char *)base + (at << HV_PAGE_SHIFT), run << HV_PAGE_SHIFT);
        copied += run;
    }
    return copied;
}

/* Copy RAM to `base`, which is all zeroes, without giving memory to pages of zeroes. Returns how many pages have others. */
uint64_t hv_copy_base(void *base, const void *ram, uint64_t pages)
{
    uint64_t copied = 0;
    for (uint64_t page = 0; page < pages; page++) {
        const char *from = (const char *)ram + (page << HV_PAGE_SHIFT);
        if (*from || memcmp(from, from + 1, PAGE - 1)) {
            memcpy((char *)base + (page << HV_PAGE_SHIFT), from, PAGE);
            copied++;
        }
    }
    return copied;
}

/* Write up to `most` runs of set bits to `runs`, first page and length each, from page `*from` on, which moves behind them.
 * Returns how many. */
uint64_t hv_runs(const uint64_t *bits, uint64_t pages, uint64_t *from, uint64_t *runs, uint64_t most)
{
    uint64_t found = 0, run;
    while (found < most && (run = next_run(bits, pages, from))) {
        runs[2 * found] = *from;
        runs[2 * found++ + 1] = run;
        *from += run;
    }
    return found;
}
