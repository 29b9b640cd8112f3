/* The line: a byte stream with a host at its other end that comes, goes, and may be another one after a restore.
 *
 * HELLO is looked for in every byte that comes, also inside frames: whatever the line was in the middle of, a HELLO
 * brings both ends into step. The host sees to it that no payload holds its magic. A frame ends in a zero byte, which
 * the magic has none of: so a frame that was cut off is never taken for whole when a HELLO comes instead of its rest. */
#include "agent.h"

#define OUTBOX (4 * CHUNK)
#define RESERVE 1024 /* of the outbox, kept for small frames */
#define FRAME_MORE (sizeof(struct header) + 1)
#define READS 16
#define KEEP 1

static const uint8_t hello_magic[16] = {0xc4, 0xbf, 0x82, 0xaa, 0x92, 0xbc, 0xdd, 0xe6,
                                        0xcf, 0xdb, 0x81, 0x81, 0x97, 0xa3, 0xba, 0xe7};
static const uint8_t welcome_magic[16] = {0xa0, 0x8e, 0xbd, 0xab, 0xf8, 0xe7, 0x94, 0xdd,
                                          0xfc, 0x9c, 0xad, 0xe1, 0xf7, 0xbb, 0xf7, 0xe3};

struct hello {
    uint8_t nonce[16];
    uint32_t flags;
};

struct welcome {
    uint8_t magic[16];
    uint8_t nonce[16];
    uint32_t version, most_payload, input_window, most_processes;
};

int port = -1;
static int in_step;
static uint8_t inbox[MOST_PAYLOAD + FRAME_MORE + CHUNK];
static size_t in_size;
static unsigned matched; /* bytes of the magic that were the last to come */
static struct hello hello;
static unsigned hello_missing;
static uint8_t outbox[OUTBOX];
static size_t out_start, out_end;
static int starved; /* something waits for room in the outbox */

/* --- out ------------------------------------------------------------------------------------------------------------ */

static void flush(void)
{
    while (out_start < out_end) {
        long done = call(write, port, outbox + out_start, out_end - out_start);
        if (done <= 0)
            break;
        out_start += (size_t)done;
    }
    if (out_start == out_end)
        out_start = out_end = 0;
}

static size_t room(void)
{
    if (out_start && OUTBOX - out_end < CHUNK + RESERVE) {
        memmove(outbox, outbox + out_start, out_end - out_start);
        out_end -= out_start;
        out_start = 0;
    }
    return OUTBOX - out_end;
}

/* Where the payload of a DATA frame may be written, of at most `most` bytes; NULL while there is no room. */
uint8_t *frame_room(uint32_t *most)
{
    size_t free = room();
    if (free < RESERVE + FRAME_MORE + 4096) {
        starved = 1;
        return NULL;
    }
    free -= RESERVE + FRAME_MORE;
    if (*most > free)
        *most = (uint32_t)free;
    if (*most > CHUNK)
        *most = CHUNK;
    return outbox + out_end + sizeof(struct header);
}

static void seal(uint8_t type, uint8_t stream, uint32_t id, uint32_t length)
{
    struct header header = {type, stream, 0, id, length};
    memcpy(outbox + out_end, &header, sizeof header);
    out_end += sizeof header + length;
    outbox[out_end++] = 0;
}

/* Send what has been written there. */
void frame_filled(uint8_t stream, uint32_t id, uint32_t length)
{
    seal(DATA, stream, id, length);
}

/* Send a small frame; returns 0 when it has to be tried again later. */
int send_frame(uint8_t type, uint8_t stream, uint32_t id, const void *payload, uint32_t length)
{
    if (room() < FRAME_MORE + length) {
        starved = 1;
        return 0;
    }
    memcpy(outbox + out_end + sizeof(struct header), payload, length);
    seal(type, stream, id, length);
    return 1;
}

/* Say that the agent is here; all that was to be sent before is forgotten. A nonce of zeros is nobody's. */
static void welcome(const uint8_t *nonce)
{
    struct welcome answer = {{0}, {0}, VERSION, MOST_PAYLOAD, INPUT_WINDOW, MOST_PROCESSES};
    memcpy(answer.magic, welcome_magic, sizeof answer.magic);
    if (nonce)
        memcpy(answer.nonce, nonce, sizeof answer.nonce);
    memcpy(outbox, &answer, sizeof answer);
    out_start = 0;
    out_end = sizeof answer;
}

/* --- in ------------------------------------------------------------------------------------------------------------- */

static void lose_step(void)
{
    if (in_step) {
        in_step = 0;
        end_session(1);
        welcome(NULL);
    }
}

/* Point `list` at `count` texts at `*at`; returns 0 when they are not all there. */
static int texts(char **list, unsigned count, char **at, const char *end)
{
    for (unsigned index = 0; index < count; index++) {
        list[index] = *at;
        while (*at < end && **at)
            ++*at;
        if (*at == end)
            return 0;
        ++*at;
    }
    list[count] = NULL;
    return 1;
}

