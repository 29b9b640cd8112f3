/* The processes that the host has started: programs, and copies of the agent that work on files. */
#include "agent.h"

#define DEFAULT_PATH "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
#define PATH_SIZE 4096
#define MOST_DESCRIPTORS (16 + 3 * PLACES)
#define P_PID 1
#define WNOHANG 1
#define WEXITED 4
#define WNOWAIT 0x01000000
#define CLD_EXITED 1
#define MAP_SHARED_ANONYMOUS 0x21

/* A pipe of a process: its standard input, output and error by number. */
struct pipe {
    int fd;          /* our end; -1: closed */
    uint64_t credit; /* bytes that the host takes; of the input: that it may be told of */
    int end_told;
};

struct process {
    int used, pid, ended, end_told;
    int orphan; /* nobody waits for it: what it writes is dropped */
    uint32_t id;
    uint32_t how, value;
    struct pipe pipes[3];
    uint32_t input_start, input_end, input_room;
    int input_closing;
    unsigned place[3]; /* in the table of poll, plus one */
};

/* As the kernel fills it in for waitid (include/uapi/asm-generic/siginfo.h). */
struct child_info {
    int32_t signal, error, code, pad, pid;
    uint32_t uid;
    int32_t status;
    uint8_t rest[100];
};

static struct process processes[PLACES];
static uint8_t inputs[PLACES][INPUT_WINDOW];
static uint8_t dropped[4096];
static int64_t *failures; /* shared with the children: a step and an errno for each place in `processes` */
static int64_t *failure;  /* in a child: its own */

static struct process *find(uint32_t id)
{
    for (unsigned index = 0; index < PLACES; index++)
        if (processes[index].used && !processes[index].orphan && processes[index].id == id)
            return &processes[index];
    return NULL;
}

static void shut(struct pipe *pipe)
{
    if (pipe->fd >= 0)
        call(close, pipe->fd);
    pipe->fd = -1;
}

/* --- in the child --------------------------------------------------------------------------------------------------- */

void report(int step, long error, const char *what)
{
    *failure = (int64_t)step << 32 | (uint32_t)-error;
    if (what)
        write_all(2, what, length_of(what));
    call(exit_group, 127);
    __builtin_unreachable();
}

static void run_program(char **arguments, char **variables)
{
    char place[PATH_SIZE];
    const char *name = arguments[0], *path = DEFAULT_PATH;
    for (char **variable = variables; *variable; variable++)
        if (after(*variable, "PATH="))
            path = after(*variable, "PATH=");
    for (const char *at = name; *at; at++)
        if (*at == '/')
            report(STEP_PROGRAM, call(execve, name, arguments, variables), NULL);
    long error = -ENOENT;
    while (*name) {
        size_t length = 0;
        while (path[length] && path[length] != ':')
            length++;
        if (length + length_of(name) + 2 < sizeof place) {
            memcpy(place, path, length);
            place[length] = 0;
            append(place, sizeof place, length ? "/" : "./");
            append(place, sizeof place, name);
            long answer = call(execve, place, arguments, variables);
            if (answer != -ENOENT && answer != -ENOTDIR)
                error = answer; /* as a shell: go on, but tell of this one when there is no other */
        }
        if (!path[length])
            break;
        path += length + 1;
    }
    report(STEP_PROGRAM, error, NULL);
}

/* A copy of the agent that goes on without execve must not keep the ends of others, nor that of its own input. */
static void close_others(void)
{
    if (call(close_range, 3, ~0u, 0) < 0)
        for (int fd = 3; fd < MOST_DESCRIPTORS; fd++)
            call(close, fd);
}

static void be_child(const struct request *request, int ends[3])
{
    static const struct action as_usual;
    uint64_t none = 0;
    call(setsid, 0);
    call(rt_sigaction, SIG_PIPE, &as_usual, 0, sizeof none);
    call(rt_sigaction, SIG_CHLD, &as_usual, 0, sizeof none);
    call(rt_sigprocmask, 2, &none, 0, sizeof none); /* SIG_SETMASK */
    for (int stream = 0; stream < 3; stream++)
        call(dup2, ends[stream], stream);
    call(umask, 022);
    long error = enter_root();
    if (error < 0)
        report(STEP_ROOT, error, NULL);
    error = call(chdir, request->folder);
    if (error < 0)
        report(STEP_FOLDER, error, NULL);
    char **arguments = request->arguments;
    unsigned count = request->start.arguments;
    if (request->start.operation != RUN)
        close_others();
    switch (request->start.operation) {
    case GET:
        get_file(arguments[0]);
    case PUT:
        put_file(arguments[0], count > 1 ? arguments[1] : "");
    case PACK:
        pack(arguments[0]);
    case UNPACK:
        unpack(arguments[0]);
    case REFRESH:
        refresh(arguments);
    case KERNEL_LOG:
        kernel_log();
    default:
        run_program(arguments, request->variables);
    }
}

