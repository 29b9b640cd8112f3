/* See pager.h. This runs without the GIL, and never touches guest memory itself: a thread of Python's may hold the GIL while
 * it waits for a page. */
#define _GNU_SOURCE
#include "pager.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef USERFAULTFD_IOC_NEW /* Linux 6.1 */
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

enum { PAGE = 4096, WORD = 64, MESSAGES = 16, HOST_CANNOT = 3, LAST_WORD_MS = 1000 };
enum { NOBODY, OURS, GONE }; /* hv_pager.owner: whether the guest is ours when the source is lost */

static int has(const uint64_t *bits, uint64_t page)
{
    return bits[page / WORD] >> page % WORD & 1;
}

/* Open a userfaultfd that also serves the kernel's own accesses. Returns it, or a negative errno. */
int hv_uffd_open(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) {
        int why = errno, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -why;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        why = errno;
        close(device);
        if (fd < 0)
            return -why;
    }
    struct uffdio_api api = { .api = UFFD_API };
    if (ioctl(fd, UFFDIO_API, &api)) {
        int why = errno;
        close(fd);
        return -why;
    }
    return fd;
}

/* Serve RAM of `pages` pages at `base`, all there at first. NULL without memory. It takes none of the descriptors over. */
struct hv_pager *hv_pager_new(int uffd, int socket, int stop_fd, int lost_fd, uint64_t base, uint64_t pages)
{
    struct hv_pager *pager = calloc(1, sizeof *pager);
    uint64_t words = (pages + WORD - 1) / WORD;
    if (!pager)
        return NULL;
    *pager = (struct hv_pager){ .uffd = uffd, .socket = socket, .stop_fd = stop_fd, .lost_fd = lost_fd, .base = base, .pages = pages };
    pager->missing = calloc(words, sizeof *pager->missing);
    pager->wanted = calloc(words, sizeof *pager->wanted);
    pager->buffer = aligned_alloc(PAGE, HV_PAGER_MOST * PAGE);
    if (!pager->missing || !pager->wanted || !pager->buffer) {
        hv_pager_free(pager);
        return NULL;
    }
    return pager;
}

void hv_pager_free(struct hv_pager *pager)
{
    free(pager->missing);
    free(pager->wanted);
    free(pager->buffer);
    free(pager);
}

/* Say that pages are missing, and drop what is there in their place. Returns 0 or a negative errno. */
int hv_pager_miss(struct hv_pager *pager, uint64_t first, uint64_t pages)
{
    if (first > pager->pages || pages > pager->pages - first)
        return -EINVAL;
    for (uint64_t page = first; page < first + pages; page++) {
        pager->left += !has(pager->missing, page);
        pager->missing[page / WORD] |= 1ULL << page % WORD;
    }
    return madvise((void *)(pager->base + first * PAGE), pages * PAGE, MADV_DONTNEED) ? -errno : 0;
}

/* From here on whoever touches a page that is not there waits for hv_pager_run. Returns 0 or a negative errno. */
int hv_pager_register(struct hv_pager *pager)
{
    struct uffdio_register all = { .range = { pager->base, pager->pages * PAGE }, .mode = UFFDIO_REGISTER_MODE_MISSING };
    return ioctl(pager->uffd, UFFDIO_REGISTER, &all) ? -errno : 0;
}

/* Let memory be as any other is: who waits goes on, with zeroes where nothing is. Linux wakes them just before it takes the
 * memory off the userfaultfd, and since page faults take a lock per VMA (6.7), some come to wait in between: they are
 * woken here. Nobody comes after that. */
static void unregister(struct hv_pager *pager)
{
    struct uffdio_range all = { pager->base, pager->pages * PAGE };
    ioctl(pager->uffd, UFFDIO_UNREGISTER, &all);
    ioctl(pager->uffd, UFFDIO_WAKE, &all);
}

/* Wake who waits for a page that is there. */
static void wake(struct hv_pager *pager, uint64_t page)
{
    struct uffdio_range one = { pager->base + page * PAGE, PAGE };
    ioctl(pager->uffd, UFFDIO_WAKE, &one);
}

/* Put pages where they belong and wake who waits for them. */
static void place(struct hv_pager *pager, uint64_t first, uint64_t pages)
{
    for (uint64_t done = 0; done < pages;) {
        struct uffdio_copy copy = {
            .dst = pager->base + (first + done) * PAGE,
            .src = (uint64_t)pager->buffer + done * PAGE,
            .len = (pages - done) * PAGE,
        };
        if (!ioctl(pager->uffd, UFFDIO_COPY, &copy))
            return;
        if (copy.copy > 0) {
            done += (uint64_t)copy.copy / PAGE;
        } else if (errno == EEXIST) {
            wake(pager, first + done++);
        } else if (errno != EAGAIN) {
            return; /* the memory is gone */
        }
    }
}

/* Answer a touch: a page of the source's is asked for, any other is one that nobody has written yet. */
static int answer(struct hv_pager *pager, uint64_t address)
{
    uint64_t page = (address - pager->base) / PAGE;
    pager->faults++;
    if (page < pager->pages && has(pager->missing, page)) {
        if (has(pager->wanted, page))
            return 0;
        pager->wanted[page / WORD] |= 1ULL << page % WORD;
        return send(pager->socket, &page, sizeof page, MSG_NOSIGNAL) == sizeof page ? 0 : -1;
    }
    struct uffdio_zeropage zero = { .range = { pager->base + page * PAGE, PAGE } };
    while (ioctl(pager->uffd, UFFDIO_ZEROPAGE, &zero) && errno == EAGAIN)
        zero.zeropage = 0;
    if (zero.zeropage != PAGE)
        wake(pager, page);
    return 0;
}

