/* The least that a VMM can do for an exit: KVM_RUN in a loop, ports answered with nothing. What hv's exits are measured
 * against.
 *
 * usage: minimal-loop GUEST MARK END [IRQCHIP]
 *
 * GUEST is a flat binary, loaded at 1 MiB and entered there in 32-bit protected mode. Writes to port MARK bracket what
 * is timed; a write to port END, or HLT, ends the run. IRQCHIP 1 gives the machine KVM's interrupt controllers and PIT,
 * as hv's has them. Prints the nanoseconds between the last two marks and the exits between them.
 */
#include <err.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define RAM_SIZE (2u << 20)
#define LOAD 0x100000u

static int control(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(3, "%s", name);
    return result;
}

static uint64_t now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

static void load(const char *path, uint8_t *to, size_t room)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        err(2, "%s", path);
    ssize_t size = read(fd, to, room);
    if (size <= 0)
        err(2, "%s", path);
    close(fd);
}

static int make_vm(int kvm, uint8_t *ram, int irqchip)
{
    int vm = control(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    if (irqchip) {
        struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
        ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
        control(vm, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
        control(vm, KVM_CREATE_PIT2, &pit, "KVM_CREATE_PIT2");
    }
    struct kvm_userspace_memory_region region = { .memory_size = RAM_SIZE, .userspace_addr = (uintptr_t)ram };
    control(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    return vm;
}

static void set_protected_mode(int vcpu)
{
    struct kvm_segment data = { .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
    struct kvm_segment code = data;
    struct kvm_sregs sregs;
    struct kvm_regs regs = { .rip = LOAD, .rsp = 0x8000, .rflags = 2 };
    control(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    code.selector = 8;
    code.type = 11;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 |= 1;
    control(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
    control(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

int main(int count, char **arguments)
{
    if (count < 4)
        errx(2, "usage: minimal-loop GUEST MARK END [IRQCHIP]");
    unsigned mark = (unsigned)strtoul(arguments[2], NULL, 0), end = (unsigned)strtoul(arguments[3], NULL, 0);
    uint8_t *ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (ram == MAP_FAILED)
        err(3, "mmap");
    load(arguments[1], ram + LOAD, RAM_SIZE - LOAD);
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(3, "/dev/kvm");
    int vm = make_vm(kvm, ram, count > 4 && atoi(arguments[4]));
    int vcpu = control(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
    size_t size = (size_t)control(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(3, "mmap of kvm_run");
    set_protected_mode(vcpu);
    uint64_t exits = 0, marked_exits = 0, marked_at = 0, taken = 0, exits_taken = 0;
    for (;;) {
        control(vcpu, KVM_RUN, NULL, "KVM_RUN");
        exits++;
        if (run->exit_reason == KVM_EXIT_HLT)
            break;
        if (run->exit_reason != KVM_EXIT_IO)
            errx(4, "exit reason %u", run->exit_reason);
        if (run->io.port == end)
            break;
        if (run->io.port == mark) {
            uint64_t at = now();
            taken = at - marked_at;
            exits_taken = exits - marked_exits - 1;
            marked_at = at;
            marked_exits = exits;
        }
    }
    printf("%llu %llu\n", (unsigned long long)taken, (unsigned long long)exits_taken);
    return 0;
}
