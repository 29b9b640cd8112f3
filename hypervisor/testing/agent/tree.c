/* Files, and folders with all that is in them, to and from the standard streams. Each of these is a process of its own,
 * so a slow disk keeps nobody waiting. A tree is a sequence of records: PROTOCOL.md. */
#include "agent.h"

#define PATH_SIZE 4096
#define NAME_SIZE 256
#define DEPTH 128
#define BLOCK (64u << 10)

enum kind { FOLDER = 1, FILE = 2, LINK = 3, END = 4 };

struct record {
    uint8_t kind, zero;
    uint16_t name_length;
    uint32_t mode;
};

struct entry {
    uint64_t inode;
    int64_t offset;
    uint16_t size;
    uint8_t type;
    char name[];
};

static char where[2 * PATH_SIZE]; /* what is being worked on, for messages */
static uint8_t block[BLOCK + 8];
static size_t block_size, block_at;

static void fail(long error)
{
    report(STEP_FILE, error, where);
}

static void check(long result)
{
    if (result < 0)
        fail(result);
}

static void start_at(const char *path)
{
    where[0] = 0;
    append(where, sizeof where, path);
}

/* --- single files --------------------------------------------------------------------------------------------------- */

/* Make the folders above a path. */
static void make_parents(const char *path)
{
    char parent[PATH_SIZE];
    for (size_t at = 1; path[0] && path[at] && at < sizeof parent; at++) {
        if (path[at] != '/')
            continue;
        memcpy(parent, path, at);
        parent[at] = 0;
        call(mkdir, parent, 0755); /* if it cannot be made, what follows tells */
    }
}

/* Open a file to write; one that is a running program, or (without `follow`) a link, makes room for another. */
static long open_new(int folder, const char *name, int follow)
{
    int flags = O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | (follow ? 0 : O_NOFOLLOW);
    long fd = call(openat, folder, name, flags, 0644);
    if (fd == -ETXTBSY || (fd == -ELOOP && !follow)) {
        call(unlinkat, folder, name, 0);
        fd = call(openat, folder, name, flags, 0644);
    }
    check(fd);
    return fd;
}

static void copy(int from, int to)
{
    for (;;) {
        long count = call(read, from, block, BLOCK);
        if (count == 0)
            return;
        if (count == -EINTR)
            continue;
        check(count);
        check(write_all(to, block, (size_t)count));
    }
}

void get_file(const char *path)
{
    start_at(path);
    long fd = call(open, path, O_RDONLY | O_CLOEXEC);
    check(fd);
    copy((int)fd, 1);
    call(exit_group, 0);
    __builtin_unreachable();
}

void put_file(const char *path, const char *mode)
{
    uint32_t bits = 0;
    start_at(path);
    make_parents(path);
    long fd = open_new(AT_FDCWD, path, 1);
    copy(0, (int)fd);
    for (const char *at = mode; *at >= '0' && *at <= '7'; at++)
        bits = bits * 8 + (uint32_t)(*at - '0');
    if (*mode)
        check(call(fchmod, fd, bits & 07777));
    check(call(close, fd));
    call(exit_group, 0);
    __builtin_unreachable();
}

/* --- a tree out ----------------------------------------------------------------------------------------------------- */

static void put_out(void)
{
    check(write_all(1, block, block_size));
    block_size = 0;
}

static void put(const void *data, size_t size)
{
    if (block_size + size > BLOCK)
        put_out();
    memcpy(block + block_size, data, size);
    block_size += size;
}

static void put_record(uint8_t kind, const char *name, uint32_t mode)
{
    struct record record = {kind, 0, (uint16_t)length_of(name), mode & 07777};
    put(&record, sizeof record);
    put(name, record.name_length);
}

static void pack_data(int fd)
{
    uint32_t size;
    for (;;) {
        if (block_size + sizeof size + 4096 > BLOCK)
            put_out();
        long count = call(read, fd, block + block_size + sizeof size, BLOCK - block_size - sizeof size);
        if (count == -EINTR)
            continue;
        check(count);
        size = (uint32_t)count;
        memcpy(block + block_size, &size, sizeof size);
        block_size += sizeof size + size;
        if (!size)
            return;
    }
}

static void pack_link(int folder, const char *name)
{
    char target[PATH_SIZE];
    long size = call(readlinkat, folder, name, target, sizeof target);
    check(size);
    uint32_t length = (uint32_t)size;
    put_record(LINK, name, 0777);
    put(&length, sizeof length);
    put(target, length);
}

static void pack_entry(int folder, const char *name, const char *shown, int depth);

