/* The least that boots Linux on KVM: an ELF vmlinux by its 64-bit entry, in-kernel interrupt controllers and PIT, and a
 * UART of which nothing but its registers is there. What hv's boot time is measured against.
 *
 * usage: minimal-vmm VMLINUX INITRD COMMAND-LINE RAM-MIB ACPI-TABLES
 *
 * ACPI-TABLES is a file with the tables that hv gives its guests, for address 0xe0000: a kernel without them falls back
 * to the 8259 and xAPIC, which makes every timer tick dearer.
 * A write to port 0xf4 ends the run; a reset by the keyboard controller ends it as a failure. What the guest prints goes
 * to stderr. Prints the microseconds from the first KVM_RUN to the end, and the exits. Linked statically, so that it
 * runs anywhere.
 */
#include <elf.h>
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

#define GDT 0x500u
#define ZERO_PAGE 0x7000u
#define PAGE_TABLES 0x9000u /* PML4, PDPT, four page directories */
#define COMMAND_LINE 0x20000u
#define LOW_END 0x9fc00u
#define ACPI_TABLES 0xe0000u
#define HIGH_MEMORY 0x100000u
#define HUGE (2u << 20)
#define COM1 0x3f8
#define PM1_STATUS 0x600
#define PM1_CONTROL 0x604
#define PM1_SCI_ENABLED 1
#define PM_TIMER 0x608
#define PM_TIMER_HZ 3579545u
#define DEBUG_EXIT 0xf4
#define CMOS_DATA 0x71
#define I8042_COMMAND 0x64
#define I8042_RESET 0xfe
#define MAX_CPUID 256
/* CPUID 1 ECX, which KVM leaves to the VMM: a kernel looks for KVM's clock only with the one; without the other it
 * calibrates its timer against the PIT. */
#define HYPERVISOR (1u << 31)
#define TSC_DEADLINE (1u << 24)
#define LAPIC_LINT0 0x350
#define DELIVER_EXTINT 0x700

static uint8_t *ram;
static uint64_t ram_size;

static int control(int fd, unsigned long request, void *argument, const char *name)
{
    int result = ioctl(fd, request, argument);
    if (result < 0)
        err(3, "%s", name);
    return result;
}

static uint64_t now_us(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (uint64_t)time.tv_sec * 1000000u + (uint64_t)time.tv_nsec / 1000u;
}

/* KVM maps huge pages only where guest and host addresses agree below 2 MiB. */
static uint8_t *map_ram(void)
{
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    uint8_t *at = mmap(NULL, ram_size + HUGE, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (at == MAP_FAILED)
        err(3, "mmap");
    at = (uint8_t *)(((uintptr_t)at + HUGE - 1) & ~(uintptr_t)(HUGE - 1));
    madvise(at, ram_size, MADV_HUGEPAGE);
    return at;
}

static const uint8_t *map_file(const char *path, uint64_t *size)
{
    struct stat status;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &status) < 0)
        err(2, "%s", path);
    *size = (uint64_t)status.st_size;
    const uint8_t *data = mmap(NULL, *size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (data == MAP_FAILED)
        err(2, "%s", path);
    close(fd);
    return data;
}

static void put(uint64_t gpa, const void *data, uint64_t size)
{
    if (gpa > ram_size || size > ram_size - gpa)
        errx(2, "%#llx does not fit into RAM", (unsigned long long)gpa);
    memcpy(ram + gpa, data, size);
}

static void put_number(uint64_t gpa, uint64_t value, unsigned size)
{
    put(gpa, &value, size);
}

static uint64_t load_kernel(const char *path)
{
    uint64_t size;
    const uint8_t *file = map_file(path, &size);
    const Elf64_Ehdr *elf = (const Elf64_Ehdr *)file;
    if (size < sizeof *elf || memcmp(elf->e_ident, ELFMAG, SELFMAG) || elf->e_machine != EM_X86_64)
        errx(2, "%s is no x86-64 ELF file", path);
    const Elf64_Phdr *program = (const Elf64_Phdr *)(file + elf->e_phoff);
    for (unsigned i = 0; i < elf->e_phnum; i++)
        if (program[i].p_type == PT_LOAD)
            put(program[i].p_paddr, file + program[i].p_offset, program[i].p_filesz);
    return elf->e_entry;
}

static void put_range(unsigned index, uint64_t from, uint64_t to)
{
    uint64_t entry = ZERO_PAGE + 0x2d0 + 20 * index;
    put_number(entry, from, 8);
    put_number(entry + 8, to - from, 8);
    put_number(entry + 16, 1, 4);
    put_number(ZERO_PAGE + 0x1e8, index + 1, 1);
}

