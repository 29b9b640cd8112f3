/* How the agent begins: as the first process of a guest, beside which it starts the guest's own; or on a descriptor.
 *
 * It needs sysfs (which port is it?) and procfs (which root file system has the guest's first process now?) before the
 * guest has mounted any, and keeps both by descriptors of mounts that are gone again: the guest does not see them. */
#include "agent.h"

#define MS_QUIET 15 /* MS_RDONLY | MS_NOSUID | MS_NODEV | MS_NOEXEC */
#define MNT_DETACH 2
#define MOST_MODULES 64
#define POLL_FAST 10000000  /* ns between looks for the port */
#define POLL_SLOW 200000000 /* after FAST_LOOKS of them */
#define FAST_LOOKS 1000
#define SA_RESTORER 0x04000000
#define PR_SET_NAME 15

static int proc = -1;   /* procfs, when the agent is a guest's */
static int sys = -1;    /* sysfs */
static int first = -1;  /* the root folder that the kernel started with */

/* --- the root that the guest sees ----------------------------------------------------------------------------------- */

/* Go where the guest's first process is: it may have left the initramfs for another root since. */
int enter_root(void)
{
    if (proc < 0)
        return 0;
    long root = call(openat, proc, "1/root", O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (root < 0)
        return (int)root;
    long error = call(fchdir, root);
    return (int)(error < 0 ? error : call(chroot, "."));
}

/* Mount a file system, keep a descriptor of it, and take the mount away again. */
static int see(const char *type, const char *folder, const char *usual)
{
    long error = call(mount, type, folder, type, MS_QUIET, 0);
    long fd = call(open, error < 0 ? usual : folder, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (error >= 0)
        call(umount2, folder, MNT_DETACH);
    return (int)fd;
}

/* --- the port ------------------------------------------------------------------------------------------------------- */

static int64_t device_number(const char *text)
{
    uint64_t parts[2] = {0, 0};
    int part = 0;
    for (; *text; text++) {
        if (*text == ':')
            part = 1;
        else
            parts[part] = parts[part] * 10 + (uint64_t)(*text - '0');
    }
    return (int64_t)(parts[0] << 8 | (parts[1] & 0xff) | (parts[1] & ~0xffull) << 12);
}

/* Open the port of this folder of sysfs if it is ours, by a node of our own: there may be no /dev yet. */
static long open_if_ours(int folder, const char *entry)
{
    const char *node = ".trapvisor-port";
    char path[512], text[64];
    path[0] = 0;
    append(path, sizeof path, entry);
    size_t end = length_of(path);
    append(path, sizeof path, "/name");
    if (read_small(folder, path, text, sizeof text) <= 0 || !same(text, PORT_NAME))
        return -ENOENT;
    path[end] = 0;
    append(path, sizeof path, "/dev");
    long length = read_small(folder, path, text, sizeof text);
    if (length <= 0)
        return length;
    call(unlinkat, first, node, 0);
    long error = call(mknodat, first, node, S_IFCHR | 0600, device_number(text));
    if (error < 0)
        return error;
    long fd = call(openat, first, node, O_RDWR | O_NONBLOCK | O_CLOEXEC);
    call(unlinkat, first, node, 0);
    return fd;
}

static long find_port(void)
{
    char entries[2048] __attribute__((aligned(8)));
    long found = -ENOENT;
    long folder = call(openat, sys, "class/virtio-ports", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder < 0)
        return folder;
    for (long size; found < 0 && (size = call(getdents64, folder, entries, sizeof entries)) > 0;)
        for (long at = 0; at < size && found < 0; at += *(uint16_t *)(entries + at + 16))
            if (entries[at + 19] != '.')
                found = open_if_ours((int)folder, entries + at + 19);
    call(close, folder);
    return found;
}

static long wait_for_port(void)
{
    for (int looks = 0;; looks++) {
        long fd = find_port();
        if (fd >= 0)
            return fd;
        struct moment pause = {0, looks < FAST_LOOKS ? POLL_FAST : POLL_SLOW};
        call(nanosleep, &pause, 0);
    }
}

/* --- beginning ------------------------------------------------------------------------------------------------------ */

static void nothing(int signal)
{
    (void)signal;
}

__attribute__((naked)) static void return_from_signal(void)
{
    __asm__("mov $15, %eax\n\tsyscall"); /* rt_sigreturn */
}

static void prepare_signals(void)
{
    struct action wake = {nothing, SA_RESTORER, return_from_signal, 0};
    struct action ignore = {(void (*)(int))1, 0, 0, 0};
    uint64_t child = 1ull << (SIG_CHLD - 1);
    call(rt_sigaction, SIG_CHLD, &wake, 0, sizeof child);
    call(rt_sigaction, SIG_PIPE, &ignore, 0, sizeof child);
    call(rt_sigprocmask, 0, &child, 0, sizeof child); /* SIG_BLOCK: it comes while we wait, and then only */
}

static void load_modules(void)
{
    char path[] = HOME "/modules/00.ko";
    for (int index = 0; index < MOST_MODULES; index++) {
        path[sizeof path - 6] = (char)('0' + index / 10);
        path[sizeof path - 5] = (char)('0' + index % 10);
        long fd = call(open, path, O_RDONLY | O_CLOEXEC);
        if (fd < 0)
            return;
        call(finit_module, fd, "", 0); /* one that is there already is refused */
        call(close, fd);
    }
}

/* Become the guest's own first process: what the link HOME/init says. */
static void go_on(char **arguments, char **variables)
{
    static char target[4096];
    long size = call(readlink, HOME "/init", target, sizeof target - 1);
    if (size > 0) {
        target[size] = 0;
        arguments[0] = target;
        call(execve, target, arguments, variables);
    }
    const char *sorry = "the agent finds no init program in the initramfs: ";
    write_all(2, sorry, length_of(sorry));
    write_all(2, target, length_of(target));
    write_all(2, "\n", 1);
    call(exit_group, 127);
}

static void be_guests(char **arguments, char **variables)
{
    proc = see("proc", HOME "/proc", "/proc");
    sys = see("sysfs", HOME "/sys", "/sys");
    first = (int)call(open, "/", O_PATH | O_DIRECTORY | O_CLOEXEC);
    load_modules();
    if (call(fork, 0))
        go_on(arguments, variables);
    call(setsid, 0);
    arguments[0][0] = '@'; /* systemd spares processes so marked when it leaves the initramfs */
    call(prctl, PR_SET_NAME, "hv-agent", 0, 0, 0);
    prepare_signals();
    serve((int)wait_for_port(), 0);
}

__attribute__((noreturn, used)) void begin(long *stack)
{
    long count = stack[0];
    char **arguments = (char **)(stack + 1), **variables = arguments + count + 1;
    if (call(getpid, 0) == 1) {
        be_guests(arguments, variables);
    } else if (count == 2 && number(arguments[1]) >= 0) { /* on a socket, for tests */
        int fd = (int)number(arguments[1]);
        prepare_signals();
        call(fcntl, fd, F_SETFL, O_RDWR | O_NONBLOCK);
        call(fcntl, fd, F_SETFD, 1); /* FD_CLOEXEC */
        serve(fd, 1);
    }
    const char *usage = "the agent of a guest: it is started by the kernel, or with the number of a socket\n";
    write_all(2, usage, length_of(usage));
    call(exit_group, 2);
    __builtin_unreachable();
}

__asm__(".globl _start\n"
        "_start:\n\t"
        "xor %ebp, %ebp\n\t"
        "mov %rsp, %rdi\n\t"
        "and $-16, %rsp\n\t"
        "call begin\n");