static int take_start(uint32_t id, uint8_t *payload, uint32_t length)
{
    static char *lists[4096];
    struct request request;
    if (length < sizeof request.start)
        return 0;
    memcpy(&request.start, payload, sizeof request.start);
    const struct start *start = &request.start;
    char *at = (char *)payload + sizeof *start, *end = (char *)payload + length, *folder[2];
    unsigned count = (unsigned)start->arguments + start->variables;
    if (start->operation >= OPERATIONS || !start->arguments || count + 2 > sizeof lists / sizeof *lists)
        return 0;
    request.arguments = lists;
    request.variables = lists + start->arguments + 1;
    if (!texts(folder, 1, &at, end) || !texts(request.arguments, start->arguments, &at, end) ||
        !texts(request.variables, start->variables, &at, end) || at != end)
        return 0;
    request.folder = folder[0];
    return start_process(id, &request);
}

/* Do what a frame asks for; returns 0 when it makes no sense. */
static int take_frame(const struct header *header, uint8_t *payload)
{
    uint32_t value = 0;
    if (header->length == sizeof value)
        memcpy(&value, payload, sizeof value);
    switch (header->type) {
    case START:
        return take_start(header->id, payload, header->length);
    case DATA:
        return header->stream == 0 && take_input(header->id, payload, header->length);
    case SIGNAL:
        return header->length == sizeof value && signal_process(header->id, value);
    case CREDIT:
        return header->length == sizeof value && take_credit(header->id, header->stream, value);
    case CLOSE:
        return !header->length && close_process(header->id);
    default:
        return 0;
    }
}

/* Take the frames that are whole. */
static void take_frames(void)
{
    size_t at = 0;
    while (in_step && in_size - at >= sizeof(struct header)) {
        struct header header;
        memcpy(&header, inbox + at, sizeof header);
        if (header.length > MOST_PAYLOAD || header.zero) {
            lose_step();
            break;
        }
        if (in_size - at < FRAME_MORE + header.length)
            break;
        uint8_t *payload = inbox + at + sizeof header;
        at += FRAME_MORE + header.length;
        if (payload[header.length] || !take_frame(&header, payload))
            lose_step();
    }
    if (!in_step)
        at = in_size;
    in_size -= at;
    if (at)
        memmove(inbox, inbox + at, in_size);
}

static void greet(void)
{
    end_session((hello.flags & KEEP) != 0);
    in_step = 1;
    in_size = 0; /* what came before is from another time */
    welcome(hello.nonce);
}

/* How many of `size` bytes are before the first one that a HELLO may begin with; eight at a time. */
static size_t harmless(const uint8_t *bytes, size_t size)
{
    const uint64_t each = 0x0101010101010101u;
    size_t at = 0;
    for (; at + 8 <= size; at += 8) {
        uint64_t eight;
        __builtin_memcpy(&eight, bytes + at, 8);
        eight ^= each * hello_magic[0];
        if ((eight - each) & ~eight & each << 7)
            break; /* one of them is zero now */
    }
    while (at < size && bytes[at] != hello_magic[0])
        at++;
    return at;
}

/* Take `count` bytes that have been read to the end of the inbox. */
static void take(size_t count)
{
    size_t end = in_size + count;
    for (size_t at = in_size; at < end; at++) {
        if (!matched && !hello_missing && (at += harmless(inbox + at, end - at)) == end)
            break;
        uint8_t byte = inbox[at];
        if (byte == hello_magic[matched])
            matched++;
        else
            matched = byte == hello_magic[0];
        if (hello_missing) {
            ((uint8_t *)&hello)[sizeof hello - hello_missing] = byte;
            if (!--hello_missing) {
                greet();
                end -= at + 1;
                memmove(inbox, inbox + at + 1, end);
                at = (size_t)-1; /* what follows begins at 0 now */
            }
        }
        if (matched == sizeof hello_magic) {
            hello_missing = sizeof hello;
            matched = 0;
        }
    }
    in_size = hello_missing ? 0 : end; /* nothing counts before the HELLO has been answered */
    take_frames();
}

/* --- the loop ------------------------------------------------------------------------------------------------------- */

/* Read what has come; returns 0 at the end of the line. */
static int read_port(void)
{
    for (int reads = 0; reads < READS; reads++) {
        long count = call(read, port, inbox + in_size, sizeof inbox - in_size);
        if (count == 0)
            return 0;
        if (count < 0)
            return count == -EAGAIN || count == -EINTR;
        take((size_t)count);
    }
    return 1;
}

static void rest(void)
{
    struct moment pause = {0, 20000000};
    call(nanosleep, &pause, 0);
}

void serve(int fd, int ends_with_line)
{
    static struct pollfd table[1 + 3 * PLACES];
    uint64_t no_signals = 0;
    port = fd;
    welcome(NULL);
    for (;;) {
        reap();
        starved = 0;
        unsigned count = 1 + watch_processes(table + 1);
        flush();
        if (starved && out_start == out_end)
            continue; /* there is room now, and the table is of a moment without */
        table[0].fd = port;
        table[0].events = POLLIN | (out_start < out_end ? POLLOUT : 0);
        table[0].revents = 0;
        if (call6(__NR_ppoll, (long)table, count, 0, (long)&no_signals, sizeof no_signals, 0) < 0)
            continue; /* a child has ended */
        serve_processes(table + 1);
        if (table[0].revents & ~POLLOUT && !read_port()) {
            if (ends_with_line) {
                end_session(0);
                call(exit_group, 0);
            }
            rest(); /* no host is there */
        }
    }
}
