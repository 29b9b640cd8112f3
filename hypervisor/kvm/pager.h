/* Memory that is still somewhere else: whoever touches a missing page of guest RAM (a vCPU, KVM, a device's thread, the
 * kernel for one of them) waits in the kernel until it has been fetched. userfaultfd tells which page it is.
 *
 * This end sends the number of a page that somebody waits for, and ALL when it needs no more; the source sends runs of
 * pages, those first that are waited for. Numbers are 64 bits, little-endian as on every host here. */
#ifndef HV_PAGER_H
#define HV_PAGER_H

#include <stdint.h>

#define HV_PAGER_ALL UINT64_MAX
#define HV_PAGER_MOST 64 /* pages of a run */

enum hv_pager_end {
    HV_PAGER_DONE,    /* every page is here */
    HV_PAGER_STOPPED, /* stop_fd was written to */
    HV_PAGER_LOST     /* the source is gone, or talks nonsense */
};

/* What a source sends before the pages themselves. */
struct hv_pager_run {
    uint64_t first, pages;
};

struct hv_pager {
    int uffd, socket, stop_fd, lost_fd;
    uint64_t base, pages; /* of RAM, in this process */
    uint64_t *missing;    /* a bit each */
    uint64_t *wanted;     /* have been asked for */
    uint64_t left, faults;
    int timeout_ms;       /* a source that is silent for so long is gone */
    int grace_ms;         /* so long may it take, then, to have everybody stop touching memory */
    int owner;            /* private: see hv_pager_take */
    void *buffer;
};

int hv_uffd_open(void);
struct hv_pager *hv_pager_new(int uffd, int socket, int stop_fd, int lost_fd, uint64_t base, uint64_t pages);
int hv_pager_miss(struct hv_pager *pager, uint64_t first, uint64_t pages);
int hv_pager_register(struct hv_pager *pager);
int hv_pager_run(struct hv_pager *pager);
int hv_pager_take(struct hv_pager *pager);
void hv_pager_free(struct hv_pager *pager);

#endif
