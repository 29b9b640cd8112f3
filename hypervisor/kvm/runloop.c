/* See runloop.h. Everything here runs without the GIL. */
#define _GNU_SOURCE
#include "runloop.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <x86intrin.h>

#define KICK_SIGNAL (SIGRTMIN + 5)

int hv_ioctl(int fd, unsigned long request, void *argument)
{
    int result = ioctl(fd, request, argument);
    return result < 0 ? -errno : result;
}

int hv_ioctl_value(int fd, unsigned long request, unsigned long value)
{
    int result = ioctl(fd, request, value);
    return result < 0 ? -errno : result;
}

/* Replace the VM's whole table of interrupt routes: the kernel's structure has a union that cffi cannot express. */
int hv_set_routes(int vm, const struct hv_route *routes, uint32_t count)
{
    struct kvm_irq_routing *table = calloc(1, sizeof *table + count * sizeof table->entries[0]);
    if (!table)
        return -ENOMEM;
    table->nr = count;
    for (uint32_t i = 0; i < count; i++) {
        struct kvm_irq_routing_entry *entry = &table->entries[i];
        entry->gsi = routes[i].gsi;
        entry->type = routes[i].kind;
        if (routes[i].kind == KVM_IRQ_ROUTING_MSI) {
            entry->u.msi.address_lo = (uint32_t)routes[i].address;
            entry->u.msi.address_hi = (uint32_t)(routes[i].address >> 32);
            entry->u.msi.data = routes[i].data;
        } else {
            entry->u.irqchip.irqchip = routes[i].chip;
            entry->u.irqchip.pin = routes[i].pin;
        }
    }
    int result = hv_ioctl(vm, KVM_SET_GSI_ROUTING, table);
    free(table);
    return result;
}

/* --- rings ------------------------------------------------------------------------------------------------------ */

struct hv_ring {
    _Atomic int lock;  /* writers are vCPUs and the device model; the section is a memcpy of at most 4 KiB */
    _Atomic int armed; /* the reader sleeps: the next byte wakes it */
    int event_fd;
    uint32_t capacity; /* a power of two */
    _Atomic uint64_t head, tail;
    uint8_t data[];
};

struct hv_ring *hv_ring_new(uint32_t capacity, int event_fd)
{
    struct hv_ring *ring = calloc(1, sizeof *ring + capacity);
    if (ring) {
        ring->capacity = capacity;
        ring->event_fd = event_fd;
        ring->armed = 1;
    }
    return ring;
}

void hv_ring_free(struct hv_ring *ring)
{
    free(ring);
}

static void ring_wake(struct hv_ring *ring)
{
    uint64_t one = 1;
    ssize_t written = write(ring->event_fd, &one, sizeof one);
    (void)written; /* EAGAIN means that the reader is about to wake anyway */
}

/* Append as much as fits and return it. The reader is woken by the first byte it has not been told of, and again when
 * the ring fills up while it rests between two drains. */
uint32_t hv_ring_push(struct hv_ring *ring, const uint8_t *data, uint32_t size)
{
    while (atomic_exchange_explicit(&ring->lock, 1, memory_order_acquire))
        sched_yield();
    uint64_t tail = atomic_load_explicit(&ring->tail, memory_order_relaxed);
    uint32_t used = (uint32_t)(tail - atomic_load_explicit(&ring->head, memory_order_acquire));
    uint32_t room = ring->capacity - used;
    if (size > room)
        size = room;
    uint32_t at = (uint32_t)tail & (ring->capacity - 1);
    uint32_t first = ring->capacity - at < size ? ring->capacity - at : size;
    memcpy(ring->data + at, data, first);
    memcpy(ring->data, data + first, size - first);
    atomic_store(&ring->tail, tail + size);
    int crossed_half = used < ring->capacity / 2 && used + size >= ring->capacity / 2;
    atomic_store_explicit(&ring->lock, 0, memory_order_release);
    if (crossed_half || (atomic_load(&ring->armed) && atomic_exchange(&ring->armed, 0)))
        ring_wake(ring);
    return size;
}