/* --- what the host asks for ----------------------------------------------------------------------------------------- */

/* Make the pipes: `ends` are the child's, in the order of its descriptors. Returns 0 or an errno. */
static long make_pipes(struct process *process, int ends[3], int merge)
{
    long error = 0;
    for (int stream = 0; stream < 3; stream++) {
        int pair[2];
        if (stream == 2 && merge) {
            ends[2] = ends[1];
            break;
        }
        if ((error = call(pipe2, pair, O_CLOEXEC)) < 0)
            break;
        process->pipes[stream].fd = pair[stream == 0];
        ends[stream] = pair[stream != 0];
        call(fcntl, process->pipes[stream].fd, F_SETFL, O_NONBLOCK);
    }
    return error;
}

/* Pipes must not be 0, 1 and 2: those are what the child puts its own at. */
static void take_low_descriptors(void)
{
    long fd = 0;
    while (fd >= 0 && fd <= 2)
        fd = call(dup, port);
    if (fd > 2)
        call(close, fd);
}

int start_process(uint32_t id, const struct request *request)
{
    struct process *process = NULL;
    if (find(id))
        return 0;
    for (unsigned index = 0; index < PLACES && !process; index++)
        if (!processes[index].used)
            process = &processes[index];
    if (!process) /* the host knows how many there may be; but orphans may have the places */
        return send_frame(FAILED, 0, id, &(uint32_t[2]){STEP_START, EAGAIN}, 8);
    if (!failures) {
        take_low_descriptors();
        failures = (int64_t *)call6(__NR_mmap, 0, 4096, 3, MAP_SHARED_ANONYMOUS, -1, 0);
    }
    memset(process, 0, sizeof *process);
    int ends[3] = {-1, -1, -1};
    for (int stream = 0; stream < 3; stream++) {
        process->pipes[stream].fd = -1;
        process->pipes[stream].credit = stream ? request->start.window : 0;
    }
    process->id = id;
    failure = &failures[process - processes];
    *failure = 0;
    long error = make_pipes(process, ends, request->start.flags & MERGE);
    long pid = error < 0 ? error : call(fork, 0);
    if (pid == 0)
        be_child(request, ends);
    for (int stream = 0; stream < 3; stream++)
        if (ends[stream] >= 0 && !(stream == 2 && ends[2] == ends[1]))
            call(close, ends[stream]);
    process->used = 1;
    process->pid = (int)pid;
    if (pid < 0) {
        *failure = (int64_t)STEP_START << 32 | (uint32_t)-pid;
        process->ended = 1;
        for (int stream = 0; stream < 3; stream++)
            shut(&process->pipes[stream]);
    }
    if (request->start.flags & NO_INPUT)
        shut(&process->pipes[0]);
    return 1;
}

int take_input(uint32_t id, const uint8_t *data, uint32_t length)
{
    struct process *process = find(id);
    if (!process)
        return 1; /* it may have ended while this was on its way */
    uint8_t *buffer = inputs[process - processes];
    if (!length)
        process->input_closing = 1;
    if (process->pipes[0].fd < 0) {
        process->input_room += length; /* nobody reads it */
        return 1;
    }
    if (process->input_start) {
        process->input_end -= process->input_start;
        memmove(buffer, buffer + process->input_start, process->input_end);
        process->input_start = 0;
    }
    if (length > INPUT_WINDOW - process->input_end)
        return 0;
    memcpy(buffer + process->input_end, data, length);
    process->input_end += length;
    return 1;
}

int take_credit(uint32_t id, uint32_t stream, uint32_t bytes)
{
    struct process *process = find(id);
    if (stream != 1 && stream != 2)
        return 0;
    if (process)
        process->pipes[stream].credit += bytes;
    return 1;
}

int signal_process(uint32_t id, uint32_t signal)
{
    struct process *process = find(id);
    if (signal > SIGNALS)
        return 0;
    if (process && process->pid > 0) { /* it is not reaped yet, so the number is still its own */
        if (call(kill, -process->pid, signal) < 0)
            call(kill, process->pid, signal);
    }
    return 1;
}

/* The host does not want to hear more of it; the process itself goes on. */
int close_process(uint32_t id)
{
    struct process *process = find(id);
    if (process) {
        for (int stream = 0; stream < 3; stream++)
            shut(&process->pipes[stream]);
        if (!process->ended) {
            process->ended = 1;
            process->how = LEFT;
        }
    }
    return 1;
}

/* There is a new host: nobody waits for what the old one has started. */
void end_session(int keep)
{
    for (unsigned index = 0; index < PLACES; index++) {
        struct process *process = &processes[index];
        if (!process->used)
            continue;
        if (!keep && process->pid > 0 && call(kill, -process->pid, SIG_KILL) < 0)
            call(kill, process->pid, SIG_KILL);
        process->orphan = 1;
        process->input_closing = 1;
    }
}

