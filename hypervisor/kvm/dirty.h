/* Which pages of guest RAM have changed. KVM logs what the guest writes and what KVM itself writes for it; what this process
 * writes it does not see. So every place here that writes guest memory says so, in a bitmap that both languages share. */
#ifndef HV_DIRTY_H
#define HV_DIRTY_H

#include <stdint.h>
#include <sys/uio.h>

#define HV_PAGE_SHIFT 12

/* One for a machine's RAM, which is one stretch in this process. A bit is a page, counted from where RAM begins. */
struct hv_marks {
    uint64_t *bits;  /* NULL while nobody wants to know */
    uint64_t *store; /* the same memory, from the first time on until the end: a thread may be marking while it is switched off */
    uint64_t base, pages;
};

/* A slot of KVM's and where its pages are among those of RAM: `first` is a multiple of 64. */
struct hv_log_slot {
    uint32_t slot;
    uint64_t first, pages;
};

struct hv_marks *hv_marks_new(uint64_t base, uint64_t pages);
void hv_marks_free(struct hv_marks *marks);
int hv_marks_switch(struct hv_marks *marks, int on);
void hv_mark_pages(struct hv_marks *marks, uint64_t at, uint64_t size);
int64_t hv_collect(struct hv_marks *marks, int vm, const struct hv_log_slot *slots, uint32_t count, int by_hand, uint64_t *bits);
uint64_t hv_copy_back(void *ram, const void *base, const uint64_t *bits, uint64_t pages);
uint64_t hv_copy_base(void *base, const void *ram, uint64_t pages);
uint64_t hv_runs(const uint64_t *bits, uint64_t pages, uint64_t *from, uint64_t *runs, uint64_t most);

/* Say that `size` bytes of guest memory at `at` have been written: after the write, and before the guest is told of it. */
static inline void hv_mark(struct hv_marks *marks, const volatile void *at, uint64_t size)
{
    if (marks && __atomic_load_n(&marks->bits, __ATOMIC_ACQUIRE))
        hv_mark_pages(marks, (uint64_t)at, size);
}

/* The same of the first `size` bytes of `pieces`. */
static inline void hv_mark_pieces(struct hv_marks *marks, const struct iovec *pieces, uint32_t count, uint64_t size)
{
    if (!marks || !__atomic_load_n(&marks->bits, __ATOMIC_ACQUIRE))
        return;
    for (; count && size; pieces++, count--) {
        uint64_t part = size < pieces->iov_len ? size : pieces->iov_len;
        hv_mark_pages(marks, (uint64_t)pieces->iov_base, part);
        size -= part;
    }
}

#endif
