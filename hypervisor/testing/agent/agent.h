/* The agent: what its parts know of each other. PROTOCOL.md says what goes over the line. */
#ifndef HV_AGENT_H
#define HV_AGENT_H

#include "system.h"

#define PORT_NAME "org.trapvisor.agent"
#define HOME "/.trapvisor" /* the agent's folder in the initramfs */
#define VERSION 1
#define MOST_PAYLOAD (256u << 10) /* of a frame to the agent */
#define CHUNK (32u << 10)         /* of a frame from it */
#define INPUT_WINDOW (128u << 10) /* of a process's standard input that is not in its pipe yet */
#define MOST_PROCESSES 32         /* that a host may have at once */
#define PLACES 64                 /* and those that nobody waits for */

enum frame_type {
    START = 1,
    DATA = 2, /* both ways; empty: the end of the stream */
    SIGNAL = 3,
    CREDIT = 4, /* both ways */
    CLOSE = 5,
    EXIT = 6,
    FAILED = 7,
};

enum operation { RUN, GET, PUT, PACK, UNPACK, REFRESH, KERNEL_LOG, OPERATIONS };
enum { MERGE = 1, NO_INPUT = 2 };     /* flags of START */
enum { EXITED, KILLED, LEFT };        /* how a process ended, of EXIT */
enum { STEP_START, STEP_ROOT, STEP_FOLDER, STEP_PROGRAM, STEP_FILE }; /* of FAILED */

struct header {
    uint8_t type;
    uint8_t stream;
    uint16_t zero;
    uint32_t id;
    uint32_t length;
};

struct start {
    uint8_t operation;
    uint8_t flags;
    uint16_t arguments;
    uint16_t variables;
    uint16_t zero;
    uint32_t window;
};

/* What a START asks for: pointers into its payload. */
struct request {
    struct start start;
    char *folder;
    char **arguments; /* ends in NULL, and so does the other */
    char **variables;
};

/* session.c: the line */
extern int port;
void serve(int fd, int ends_with_line) __attribute__((noreturn));
int send_frame(uint8_t type, uint8_t stream, uint32_t id, const void *payload, uint32_t length);
uint8_t *frame_room(uint32_t *most);
void frame_filled(uint8_t stream, uint32_t id, uint32_t length);

/* process.c: what runs */
int start_process(uint32_t id, const struct request *request);
int take_input(uint32_t id, const uint8_t *data, uint32_t length);
int take_credit(uint32_t id, uint32_t stream, uint32_t bytes);
int signal_process(uint32_t id, uint32_t signal);
int close_process(uint32_t id);
void end_session(int keep);
unsigned watch_processes(struct pollfd *table);
void serve_processes(const struct pollfd *table);
void reap(void);

/* tree.c, refresh.c: what a child does instead of a program; it ends there. `report` says why when it cannot. */
void report(int step, long error, const char *what) __attribute__((noreturn));
void get_file(const char *path) __attribute__((noreturn));
void put_file(const char *path, const char *mode) __attribute__((noreturn));
void pack(const char *path) __attribute__((noreturn));
void unpack(const char *path) __attribute__((noreturn));
void refresh(char **arguments) __attribute__((noreturn));
void kernel_log(void) __attribute__((noreturn));

/* boot.c: as the first process of a guest */
int enter_root(void);

#endif