/* --- what they do --------------------------------------------------------------------------------------------------- */

/* Notice which have ended; they are reaped when all is told, and until then their numbers are nobody else's. */
void reap(void)
{
    for (unsigned index = 0; index < PLACES; index++) {
        struct process *process = &processes[index];
        struct child_info info = {0};
        if (!process->used || process->ended || process->pid <= 0)
            continue;
        if (call(waitid, P_PID, process->pid, &info, WNOHANG | WEXITED | WNOWAIT) < 0 || !info.pid)
            continue;
        process->ended = 1;
        process->how = info.code == CLD_EXITED ? EXITED : KILLED;
        process->value = (uint32_t)info.status;
    }
}

/* All is told. Its place is free when it has ended; one that was left may go on for long. */
static void forget(struct process *process)
{
    struct child_info info = {0};
    shut(&process->pipes[0]);
    process->orphan = 1;
    if (process->pid <= 0 || call(waitid, P_PID, process->pid, &info, WNOHANG | WEXITED) < 0 || info.pid)
        process->used = 0;
}

/* Tell the host what there is to tell of a process, as far as there is room. */
static void tell(struct process *process)
{
    unsigned place = (unsigned)(process - processes);
    uint32_t id = process->id;
    int told = 1;
    for (int stream = 1; stream < 3; stream++) {
        struct pipe *pipe = &process->pipes[stream];
        if (pipe->fd < 0 && !pipe->end_told)
            pipe->end_told = process->orphan || send_frame(DATA, (uint8_t)stream, id, NULL, 0);
        told &= pipe->end_told;
    }
    if (process->ended && !process->end_told) {
        uint32_t end[2] = {process->how, process->value};
        uint8_t type = EXIT;
        if (failures[place]) {
            type = FAILED;
            end[0] = (uint32_t)(failures[place] >> 32);
            end[1] = (uint32_t)failures[place];
        }
        /* what it has said of a failure goes first: after FAILED nothing follows */
        process->end_told = process->orphan || ((type == EXIT || told) && send_frame(type, 0, id, end, sizeof end));
    }
    if (process->input_room >= INPUT_WINDOW / 2 || (process->input_room && process->input_start == process->input_end))
        if (!process->orphan && !process->end_told && send_frame(CREDIT, 0, id, &process->input_room, 4))
            process->input_room = 0;
    if (process->end_told && told)
        forget(process);
}

unsigned watch_processes(struct pollfd *table)
{
    unsigned count = 0;
    for (unsigned index = 0; index < PLACES; index++) {
        struct process *process = &processes[index];
        if (!process->used)
            continue;
        tell(process);
        for (int stream = 0; stream < 3; stream++) {
            struct pipe *pipe = &process->pipes[stream];
            uint32_t most = CHUNK;
            int wanted = stream ? process->orphan || (pipe->credit && frame_room(&most))
                                : process->input_start < process->input_end;
            process->place[stream] = 0;
            if (stream == 0 && process->input_closing && !wanted)
                shut(pipe);
            if (!process->used || pipe->fd < 0 || !wanted)
                continue;
            table[count] = (struct pollfd){pipe->fd, stream ? POLLIN : POLLOUT, 0};
            process->place[stream] = ++count;
        }
    }
    return count;
}

static void feed(struct process *process)
{
    uint8_t *buffer = inputs[process - processes];
    uint32_t size = process->input_end - process->input_start;
    long done = call(write, process->pipes[0].fd, buffer + process->input_start, size);
    if (done == -EAGAIN || done == -EINTR)
        return;
    if (done < 0) { /* it does not read any more */
        shut(&process->pipes[0]);
        done = size;
    }
    process->input_start += (uint32_t)done;
    process->input_room += (uint32_t)done;
}

static void drain(struct process *process, int stream)
{
    struct pipe *pipe = &process->pipes[stream];
    uint32_t most = pipe->credit < CHUNK ? (uint32_t)pipe->credit : CHUNK;
    uint8_t *target = process->orphan ? dropped : frame_room(&most);
    if (!target)
        return;
    long done = call(read, pipe->fd, target, process->orphan ? sizeof dropped : most);
    if (done == -EAGAIN || done == -EINTR)
        return;
    if (done <= 0) {
        shut(pipe);
    } else if (!process->orphan) {
        pipe->credit -= (uint64_t)done;
        frame_filled((uint8_t)stream, process->id, (uint32_t)done);
    }
}

void serve_processes(const struct pollfd *table)
{
    for (unsigned index = 0; index < PLACES; index++) {
        struct process *process = &processes[index];
        for (int stream = 0; process->used && stream < 3; stream++) {
            unsigned place = process->place[stream];
            if (!place || !table[place - 1].revents || process->pipes[stream].fd < 0)
                continue;
            if (stream)
                drain(process, stream);
            else
                feed(process);
        }
    }
}