static int take_faults(struct hv_pager *pager)
{
    struct uffd_msg messages[MESSAGES];
    ssize_t got = read(pager->uffd, messages, sizeof messages);
    for (ssize_t i = 0; i < got / (ssize_t)sizeof *messages; i++)
        if (messages[i].event == UFFD_EVENT_PAGEFAULT && answer(pager, messages[i].arg.pagefault.address))
            return -1;
    return 0;
}

static int receive(struct hv_pager *pager, void *into, size_t size)
{
    for (size_t done = 0; done < size;) {
        struct pollfd ready[] = { { .fd = pager->socket, .events = POLLIN }, { .fd = pager->stop_fd, .events = POLLIN } };
        int count = poll(ready, 2, pager->timeout_ms);
        if (count < 0 && errno == EINTR)
            continue;
        if (count <= 0 || ready[1].revents)
            return -1; /* whoever stops it does not ask why */
        ssize_t got = recv(pager->socket, (char *)into + done, size - done, MSG_DONTWAIT);
        if (got <= 0 && !(got < 0 && (errno == EAGAIN || errno == EINTR)))
            return -1;
        done += got > 0 ? (size_t)got : 0;
    }
    return 0;
}

static int take_pages(struct hv_pager *pager)
{
    struct hv_pager_run run;
    if (receive(pager, &run, sizeof run) || !run.pages || run.pages > HV_PAGER_MOST || run.first >= pager->pages ||
        run.pages > pager->pages - run.first)
        return -1;
    for (uint64_t page = run.first; page < run.first + run.pages; page++)
        if (!has(pager->missing, page))
            return -1;
    if (receive(pager, pager->buffer, run.pages * PAGE))
        return -1;
    place(pager, run.first, run.pages);
    for (uint64_t page = run.first; page < run.first + run.pages; page++)
        pager->missing[page / WORD] &= ~(1ULL << page % WORD);
    pager->left -= run.pages;
    return 0;
}

/* The source is gone. What was there is nowhere now, and nobody may go on with zeroes instead: a disk would get them. Those
 * who wait for a page wait on while everybody else is told to stop; if they cannot, only the end of the process is left. */
static int lose(struct hv_pager *pager)
{
    int owner = NOBODY;
    if (__atomic_compare_exchange_n(&pager->owner, &owner, GONE, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
        unregister(pager); /* nothing has run here */
        return HV_PAGER_LOST;
    }
    uint64_t one = 1;
    struct pollfd stopped = { .fd = pager->stop_fd, .events = POLLIN };
    if (write(pager->lost_fd, &one, sizeof one) < 0 || poll(&stopped, 1, pager->grace_ms) != 1) {
        dprintf(STDERR_FILENO, "hv: the source is gone, and %lu pages of the guest's memory with it: the guest is lost\n",
                (unsigned long)pager->left);
        _exit(HOST_CANNOT);
    }
    unregister(pager); /* what is looked at afterwards is zero */
    return HV_PAGER_LOST;
}

/* Say that the guest runs here from now on. Returns 0 when the source has been lost already: then it must not. */
int hv_pager_take(struct hv_pager *pager)
{
    int owner = NOBODY;
    return __atomic_compare_exchange_n(&pager->owner, &owner, OURS, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* The guest has ended, and needs no more: the source need not keep the rest. What is on its way is let pass first, as a
 * connection that is closed with something unread may lose the last word too. */
static int stop(struct hv_pager *pager)
{
    uint64_t all = HV_PAGER_ALL;
    struct pollfd more = { .fd = pager->socket, .events = POLLIN };
    if (__atomic_load_n(&pager->owner, __ATOMIC_SEQ_CST) == OURS && send(pager->socket, &all, sizeof all, MSG_NOSIGNAL) > 0)
        while (poll(&more, 1, LAST_WORD_MS) == 1 && recv(pager->socket, pager->buffer, PAGE, 0) > 0)
            ;
    return HV_PAGER_STOPPED;
}

/* Fetch pages until all are here. Returns one of enum hv_pager_end. */
int hv_pager_run(struct hv_pager *pager)
{
    while (pager->left) {
        struct pollfd ready[] = { { .fd = pager->uffd, .events = POLLIN },
                                  { .fd = pager->socket, .events = POLLIN },
                                  { .fd = pager->stop_fd, .events = POLLIN } };
        int count = poll(ready, 3, pager->timeout_ms);
        if (count < 0 && errno == EINTR)
            continue;
        if (count > 0 && ready[2].revents)
            return stop(pager);
        if (count <= 0 || (ready[0].revents && take_faults(pager)) || (ready[1].revents && take_pages(pager))) {
            struct pollfd stopped = { .fd = pager->stop_fd, .events = POLLIN };
            return poll(&stopped, 1, 0) == 1 ? stop(pager) : lose(pager);
        }
    }
    unregister(pager);
    uint64_t all = HV_PAGER_ALL;
    send(pager->socket, &all, sizeof all, MSG_NOSIGNAL);
    return HV_PAGER_DONE;
}
