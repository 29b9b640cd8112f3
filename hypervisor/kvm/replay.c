/* See replay.h. */
#include "replay.h"

#include <errno.h>
#include <linux/kvm.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <time.h>

enum { KHZ_NS = 1000000, PIT_CHANNELS = 3 }; /* ticks are ns * kHz / 10^6 */

static int control(int fd, uint64_t request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

static int64_t floored(__int128 value, int64_t by)
{
    __int128 result = value / by;
    return (int64_t)(result - (value % by < 0));
}

static int set_clock(const struct hv_step *step, struct hv_replay *replay)
{
    struct kvm_clock_data now;
    int result = control(step->fd, KVM_SET_CLOCK, step->argument);
    memset(&now, 0, sizeof now);
    if (!result)
        result = control(step->fd, KVM_GET_CLOCK, &now);
    replay->now_clock = now.clock;
    replay->now_tsc = now.flags & KVM_CLOCK_HOST_TSC ? now.host_tsc : 0;
    return result;
}

/* Set MSRs in order, also those behind one that is refused. */
static int set_msrs(const struct hv_step *step, struct hv_replay *replay, uint32_t number)
{
    struct kvm_msrs *table = step->argument, *rest = NULL;
    uint32_t done = 0;
    for (;;) {
        int result = control(step->fd, KVM_SET_MSRS, rest ? rest : table);
        if (result < 0 || done + (uint32_t)result >= table->nmsrs) {
            free(rest);
            return result < 0 ? result : 0;
        }
        done += (uint32_t)result;
        if (replay->refusals < HV_REFUSALS) {
            replay->refused[replay->refusals].step = number;
            replay->refused[replay->refusals++].entry = done;
        }
        if (++done == table->nmsrs) {
            free(rest);
            return 0;
        }
        if (!rest && !(rest = malloc(sizeof *table + table->nmsrs * sizeof table->entries[0])))
            return -ENOMEM;
        rest->nmsrs = table->nmsrs - done;
        rest->pad = 0;
        memcpy(rest->entries, table->entries + done, rest->nmsrs * sizeof table->entries[0]);
    }
}

static int set_tsc(const struct hv_step *step, struct hv_replay *replay)
{
    if (!step->khz || !replay->now_tsc) {
        replay->exact = 0;
        return control(step->fd, KVM_SET_MSRS, step->spare);
    }
    int64_t passed = floored((__int128)(int64_t)(replay->now_clock - step->guest_ns) * (int64_t)step->khz, KHZ_NS);
    uint64_t offset = step->sum + (uint64_t)passed - replay->now_tsc;
    struct kvm_device_attr attribute = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)&offset };
    return control(step->fd, KVM_SET_DEVICE_ATTR, &attribute);
}

static int set_pit(const struct hv_step *step)
{
    struct kvm_pit_state2 pit = *(const struct kvm_pit_state2 *)step->argument;
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    for (int i = 0; i < PIT_CHANNELS; i++)
        pit.channels[i].count_load_time = now.tv_sec * 1000000000ll + now.tv_nsec - pit.channels[i].count_load_time;
    return control(step->fd, KVM_SET_PIT2, &pit);
}

static int set_nested(const struct hv_step *step)
{
    struct kvm_nested_state *present = step->spare;
    present->size = (uint32_t)step->size;
    int result = control(step->fd, KVM_GET_NESTED_STATE, present);
    if (result < 0)
        return result;
    const struct kvm_nested_state *wanted = step->argument;
    if (present->size == wanted->size && !memcmp(present, wanted, wanted->size))
        return 0;
    return control(step->fd, KVM_SET_NESTED_STATE, step->argument);
}

/* Do all of them in order. Returns 0, or the negative errno of step replay->step, behind which nothing is done. */
int hv_replay(const struct hv_step *steps, uint32_t count, struct hv_replay *replay)
{
    int result = 0;
    replay->refusals = 0;
    replay->exact = 1;
    for (uint32_t i = 0; i < count && result >= 0; i++) {
        const struct hv_step *step = &steps[i];
        replay->step = i;
        switch (step->kind) {
        case HV_STEP_VALUE:
            result = ioctl(step->fd, step->request, 0) && errno != EINVAL ? -errno : 0;
            break;
        case HV_STEP_MSRS:
            result = set_msrs(step, replay, i);
            break;
        case HV_STEP_CLOCK:
            result = set_clock(step, replay);
            break;
        case HV_STEP_TSC:
            result = set_tsc(step, replay);
            break;
        case HV_STEP_PIT:
            result = set_pit(step);
            break;
        case HV_STEP_NESTED:
            result = set_nested(step);
            break;
        default:
            result = control(step->fd, step->request, step->argument);
        }
    }
    return result < 0 ? result : 0;
}