static void pack_folder(int fd, int depth)
{
    char entries[4096] __attribute__((aligned(8)));
    if (depth == DEPTH)
        fail(-ELOOP);
    for (;;) {
        long size = call(getdents64, fd, entries, sizeof entries);
        check(size);
        if (!size)
            break;
        for (long at = 0; at < size;) {
            struct entry *entry = (struct entry *)(entries + at);
            at += entry->size;
            if (same(entry->name, ".") || same(entry->name, ".."))
                continue;
            size_t length = length_of(where);
            append(where, sizeof where, "/");
            append(where, sizeof where, entry->name);
            pack_entry(fd, entry->name, entry->name, depth + 1);
            where[length] = 0;
        }
    }
    put_record(END, "", 0);
}

/* Pack what has a name in a folder; `shown` is "" for the root of the tree, where links are followed. */
static void pack_entry(int folder, const char *name, const char *shown, int depth)
{
    struct stat status;
    check(call(newfstatat, folder, name, &status, *shown ? AT_SYMLINK_NOFOLLOW : 0));
    if (S_ISLNK(status.st_mode)) {
        pack_link(folder, name);
        return;
    }
    if (!S_ISREG(status.st_mode) && !S_ISDIR(status.st_mode))
        fail(-EOPNOTSUPP); /* opening a device or a pipe may do things, and wait */
    long fd = call(openat, folder, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | (*shown ? O_NOFOLLOW : 0));
    check(fd);
    if (S_ISDIR(status.st_mode)) {
        put_record(FOLDER, shown, status.st_mode);
        pack_folder((int)fd, depth);
    } else {
        put_record(FILE, shown, status.st_mode);
        pack_data((int)fd);
    }
    call(close, fd);
}

void pack(const char *path)
{
    start_at(path);
    pack_entry(AT_FDCWD, path, "", 0);
    put_out();
    call(exit_group, 0);
    __builtin_unreachable();
}

/* --- a tree in ------------------------------------------------------------------------------------------------------ */

static void take(void *target, size_t size)
{
    for (uint8_t *to = target; size;) {
        if (block_at == block_size) {
            long count = call(read, 0, block, BLOCK);
            if (count == -EINTR)
                continue;
            if (count <= 0)
                fail(count ? count : -EPROTO);
            block_size = (size_t)count;
            block_at = 0;
        }
        size_t part = block_size - block_at < size ? block_size - block_at : size;
        memcpy(to, block + block_at, part);
        block_at += part;
        to += part;
        size -= part;
    }
}

static void unpack_data(int fd)
{
    static uint8_t piece[BLOCK];
    uint32_t left;
    for (;;) {
        take(&left, sizeof left);
        if (!left)
            return;
        while (left) {
            uint32_t part = left < BLOCK ? left : BLOCK;
            take(piece, part);
            check(write_all(fd, piece, part));
            left -= part;
        }
    }
}

static void unpack_link(int folder, const char *name)
{
    char target[PATH_SIZE];
    uint32_t length;
    take(&length, sizeof length);
    if (length >= sizeof target)
        fail(-ENAMETOOLONG);
    take(target, length);
    target[length] = 0;
    long error = call(symlinkat, target, folder, name);
    if (error == -EEXIST) {
        call(unlinkat, folder, name, 0);
        error = call(symlinkat, target, folder, name);
    }
    check(error);
}

static void unpack_entry(const struct record *record, int folder, const char *name, int depth);

static void unpack_folder(int fd, int depth)
{
    char name[NAME_SIZE];
    struct record record;
    if (depth == DEPTH)
        fail(-ELOOP);
    for (;;) {
        take(&record, sizeof record);
        if (record.kind == END)
            return;
        if (record.name_length >= sizeof name)
            fail(-ENAMETOOLONG);
        take(name, record.name_length);
        name[record.name_length] = 0;
        size_t length = length_of(where);
        append(where, sizeof where, "/");
        append(where, sizeof where, name);
        unpack_entry(&record, fd, name, depth + 1);
        where[length] = 0;
    }
}

/* Make what a record describes, as `name` in a folder; a depth of 0 is the root, whose name is a path. */
static void unpack_entry(const struct record *record, int folder, const char *name, int depth)
{
    long fd;
    switch (record->kind) {
    case FOLDER:
        fd = call(mkdirat, folder, name, 0755);
        if (fd < 0 && fd != -EEXIST)
            fail(fd);
        fd = call(openat, folder, name, O_RDONLY | O_DIRECTORY | O_CLOEXEC | (depth ? O_NOFOLLOW : 0));
        check(fd);
        unpack_folder((int)fd, depth);
        break;
    case FILE:
        fd = open_new(folder, name, !depth);
        unpack_data((int)fd);
        break;
    case LINK:
        unpack_link(folder, name);
        return;
    default:
        fail(-EPROTO);
    }
    check(call(fchmod, fd, record->mode & 07777));
    check(call(close, fd));
}

void unpack(const char *path)
{
    struct record record;
    start_at(path);
    make_parents(path);
    take(&record, sizeof record);
    if (record.name_length)
        fail(-EPROTO);
    unpack_entry(&record, AT_FDCWD, path, 0);
    call(exit_group, 0);
    __builtin_unreachable();
}
