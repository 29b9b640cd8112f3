/* See system.h. The compiler may call the mem* functions by itself. */
#include "system.h"

void *memcpy(void *to, const void *from, size_t size)
{
    void *place = to;
    __asm__ volatile("rep movsb" : "+D"(place), "+S"(from), "+c"(size) : : "memory");
    return to;
}

void *memmove(void *to, const void *from, size_t size)
{
    unsigned char *target = to;
    const unsigned char *source = from;
    if (target <= source || target >= source + size)
        return memcpy(to, from, size);
    while (size--)
        target[size] = source[size];
    return to;
}

void *memset(void *to, int value, size_t size)
{
    void *place = to;
    __asm__ volatile("rep stosb" : "+D"(place), "+c"(size) : "a"(value) : "memory");
    return to;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const unsigned char *a = left, *b = right;
    for (; size; size--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t length_of(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

int same(const char *left, const char *right)
{
    return !memcmp(left, right, length_of(left) < length_of(right) ? length_of(left) + 1 : length_of(right) + 1);
}

const char *after(const char *text, const char *start)
{
    while (*start)
        if (*text++ != *start++)
            return NULL;
    return text;
}

int64_t number(const char *text)
{
    int64_t value = 0;
    if (!*text)
        return -1;
    for (; *text; text++) {
        if (*text < '0' || *text > '9' || value > INT64_MAX / 10 - 1)
            return -1;
        value = value * 10 + (*text - '0');
    }
    return value;
}

int digit(char character)
{
    if (character >= '0' && character <= '9')
        return character - '0';
    if (character >= 'a' && character <= 'f')
        return character - 'a' + 10;
    return character >= 'A' && character <= 'F' ? character - 'A' + 10 : -1;
}

void append(char *buffer, size_t size, const char *text)
{
    size_t at = length_of(buffer);
    while (*text && at + 1 < size)
        buffer[at++] = *text++;
    buffer[at] = 0;
}

long read_small(int folder, const char *path, char *buffer, size_t size)
{
    long fd = call(openat, folder, path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return fd;
    long length = call(read, fd, buffer, size - 1);
    call(close, fd);
    if (length > 0 && buffer[length - 1] == '\n')
        length--;
    buffer[length < 0 ? 0 : length] = 0;
    return length;
}

long write_all(int fd, const void *data, size_t size)
{
    const char *from = data;
    while (size) {
        long done = call(write, fd, from, size);
        if (done == -EINTR)
            continue;
        if (done < 0)
            return done;
        from += done;
        size -= (size_t)done;
    }
    return 0;
}
