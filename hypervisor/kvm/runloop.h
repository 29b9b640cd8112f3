/* The run loop: enters the guest, answers what needs no device model, and returns to Python for the rest. */
#ifndef HV_RUNLOOP_H
#define HV_RUNLOOP_H

#include "recorder.h"

#include <linux/kvm.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* What hv_vcpu_run returns, in bits 0-7. Port accesses: size in bits 8-15, port in 16-31, value in 32-63.
 * Memory accesses: size in bits 8-15; the address and the value are in struct hv_vcpu. HV_EXIT: the exit reason in
 * bits 8-31. HV_FAILED: errno in bits 8-31. */
#define HV_PIO_IN 1
#define HV_PIO_OUT 2
#define HV_MMIO_READ 3
#define HV_MMIO_WRITE 4
#define HV_EXIT 5
#define HV_INTERRUPTED 6
#define HV_FAILED 7

/* What a port does, in hv_bus.pio_in and hv_bus.pio_out. Zero is an unclaimed port. */
#define HV_PYTHON 1
#define HV_SHADOW 2 /* reads only: hv_bus.shadow answers one-byte reads */
#define HV_RING0 16 /* writes only: one-byte writes go to ring (kind - HV_RING0) */
#define HV_RINGS 16

#define HV_WINDOWS 256
#define HV_EXIT_WORDS 18 /* facts of an exit that ends the run: see hv_vcpu_run */

struct hv_ring; /* a bounded byte queue: any number of writers, one reader */

struct hv_window {
    uint64_t base, end; /* guest-physical, end exclusive */
};

struct hv_bus {
    uint8_t pio_in[65536], pio_out[65536], shadow[65536];
    uint32_t windows;
    struct hv_window window[HV_WINDOWS]; /* sorted by base */
    struct hv_ring *rings[HV_RINGS];
};

struct hv_vcpu {
    uint64_t address, value;            /* of the memory access that was returned */
    uint64_t exit_words[HV_EXIT_WORDS]; /* of the HV_EXIT that was returned */
    struct hv_recorder recorder;
    /* private */
    struct kvm_run *run;
    struct hv_bus *bus;
    size_t run_size;
    int fd, reason;
    uint32_t element, awaited; /* of a string instruction: the next element; whether Python owes an answer */
    _Atomic int tid;
};

/* An entry of the table of interrupt routes: kind KVM_IRQ_ROUTING_IRQCHIP takes chip and pin, _MSI address and data. */
struct hv_route {
    uint32_t gsi, kind, chip, pin;
    uint64_t address;
    uint32_t data;
};

int hv_set_routes(int vm, const struct hv_route *routes, uint32_t count);
int hv_ioctl(int fd, unsigned long request, void *argument);
int hv_ioctl_value(int fd, unsigned long request, unsigned long value);
struct hv_ring *hv_ring_new(uint32_t capacity, int event_fd);
void hv_ring_free(struct hv_ring *ring);
uint32_t hv_ring_push(struct hv_ring *ring, const uint8_t *data, uint32_t size);
uint32_t hv_ring_drain(struct hv_ring *ring, uint8_t *data, uint32_t size);
void hv_ring_arm(struct hv_ring *ring);
struct hv_bus *hv_bus_new(void);
void hv_bus_free(struct hv_bus *bus);
void hv_bus_set_ring(struct hv_bus *bus, uint32_t index, struct hv_ring *ring);
void hv_bus_publish(struct hv_bus *bus, uint16_t port, int value);
void hv_bus_divert(struct hv_bus *bus, uint16_t port, int kind);
struct hv_vcpu *hv_vcpu_new(int fd, size_t run_size, struct hv_bus *bus);
void hv_vcpu_free(struct hv_vcpu *vcpu);
uint64_t hv_vcpu_run(struct hv_vcpu *vcpu, uint64_t reply);
void hv_vcpu_kick(struct hv_vcpu *vcpu);
void hv_thread_enter(struct hv_vcpu *vcpu);
void hv_thread_leave(struct hv_vcpu *vcpu);

#endif
