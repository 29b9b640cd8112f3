/* What a copy of a machine changes so that it is not taken for the other; and the kernel's log. */
#include "agent.h"

#include <linux/if.h>
#include <linux/random.h>
#include <linux/sockios.h>

#define MOST_ENTROPY 4096
#define CLOCK_REALTIME 0
#define LOG_READ_ALL 3
#define LOG_SIZE 10
#define ETHERNET 1 /* ARPHRD_ETHER */

static void check(long result, const char *what)
{
    if (result < 0)
        report(STEP_FILE, result, what);
}

/* Take pairs of hexadecimal digits, with colons between them or not; returns how many, or -EINVAL. */
static long bytes_of(const char *text, uint8_t *target, size_t most)
{
    size_t count = 0;
    for (; *text; text += *text == ':') {
        int high = digit(text[0]), low = high < 0 ? -1 : digit(text[1]);
        if (low < 0 || count == most)
            return -EINVAL;
        target[count++] = (uint8_t)(high << 4 | low);
        text += 2;
    }
    return (long)count;
}

/* Give the interface in "NAME=AA:BB:CC:DD:EE:FF" that address. One that is up and does not like it is down meanwhile. */
static void set_mac(const char *argument)
{
    struct ifreq request = {0};
    unsigned char address[6];
    size_t length = 0;
    while (argument[length] && argument[length] != '=')
        length++;
    if (length >= IFNAMSIZ || bytes_of(argument + length + 1, address, 6) != 6)
        check(-EINVAL, argument);
    memcpy(request.ifr_name, argument, length);
    long fd = call(socket, 2, 2 | O_CLOEXEC, 0); /* AF_INET, SOCK_DGRAM */
    check(fd, argument);
    request.ifr_hwaddr.sa_family = ETHERNET;
    memcpy(request.ifr_hwaddr.sa_data, address, 6);
    long error = call(ioctl, fd, SIOCSIFHWADDR, &request);
    if (error == -EBUSY) {
        struct ifreq state = {0};
        memcpy(state.ifr_name, argument, length);
        check(call(ioctl, fd, SIOCGIFFLAGS, &state), argument);
        state.ifr_flags &= (short)~IFF_UP;
        check(call(ioctl, fd, SIOCSIFFLAGS, &state), argument);
        error = call(ioctl, fd, SIOCSIFHWADDR, &request);
        state.ifr_flags |= IFF_UP;
        call(ioctl, fd, SIOCSIFFLAGS, &state);
    }
    check(error, argument);
}

/* Mix bytes into the kernel's pool, count them as entropy, and have its generator take them at once. */
static void stir(const char *argument)
{
    static struct {
        int entropy_count, size;
        uint8_t bytes[MOST_ENTROPY];
    } pool;
    long size = bytes_of(argument, pool.bytes, sizeof pool.bytes);
    check(size, "entropy");
    long fd = call(open, "/dev/urandom", O_RDWR | O_CLOEXEC);
    check(fd, "/dev/urandom");
    pool.size = (int)size;
    pool.entropy_count = (int)size * 8;
    check(call(ioctl, fd, RNDADDENTROPY, &pool), "/dev/urandom");
    check(call(ioctl, fd, RNDRESEEDCRNG, 0), "/dev/urandom");
}

static void write_machine_id(const char *id)
{
    const char *path = "/etc/machine-id";
    long fd = call(open, path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0444);
    check(fd, path);
    check(write_all((int)fd, id, length_of(id)), path);
    check(write_all((int)fd, "\n", 1), path);
    check(call(close, fd), path);
}

static void set_clock(const char *argument)
{
    int64_t time = number(argument);
    struct moment moment = {time / 1000000000, time % 1000000000};
    check(time, "clock");
    check(call(clock_settime, CLOCK_REALTIME, &moment), "clock");
}

void refresh(char **arguments)
{
    for (; *arguments; arguments++) {
        const char *value;
        if ((value = after(*arguments, "clock=")))
            set_clock(value);
        else if ((value = after(*arguments, "entropy=")))
            stir(value);
        else if ((value = after(*arguments, "mac=")))
            set_mac(value);
        else if ((value = after(*arguments, "machine-id=")))
            write_machine_id(value);
        else if ((value = after(*arguments, "hostname=")))
            check(call(sethostname, value, length_of(value)), "hostname");
        else
            report(STEP_FILE, -EINVAL, *arguments);
    }
    call(exit_group, 0);
    __builtin_unreachable();
}

void kernel_log(void)
{
    long size = call(syslog, LOG_SIZE, 0, 0);
    check(size, "the kernel's log");
    long buffer = call6(__NR_mmap, 0, size + 1, 3, 0x22, -1, 0); /* private, anonymous */
    check(buffer < 0 && buffer > -4096 ? buffer : 0, "the kernel's log");
    size = call(syslog, LOG_READ_ALL, buffer, size);
    check(size, "the kernel's log");
    check(write_all(1, (void *)buffer, (size_t)size), "the kernel's log");
    call(exit_group, 0);
    __builtin_unreachable();
}
