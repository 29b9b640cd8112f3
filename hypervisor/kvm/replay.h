/* A list of ioctls that is made once and done again and again: how a machine's KVM state is set back. See prepared.py. */
#ifndef HV_REPLAY_H
#define HV_REPLAY_H

#include <stdint.h>

/* What a step is. Only what depends on the present moment is worked out anew. */
enum hv_step_kind {
    HV_STEP_PLAIN, /* the ioctl with its argument */
    HV_STEP_VALUE, /* with a plain number; EINVAL means that the guest has no use for it */
    HV_STEP_MSRS,  /* goes on behind MSRs that KVM refuses */
    HV_STEP_CLOCK, /* sets the guest's clock and notes the moment */
    HV_STEP_TSC,   /* the offset with which the TSC has moved on as far as the clock, or else the MSR itself */
    HV_STEP_PIT,   /* ages become moments */
    HV_STEP_NESTED /* only where the present state is another one */
};

struct hv_step {
    int32_t fd, kind;
    uint64_t request;
    void *argument;
    /* of HV_STEP_TSC: the saved offset plus the host's TSC then, and the guest's clock then; its frequency is 0: not to be had.
     * `spare` is the table with the MSR, or of HV_STEP_NESTED room to read into, of `size` bytes */
    uint64_t sum, guest_ns, khz;
    void *spare;
    uint64_t size;
};

/* How it went. */
#define HV_REFUSALS 64
struct hv_refused {
    uint32_t step, entry;
};
struct hv_replay {
    uint32_t step, refusals;                 /* the step that was done last */
    struct hv_refused refused[HV_REFUSALS];  /* MSRs that kept another value, or the same */
    uint32_t exact;                          /* the TSCs go on together with the clock */
    uint64_t now_clock, now_tsc;             /* private: when the clock was set */
};

int hv_replay(const struct hv_step *steps, uint32_t count, struct hv_replay *replay);

#endif
