/* The kernel's interface without a C library: system calls by number (x86-64), and the few string functions needed. */
#ifndef HV_AGENT_SYSTEM_H
#define HV_AGENT_SYSTEM_H

#include <asm/ioctls.h>
#include <asm/stat.h>
#include <asm/unistd_64.h>
#include <asm-generic/errno.h>
#include <asm-generic/poll.h>
#include <linux/fcntl.h>
#include <linux/stat.h>
#include <stddef.h>
#include <stdint.h>

#define SIG_KILL 9
#define SIG_PIPE 13
#define SIG_CHLD 17
#define SIGNALS 64

static inline long call6(long number, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long result;
    __asm__ volatile("syscall"
                     : "=a"(result)
                     : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9)
                     : "rcx", "r11", "memory");
    return result;
}

/* call(NAME, arguments...): up to five, of any integer or pointer type; the result is negative for an errno */
#define CALL_PICK(n, a, b, c, d, e, ...) call6((n), (long)(a), (long)(b), (long)(c), (long)(d), (long)(e), 0)
#define call(name, ...) CALL_PICK(__NR_##name, __VA_ARGS__, 0, 0, 0, 0, 0)

struct moment {
    int64_t seconds;
    int64_t nanoseconds;
};

/* The kernel's struct sigaction (arch/x86/include/uapi/asm/signal.h) for 64-bit programs. */
struct action {
    void (*handler)(int);
    uint64_t flags;
    void (*restorer)(void);
    uint64_t mask;
};

void *memcpy(void *to, const void *from, size_t size);
void *memmove(void *to, const void *from, size_t size);
void *memset(void *to, int value, size_t size);
int memcmp(const void *left, const void *right, size_t size);
size_t length_of(const char *text);
int same(const char *left, const char *right);

/* Return what follows `start` in `text`, or NULL. */
const char *after(const char *text, const char *start);

/* Return the decimal number at `text`; -1 when there is none, or more than a number. */
int64_t number(const char *text);

/* Return the value of a hexadecimal digit, or -1. */
int digit(char character);

/* Add `text` to what `buffer` of `size` bytes holds, as much as fits. */
void append(char *buffer, size_t size, const char *text);

/* Read a small file, relative to `folder`; the last newline goes. Returns its length or an errno. */
long read_small(int folder, const char *path, char *buffer, size_t size);

/* Write everything, waiting; returns 0 or an errno. */
long write_all(int fd, const void *data, size_t size);

#endif