uint32_t hv_ring_drain(struct hv_ring *ring, uint8_t *data, uint32_t size)
{
    uint64_t head = atomic_load_explicit(&ring->head, memory_order_relaxed);
    uint32_t used = (uint32_t)(atomic_load(&ring->tail) - head);
    if (size > used)
        size = used;
    uint32_t at = (uint32_t)head & (ring->capacity - 1);
    uint32_t first = ring->capacity - at < size ? ring->capacity - at : size;
    memcpy(data, ring->data + at, first);
    memcpy(data + first, ring->data, size - first);
    atomic_store_explicit(&ring->head, head + size, memory_order_release);
    return size;
}

/* Ask to be woken by the next byte. A byte that is there already wakes at once. */
void hv_ring_arm(struct hv_ring *ring)
{
    atomic_store(&ring->armed, 1);
    if (atomic_load(&ring->tail) != atomic_load(&ring->head) && atomic_exchange(&ring->armed, 0))
        ring_wake(ring);
}

/* --- bus --------------------------------------------------------------------------------------------------------- */

struct hv_bus *hv_bus_new(void)
{
    return calloc(1, sizeof(struct hv_bus));
}

void hv_bus_free(struct hv_bus *bus)
{
    free(bus);
}

void hv_bus_set_ring(struct hv_bus *bus, uint32_t index, struct hv_ring *ring)
{
    if (index < HV_RINGS)
        bus->rings[index] = ring;
}

/* One-byte reads of `port` give `value`; a negative one sends them to Python again. */
void hv_bus_publish(struct hv_bus *bus, uint16_t port, int value)
{
    if (value >= 0)
        __atomic_store_n(&bus->shadow[port], (uint8_t)value, __ATOMIC_RELEASE);
    __atomic_store_n(&bus->pio_in[port], value >= 0 ? HV_SHADOW : HV_PYTHON, __ATOMIC_RELEASE);
}

void hv_bus_divert(struct hv_bus *bus, uint16_t port, int kind)
{
    __atomic_store_n(&bus->pio_out[port], (uint8_t)kind, __ATOMIC_RELEASE);
}

static int bus_has_window(const struct hv_bus *bus, uint64_t address)
{
    uint32_t low = 0, high = bus->windows;
    while (low < high) {
        uint32_t middle = (low + high) / 2;
        if (address < bus->window[middle].base)
            high = middle;
        else if (address >= bus->window[middle].end)
            low = middle + 1;
        else
            return 1;
    }
    return 0;
}

/* --- vCPUs ------------------------------------------------------------------------------------------------------- */

static void ignore_signal(int number)
{
    (void)number; /* its only work is to end a KVM_RUN with EINTR */
}

static void install_kick_signal(void)
{
    struct sigaction action = { .sa_handler = ignore_signal };
    sigemptyset(&action.sa_mask);
    sigaction(KICK_SIGNAL, &action, NULL);
}

struct hv_vcpu *hv_vcpu_new(int fd, size_t run_size, struct hv_bus *bus)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, install_kick_signal);
    struct hv_vcpu *vcpu = calloc(1, sizeof *vcpu);
    if (!vcpu)
        return NULL;
    vcpu->run = mmap(NULL, run_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (vcpu->run == MAP_FAILED || hv_recorder_init(&vcpu->recorder)) {
        if (vcpu->run != MAP_FAILED)
            munmap(vcpu->run, run_size);
        free(vcpu);
        return NULL;
    }
    vcpu->fd = fd;
    vcpu->run_size = run_size;
    vcpu->bus = bus;
    return vcpu;
}

void hv_vcpu_free(struct hv_vcpu *vcpu)
{
    munmap(vcpu->run, vcpu->run_size);
    hv_recorder_free(&vcpu->recorder);
    free(vcpu);
}

/* The calling thread is the vCPU's from now on: it takes the kick signal and no other, so that the process's own
 * signals reach the thread that waits for them. */
void hv_thread_enter(struct hv_vcpu *vcpu)
{
    sigset_t all_but_kick;
    sigfillset(&all_but_kick);
    sigdelset(&all_but_kick, KICK_SIGNAL);
    pthread_sigmask(SIG_SETMASK, &all_but_kick, NULL);
    atomic_store(&vcpu->tid, (int)syscall(SYS_gettid));
}

/* Its last exit leads nowhere: what was done for it ends here. */
void hv_thread_leave(struct hv_vcpu *vcpu)
{
    hv_record_entry(&vcpu->recorder, __rdtsc());
    atomic_store(&vcpu->tid, 0);
}