/* The zero page of the Linux boot protocol, as "Details of Header Fields" in Documentation/arch/x86/boot.rst has it. */
static void put_zero_page(const char *initrd_path, const char *command_line)
{
    uint64_t size;
    const uint8_t *initrd = map_file(initrd_path, &size);
    uint64_t initrd_at = (ram_size - size) & ~0xfffull;
    put(initrd_at, initrd, size);
    put(COMMAND_LINE, command_line, strlen(command_line) + 1);
    put_number(ZERO_PAGE + 0x1fe, 0xaa55, 2);
    put_number(ZERO_PAGE + 0x202, 0x53726448, 4); /* "HdrS" */
    put_number(ZERO_PAGE + 0x206, 0x020c, 2);
    put_number(ZERO_PAGE + 0x210, 0xff, 1);
    put_number(ZERO_PAGE + 0x211, 1, 1);
    put_number(ZERO_PAGE + 0x218, initrd_at, 4);
    put_number(ZERO_PAGE + 0x21c, size, 4);
    put_number(ZERO_PAGE + 0x228, COMMAND_LINE, 4);
    put_number(ZERO_PAGE + 0x230, 0x200000, 4);
    put_number(ZERO_PAGE + 0x238, 2047, 4);
    put_range(0, 0, LOW_END);
    put_range(1, HIGH_MEMORY, ram_size);
}

/* The first 4 GiB mapped one to one, and a GDT with the two segments that the protocol asks for. */
static void put_tables(void)
{
    put_number(PAGE_TABLES, (PAGE_TABLES + 0x1000) | 3, 8);
    for (uint64_t i = 0; i < 4; i++)
        put_number(PAGE_TABLES + 0x1000 + 8 * i, (PAGE_TABLES + 0x2000 + 0x1000 * i) | 3, 8);
    for (uint64_t i = 0; i < 2048; i++)
        put_number(PAGE_TABLES + 0x2000 + 8 * i, i << 21 | 0x83, 8);
    put_number(GDT + 0x10, 0x00af9b000000ffffull, 8);
    put_number(GDT + 0x18, 0x00cf93000000ffffull, 8);
}

static int make_vm(int kvm)
{
    struct kvm_pit_config pit = { .flags = KVM_PIT_SPEAKER_DUMMY };
    uint64_t identity_map = 0xfffbc000;
    int vm = control(kvm, KVM_CREATE_VM, NULL, "KVM_CREATE_VM");
    ioctl(vm, KVM_SET_TSS_ADDR, 0xfffbd000);
    ioctl(vm, KVM_SET_IDENTITY_MAP_ADDR, &identity_map);
    control(vm, KVM_CREATE_IRQCHIP, NULL, "KVM_CREATE_IRQCHIP");
    control(vm, KVM_CREATE_PIT2, &pit, "KVM_CREATE_PIT2");
    struct kvm_userspace_memory_region region = { .memory_size = ram_size, .userspace_addr = (uintptr_t)ram };
    control(vm, KVM_SET_USER_MEMORY_REGION, &region, "KVM_SET_USER_MEMORY_REGION");
    return vm;
}

static void set_cpuid(int kvm, int vcpu)
{
    struct kvm_cpuid2 *table = calloc(1, sizeof *table + MAX_CPUID * sizeof table->entries[0]);
    if (!table)
        err(3, "calloc");
    table->nent = MAX_CPUID;
    control(kvm, KVM_GET_SUPPORTED_CPUID, table, "KVM_GET_SUPPORTED_CPUID");
    for (uint32_t i = 0; i < table->nent; i++)
        if (table->entries[i].function == 1)
            table->entries[i].ecx |= HYPERVISOR | TSC_DEADLINE;
    control(vcpu, KVM_SET_CPUID2, table, "KVM_SET_CPUID2");
    free(table);
}

/* The PIC's interrupts reach the CPU through its local APIC, as firmware leaves it. */
static void set_virtual_wire(int vcpu)
{
    struct kvm_lapic_state lapic;
    uint32_t entry = DELIVER_EXTINT;
    control(vcpu, KVM_GET_LAPIC, &lapic, "KVM_GET_LAPIC");
    memcpy(lapic.regs + LAPIC_LINT0, &entry, sizeof entry);
    control(vcpu, KVM_SET_LAPIC, &lapic, "KVM_SET_LAPIC");
}

