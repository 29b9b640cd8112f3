/* The least that a VMM can do to set a machine back: KVM_GET_DIRTY_LOG, memcpy, and the ioctls that set its KVM state, in one
 * thread. What hv's resets are measured against.
 *
 * usage: minimal-reset GUEST RAM-MIB CHECKPOINT DONE RESETS [FILE]
 *
 * GUEST is an ELF32 file, entered as multiboot says, without any information. At its first write to port CHECKPOINT the moment
 * is taken; at each write to port DONE, which must be of the value 1, the machine is set back. Has KVM's interrupt controllers
 * and PIT, and sets the same state as hv does. Prints the pages that were copied, and the medians of the nanoseconds of a
 * reset: the whole, the guest, the log and the copying, the state.
 *
 * With FILE memory is written there instead, and RESETS times a new VM is made over a private mapping of it, its state set, and
 * its guest run to port DONE. Prints the nanoseconds of each.
 */
#include <elf.h>
#include <err.h>
#include <errno.h>
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

#define MULTIBOOT_LOADER 0x2badb002
#define PAGE 4096u
#define HUGE (2u << 20)
#define MAX_CPUID 256
#define MAX_MSRS 512
#define CHIPS 3
#define MSR_TSC 0x10
#define MSR_TSC_DEADLINE 0x6e0
#define CONTROL(fd, request, argument) control(fd, request, argument, #request)

enum { WHOLE, GUEST, MEMORY, STATE, PARTS };

static uint8_t *ram, *base;
static uint64_t ram_size, *spent[PARTS];
static int kvm, vm, vcpu;
static struct kvm_run *run;
static uint64_t *bitmap;

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

/* --- the machine ------------------------------------------------------------------------------------------------- */