/* Make the vCPU leave the guest and return HV_INTERRUPTED. immediate_exit catches a signal that lands before KVM_RUN,
 * the signal one that lands inside it; the vCPU's own thread clears immediate_exit when it has seen the kick. */
void hv_vcpu_kick(struct hv_vcpu *vcpu)
{
    __atomic_store_n(&vcpu->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    int tid = atomic_load(&vcpu->tid);
    if (tid)
        syscall(SYS_tgkill, getpid(), tid, KICK_SIGNAL);
}

static uint64_t load(const void *from, uint32_t size)
{
    uint64_t value = 0;
    memcpy(&value, from, size);
    return value;
}

/* Go on with the elements of a port access from vcpu->element. Returns 0 when all are answered, else what Python is to
 * answer next: a read's answer comes with the next hv_vcpu_run, a write needs none. */
static uint64_t step_pio(struct hv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    struct hv_bus *bus = vcpu->bus;
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    uint32_t size = run->io.size, count = run->io.count;
    uint16_t port = run->io.port;
    uint64_t where = (uint64_t)size << 8 | (uint64_t)port << 16;
    if (run->io.direction == KVM_EXIT_IO_IN) {
        while (vcpu->element < count) {
            uint8_t *element = data + size * vcpu->element;
            uint8_t kind = __atomic_load_n(&bus->pio_in[port], __ATOMIC_ACQUIRE);
            if (kind == HV_PYTHON || (kind == HV_SHADOW && size != 1)) {
                vcpu->awaited = 1;
                return HV_PIO_IN | where;
            }
            if (kind == HV_SHADOW)
                *element = __atomic_load_n(&bus->shadow[port], __ATOMIC_ACQUIRE);
            else
                memset(element, 0xff, size);
            vcpu->element++;
            vcpu->recorder.answered_in_c++;
        }
        return 0;
    }
    while (vcpu->element < count) {
        uint8_t kind = __atomic_load_n(&bus->pio_out[port], __ATOMIC_ACQUIRE);
        if (kind >= HV_RING0 && size == 1) {
            uint32_t pushed = hv_ring_push(bus->rings[kind - HV_RING0], data + vcpu->element, count - vcpu->element);
            vcpu->element += pushed;
            vcpu->recorder.answered_in_c += pushed;
            if (vcpu->element == count)
                break;
            /* a full ring: this element takes the way through Python, which empties it */
        } else if (kind == 0) {
            vcpu->recorder.answered_in_c += count - vcpu->element;
            vcpu->element = count;
            break;
        }
        uint64_t value = load(data + size * vcpu->element, size);
        vcpu->element++;
        return HV_PIO_OUT | where | value << 32;
    }
    return 0;
}

static uint64_t step_mmio(struct hv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint32_t size = run->mmio.len;
    if (!bus_has_window(vcpu->bus, run->mmio.phys_addr)) {
        if (!run->mmio.is_write)
            memset(run->mmio.data, 0xff, sizeof run->mmio.data);
        vcpu->recorder.answered_in_c++;
        return 0;
    }
    vcpu->address = run->mmio.phys_addr;
    if (run->mmio.is_write) {
        vcpu->value = load(run->mmio.data, size);
        return HV_MMIO_WRITE | (uint64_t)size << 8;
    }
    vcpu->awaited = 1;
    return HV_MMIO_READ | (uint64_t)size << 8;
}

/* Put Python's answer where KVM looks for it. */
static void answer(struct hv_vcpu *vcpu, uint64_t reply)
{
    struct kvm_run *run = vcpu->run;
    vcpu->awaited = 0;
    if (vcpu->reason == KVM_EXIT_MMIO) {
        memcpy(run->mmio.data, &reply, sizeof reply);
        return;
    }
    memcpy((uint8_t *)run + run->io.data_offset + run->io.size * vcpu->element, &reply, run->io.size);
    vcpu->element++;
}

static void save_exit_words(struct hv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;
    uint64_t *words = vcpu->exit_words;
    memset(words, 0, sizeof vcpu->exit_words);
    switch (run->exit_reason) {
    case KVM_EXIT_UNKNOWN:
        words[0] = run->hw.hardware_exit_reason;
        break;
    case KVM_EXIT_FAIL_ENTRY:
        words[0] = run->fail_entry.hardware_entry_failure_reason;
        words[1] = run->fail_entry.cpu;
        break;
    case KVM_EXIT_INTERNAL_ERROR:
        words[0] = run->internal.suberror;
        words[1] = run->internal.ndata;
        memcpy(words + 2, run->internal.data, sizeof run->internal.data);
        break;
    case KVM_EXIT_SYSTEM_EVENT:
        words[0] = run->system_event.type;
        break;
    default:
        break;
    }
}

/* Have KVM leave RIP and CR3 in kvm_run at this entry's exit, if it is one to sample. */
static int wants_place(struct hv_vcpu *vcpu)
{
    struct hv_recorder *recorder = &vcpu->recorder;
    int wanted = recorder->every && !recorder->until_sample--;
    if (wanted)
        recorder->until_sample = recorder->every - 1;
    vcpu->run->kvm_valid_regs = wanted ? KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS : 0;
    return wanted;
}

/* Note the exit of which kvm_run tells, at `now` after `ran` ticks in the guest. */
static void note_exit(struct hv_vcpu *vcpu, uint64_t now, uint64_t ran, int has_place)
{
    struct kvm_run *run = vcpu->run;
    struct hv_record exit = { .tick = now, .operations = 1, .kind = HV_EXIT };
    exit.reason = vcpu->reason < UINT8_MAX ? (uint8_t)vcpu->reason : UINT8_MAX;
    if (vcpu->reason == KVM_EXIT_IO) {
        exit.kind = run->io.direction == KVM_EXIT_IO_IN ? HV_PIO_IN : HV_PIO_OUT;
        exit.size = run->io.size;
        exit.address = run->io.port;
        exit.operations = run->io.count;
    } else if (vcpu->reason == KVM_EXIT_MMIO) {
        exit.kind = run->mmio.is_write ? HV_MMIO_WRITE : HV_MMIO_READ;
        exit.size = (uint8_t)run->mmio.len;
        exit.address = run->mmio.phys_addr;
    }
    hv_record_exit(&vcpu->recorder, &exit, ran, vcpu->reason == KVM_EXIT_INTR);
    if (has_place)
        hv_record_place(&vcpu->recorder, run->s.regs.regs.rip, run->s.regs.sregs.cr3);
}

/* Run until Python is needed. `reply` answers the read that the last call returned; else it is ignored. */
uint64_t hv_vcpu_run(struct hv_vcpu *vcpu, uint64_t reply)
{
    struct kvm_run *run = vcpu->run;
    uint64_t wanted = 0;
    if (vcpu->awaited)
        answer(vcpu, reply);
    if (vcpu->reason == KVM_EXIT_IO && (wanted = step_pio(vcpu)))
        return wanted;
    for (;;) {
        int has_place = wants_place(vcpu);
        uint64_t entered_at = __rdtsc();
        hv_record_entry(&vcpu->recorder, entered_at);
        int result, error;
        do { /* EAGAIN: an AP that has just been sent INIT or SIPI; its wait for that counts as the guest's time */
            result = ioctl(vcpu->fd, KVM_RUN, NULL);
            error = errno;
        } while (result < 0 && error == EAGAIN);
        uint64_t now = __rdtsc();
        if (result < 0) {
            vcpu->reason = KVM_EXIT_INTR;
            if (error != EINTR)
                return HV_FAILED | (uint64_t)error << 8;
            note_exit(vcpu, now, now - entered_at, has_place);
            __atomic_store_n(&run->immediate_exit, 0, __ATOMIC_SEQ_CST);
            return HV_INTERRUPTED;
        }
        vcpu->reason = (int)run->exit_reason;
        note_exit(vcpu, now, now - entered_at, has_place);
        if (vcpu->reason == KVM_EXIT_IO) {
            vcpu->element = 0;
            wanted = step_pio(vcpu);
        } else if (vcpu->reason == KVM_EXIT_MMIO) {
            wanted = step_mmio(vcpu);
        } else {
            save_exit_words(vcpu);
            wanted = HV_EXIT | (uint64_t)(uint32_t)vcpu->reason << 8;
        }
        if (wanted)
            return wanted;
    }
}