static void set_long_mode(int vcpu, uint64_t entry)
{
    struct kvm_segment data = { .limit = 0xffffffff, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1 };
    struct kvm_segment code = { .limit = 0xffffffff, .selector = 0x10, .type = 11, .present = 1, .l = 1, .s = 1, .g = 1 };
    struct kvm_regs regs = { .rip = entry, .rsi = ZERO_PAGE, .rsp = 0x8ff0, .rflags = 2 };
    struct kvm_sregs sregs;
    control(vcpu, KVM_GET_SREGS, &sregs, "KVM_GET_SREGS");
    sregs.cs = code;
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 0x1f;
    sregs.cr3 = PAGE_TABLES;
    sregs.cr4 = 0x20;        /* PAE */
    sregs.cr0 = 0x80000011u; /* paging, extension type, protection */
    sregs.efer = 0x500;      /* long mode enabled and active */
    control(vcpu, KVM_SET_SREGS, &sregs, "KVM_SET_SREGS");
    control(vcpu, KVM_SET_REGS, &regs, "KVM_SET_REGS");
}

/* Registers that read back as written are enough for a driver to find a 16550A; it never has input nor interrupts. */
static void answer_uart(unsigned reg, int out, uint8_t *value)
{
    static uint8_t file[8];
    if (out) {
        if (reg == 0 && !(file[3] & 0x80))
            fputc(*value, stderr);
        else
            file[reg] = *value;
    } else if (reg == 0)
        *value = 0;
    else if (reg == 2)
        *value = file[2] & 1 ? 0xc1 : 0x01;
    else if (reg == 5)
        *value = 0x60;
    else if (reg == 6)
        *value = 0xb0;
    else
        *value = file[reg];
}

/* ACPI's fixed registers: none of their events ever happens. */
static void answer_pm(uint16_t port, int out, uint8_t *data, unsigned size)
{
    static uint8_t file[8] = { [PM1_CONTROL - PM1_STATUS] = PM1_SCI_ENABLED };
    unsigned at = port - PM1_STATUS;
    uint32_t ticks = (uint32_t)(now_us() * PM_TIMER_HZ / 1000000u);
    if (port >= PM_TIMER)
        memcpy(data, &ticks, size < 4 ? size : 4);
    else if (at + size > sizeof file)
        memset(data, 0xff, size);
    else if (!out)
        memcpy(data, file + at, size);
    else if (at >= 2) { /* the status stays clear */
        memcpy(file + at, data, size);
        file[PM1_CONTROL - PM1_STATUS] |= PM1_SCI_ENABLED;
    }
}

/* Answer one port exit; return whether the run is over. */
static int answer_port(struct kvm_run *run)
{
    uint8_t *data = (uint8_t *)run + run->io.data_offset;
    int out = run->io.direction == KVM_EXIT_IO_OUT;
    uint16_t port = run->io.port;
    if (out && port == I8042_COMMAND && *data == I8042_RESET)
        errx(4, "the guest reset itself");
    if (out && port == DEBUG_EXIT)
        return 1;
    for (uint32_t i = 0; i < run->io.count; i++, data += run->io.size) {
        if (port >= COM1 && port < COM1 + 8)
            answer_uart(port - COM1, out, data);
        else if (port >= PM1_STATUS && port < PM_TIMER + 4)
            answer_pm(port, out, data, run->io.size);
        else if (!out)
            memset(data, port == CMOS_DATA ? 0 : 0xff, run->io.size);
    }
    return 0;
}

int main(int count, char **arguments)
{
    if (count != 6)
        errx(2, "usage: minimal-vmm VMLINUX INITRD COMMAND-LINE RAM-MIB ACPI-TABLES");
    ram_size = strtoull(arguments[4], NULL, 0) << 20;
    ram = map_ram();
    uint64_t entry = load_kernel(arguments[1]);
    put_zero_page(arguments[2], arguments[3]);
    uint64_t tables_size;
    const uint8_t *tables = map_file(arguments[5], &tables_size);
    put(ACPI_TABLES, tables, tables_size);
    put_tables();
    int kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
    if (kvm < 0)
        err(3, "/dev/kvm");
    int vm = make_vm(kvm);
    int vcpu = control(vm, KVM_CREATE_VCPU, 0, "KVM_CREATE_VCPU");
    size_t size = (size_t)control(kvm, KVM_GET_VCPU_MMAP_SIZE, NULL, "KVM_GET_VCPU_MMAP_SIZE");
    struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);
    if (run == MAP_FAILED)
        err(3, "mmap of kvm_run");
    set_cpuid(kvm, vcpu);
    set_virtual_wire(vcpu);
    set_long_mode(vcpu, entry);
    uint64_t exits = 0, started = now_us();
    for (int over = 0; !over; exits++) {
        control(vcpu, KVM_RUN, NULL, "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO)
            over = answer_port(run);
        else if (run->exit_reason == KVM_EXIT_MMIO) {
            if (!run->mmio.is_write)
                memset(run->mmio.data, 0xff, sizeof run->mmio.data);
        } else
            errx(4, "exit reason %u", run->exit_reason);
    }
    printf("%llu %llu\n", (unsigned long long)(now_us() - started), (unsigned long long)exits);
    return 0;
}