static uint8_t *map_memory(void)
{
    uint8_t *at = mmap(NULL, ram_size + HUGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (at == MAP_FAILED)
        err(3, "mmap");
    at = (uint8_t *)(((uintptr_t)at + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(at, ram_size, MADV_HUGEPAGE);
    return at;
}

static uint32_t load_guest(const char *path)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0)
        err(2, "%s", path);
    const uint8_t *file = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (file == MAP_FAILED)
        err(2, "%s", path);
    const Elf32_Ehdr *elf = (const Elf32_Ehdr *)file;
    if ((size_t)status.st_size < sizeof *elf || memcmp(elf->e_ident, ELFMAG, SELFMAG) || elf->e_machine != EM_386)
        errx(2, "%s is no ELF32 file", path);
    const Elf32_Phdr *program = (const Elf32_Phdr *)(file + elf->e_phoff);
    for (unsigned i = 0; i < elf->e_phnum; i++)
        if (program[i].p_type == PT_LOAD)
            memcpy(ram + program[i].p_paddr, file + program[i].p_offset, program[i].p_filesz);
    return elf->e_entry;
}

static void make_vm(void)
{
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    struct kvm_userspace_memory_region region = { .memory_size = ram_size, .userspace_addr = (uintptr_t)ram };
    kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(3, "/dev/kvm");
    vm = CONTROL(kvm, KVM_CREATE_VM, NULL);
    ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
    CONTROL(vm, KVM_SET_USER_MEMORY_REGION, &region);
    CONTROL(vm, KVM_CREATE_IRQCHIP, NULL);
    CONTROL(vm, KVM_CREATE_PIT2, &pit);
    vcpu = CONTROL(vm, KVM_CREATE_VCPU, NULL);
    size_t size = (size_t)CONTROL(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL);
    run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(3, "mmap of kvm_run");
    struct kvm_cpuid2 *cpuid = calloc(1, sizeof *cpuid + MAX_CPUID * sizeof cpuid->entries[0]);
    cpuid->nent = MAX_CPUID;
    CONTROL(kvm, KVM_GET_SUPPORTED_CPUID, cpuid);
    CONTROL(vcpu, KVM_SET_CPUID2, cpuid);
    free(cpuid);
}

static void enter_protected_mode(uint32_t entry)
{
    struct kvm_segment data = { .limit = 0xffffffff, .selector = 0x10, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
    struct kvm_segment code = data;
    struct kvm_sregs sregs;
    struct kvm_regs regs = { .rip = entry, .rax = MULTIBOOT_LOADER, .rflags = 2 };
    CONTROL(vcpu, KVM_GET_SREGS, &sregs);
    code.selector = 8;
    code.type = 11;
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.cr0 |= 1;
    CONTROL(vcpu, KVM_SET_SREGS, &sregs);
    CONTROL(vcpu, KVM_SET_REGS, &regs);
}

/* Run until the guest writes to `port`, and let it finish the instruction. */
static void run_until(unsigned port, int value)
{
    do {
        CONTROL(vcpu, KVM_RUN, NULL);
        if (run->exit_reason != KVM_EXIT_IO)
            errx(4, "exit reason %u", run->exit_reason);
    } while (run->io.port != port);
    if (value >= 0 && *((uint8_t *)run + run->io.data_offset) != value)
        errx(4, "the guest was not set back");
    run->immediate_exit = 1;
    if (ioctl(vcpu, KVM_RUN, NULL) >= 0 || errno != EINTR)
        errx(4, "KVM_RUN did not return at once");
    run->immediate_exit = 0;
}

/* --- its state ---------------------------------------------------------------------------------------------------- */

static struct {
    struct kvm_sregs2 sregs;
    struct kvm_xcrs xcrs;
    struct kvm_lapic_state lapic;
    struct kvm_debugregs debug;
    struct kvm_regs regs;
    struct kvm_mp_state mp;
    struct kvm_vcpu_events events;
    struct kvm_irqchip chip[CHIPS];
    struct kvm_pit_state2 pit;
    struct kvm_clock_data clock;
    struct kvm_msrs *msrs, *deadline;
    void *xsave;
    uint64_t tsc_offset, pit_at, khz;
} saved;

static struct kvm_msrs *msr_table(void)
{
    struct kvm_msrs *table = calloc(1, sizeof *table + MAX_MSRS * sizeof table->entries[0]);
    if (!table)
        err(3, "calloc");
    return table;
}

/* Read every MSR that KVM lists and that can be read, but for the TSC and its deadline, which are set by themselves. */
static void save_msrs(void)
{
    struct kvm_msr_list *list = calloc(1, sizeof *list + MAX_MSRS * sizeof list->indices[0]);
    struct kvm_msrs *one = msr_table();
    list->nmsrs = MAX_MSRS;
    CONTROL(kvm, KVM_GET_MSR_INDEX_LIST, list);
    saved.msrs = msr_table();
    saved.deadline = msr_table();
    for (unsigned i = 0; i < list->nmsrs; i++) {
        one->nmsrs = 1;
        one->entries[0].index = list->indices[i];
        if (list->indices[i] == MSR_TSC || CONTROL(vcpu, KVM_GET_MSRS, one) != 1)
            continue;
        struct kvm_msrs *table = list->indices[i] == MSR_TSC_DEADLINE ? saved.deadline : saved.msrs;
        table->entries[table->nmsrs++] = one->entries[0];
    }
    free(list);
    free(one);
}

static void tsc_offset(unsigned long request, uint64_t *offset)
{
    struct kvm_device_attr attribute = { .group = KVM_VCPU_TSC_CTRL, .attr = KVM_VCPU_TSC_OFFSET, .addr = (uintptr_t)offset };
    CONTROL(vcpu, request, &attribute);
}

static void save_state(void)
{
    saved.xsave = calloc(1, (size_t)CONTROL(vm, KVM_CHECK_EXTENSION, (void *)KVM_CAP_XSAVE2));
    saved.khz = (uint64_t)CONTROL(vcpu, KVM_GET_TSC_KHZ, NULL);
    CONTROL(vcpu, KVM_GET_MP_STATE, &saved.mp);
    CONTROL(vcpu, KVM_GET_LAPIC, &saved.lapic);
    save_msrs();
    CONTROL(vcpu, KVM_GET_REGS, &saved.regs);
    CONTROL(vcpu, KVM_GET_SREGS2, &saved.sregs);
    CONTROL(vcpu, KVM_GET_XSAVE2, saved.xsave);
    CONTROL(vcpu, KVM_GET_XCRS, &saved.xcrs);
    CONTROL(vcpu, KVM_GET_DEBUGREGS, &saved.debug);
    tsc_offset(KVM_GET_DEVICE_ATTR, &saved.tsc_offset);
    CONTROL(vcpu, KVM_GET_VCPU_EVENTS, &saved.events);
    for (unsigned i = 0; i < CHIPS; i++) {
        saved.chip[i].chip_id = i;
        CONTROL(vm, KVM_GET_IRQCHIP, &saved.chip[i]);
    }
    CONTROL(vm, KVM_GET_PIT2, &saved.pit);
    saved.pit_at = now();
    CONTROL(vm, KVM_GET_CLOCK, &saved.clock);
}

static void set_msrs(struct kvm_msrs *table)
{
    if (table->nmsrs && CONTROL(vcpu, KVM_SET_MSRS, table) != (int)table->nmsrs)
        errx(3, "KVM_SET_MSRS refuses an MSR");
}

static void load_state(void)
{
    struct kvm_clock_data clock = { .clock = saved.clock.clock }, present;
    CONTROL(vm, KVM_SET_CLOCK, &clock);
    CONTROL(vm, KVM_GET_CLOCK, &present);
    uint64_t passed = (present.clock - saved.clock.clock) * saved.khz / 1000000;
    uint64_t offset = saved.tsc_offset + saved.clock.host_tsc + passed - present.host_tsc;
    CONTROL(vcpu, KVM_SET_SREGS2, &saved.sregs);
    CONTROL(vcpu, KVM_SET_XCRS, &saved.xcrs);
    tsc_offset(KVM_SET_DEVICE_ATTR, &offset);
    set_msrs(saved.msrs);
    CONTROL(vcpu, KVM_SET_XSAVE, saved.xsave);
    CONTROL(vcpu, KVM_SET_LAPIC, &saved.lapic);
    set_msrs(saved.deadline);
    CONTROL(vcpu, KVM_SET_DEBUGREGS, &saved.debug);
    CONTROL(vcpu, KVM_SET_REGS, &saved.regs);
    CONTROL(vcpu, KVM_SET_MP_STATE, &saved.mp);
    CONTROL(vcpu, KVM_SET_VCPU_EVENTS, &saved.events);
    for (unsigned i = 0; i < CHIPS; i++)
        CONTROL(vm, KVM_SET_IRQCHIP, &saved.chip[i]);
    struct kvm_pit_state2 pit = saved.pit;
    for (unsigned i = 0; i < 3; i++)
        pit.channels[i].count_load_time += (int64_t)(now() - saved.pit_at);
    CONTROL(vm, KVM_SET_PIT2, &pit);
    ioctl(vcpu, KVM_KVMCLOCK_CTRL, 0); /* fails where the guest has no such clock */
}

/* --- the way back -------------------------------------------------------------------------------------------------- */

static void log_dirty(void)
{
    struct kvm_userspace_memory_region region = { .memory_size = ram_size, .userspace_addr = (uintptr_t)ram };
    region.flags = KVM_MEM_LOG_DIRTY_PAGES;
    CONTROL(vm, KVM_SET_USER_MEMORY_REGION, &region);
}

static void fetch_log(void)
{
    struct kvm_dirty_log log = { .dirty_bitmap = bitmap };
    CONTROL(vm, KVM_GET_DIRTY_LOG, &log);
}

static uint64_t copy_back(void)
{
    uint64_t copied = 0;
    for (uint64_t word = 0; word < ram_size / PAGE / 64; word++)
        for (uint64_t bits = bitmap[word]; bits; bits &= bits - 1) {
            uint64_t at = (word * 64 + (uint64_t)__builtin_ctzll(bits)) * PAGE;
            memcpy(ram + at, base + at, PAGE);
            copied++;
        }
    return copied;
}

static void restore(const char *path, unsigned done, unsigned long rounds)
{
    int file = open(path, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0 || ftruncate(file, (off_t)ram_size) < 0)
        err(3, "%s", path);
    for (uint64_t at = 0; at < ram_size; at += PAGE)
        if (memcmp(ram + at, base, PAGE) && pwrite(file, ram + at, PAGE, (off_t)at) != PAGE) /* base is all zeroes */
            err(3, "%s", path);
    for (unsigned long i = 0; i < rounds; i++) {
        uint64_t begin = now();
        ram = mmap(NULL, ram_size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, file, 0);
        if (ram == MAP_FAILED)
            err(3, "mmap");
        make_vm();
        load_state();
        run_until(done, 1);
        printf("%llu ", (unsigned long long)(now() - begin));
        close(vcpu);
        close(vm);
        close(kvm);
        munmap(ram, ram_size);
    }
    printf("\n");
}

static int compare(const void *one, const void *other)
{
    uint64_t a = *(const uint64_t *)one, b = *(const uint64_t *)other;
    return a < b ? -1 : a > b;
}

static uint64_t median(uint64_t *values, unsigned long count)
{
    qsort(values, count, sizeof *values, compare);
    return values[count / 2];
}

int main(int count, char **arguments)
{
    if (count != 6 && count != 7)
        errx(2, "usage: minimal-reset GUEST RAM-MIB CHECKPOINT DONE RESETS [FILE]");
    ram_size = strtoull(arguments[2], NULL, 0) << 20;
    unsigned checkpoint = (unsigned)strtoul(arguments[3], NULL, 0), done = (unsigned)strtoul(arguments[4], NULL, 0);
    unsigned long resets = strtoul(arguments[5], NULL, 0);
    ram = map_memory();
    base = map_memory();
    bitmap = calloc(ram_size / PAGE / 64, sizeof *bitmap);
    uint32_t entry = load_guest(arguments[1]);
    make_vm();
    enter_protected_mode(entry);
    run_until(checkpoint, -1);
    save_state();
    if (count == 7) {
        restore(arguments[6], done, resets);
        return 0;
    }
    log_dirty();
    memcpy(base, ram, ram_size);
    for (int part = 0; part < PARTS; part++)
        spent[part] = calloc(resets, sizeof *spent[part]);
    uint64_t copied = 0, back = 0;
    for (unsigned long i = 0; i <= resets; i++) { /* the first one warms up */
        if (!i)
            fetch_log();
        run_until(done, 1);
        uint64_t out = now();
        fetch_log();
        uint64_t pages = copy_back();
        uint64_t copied_at = now();
        load_state();
        uint64_t end = now();
        if (i) {
            spent[WHOLE][i - 1] = end - back;
            spent[GUEST][i - 1] = out - back;
            spent[MEMORY][i - 1] = copied_at - out;
            spent[STATE][i - 1] = end - copied_at;
            copied += pages;
        }
        back = end;
    }
    printf("%llu", (unsigned long long)copied);
    for (int part = 0; part < PARTS; part++)
        printf(" %llu", (unsigned long long)median(spent[part], resets));
    printf("\n");
    return 0;
}
