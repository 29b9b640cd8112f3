"""Process 1 of the emulated host: runs one command and carries its input and output over virtio-serial ports.

Every import costs twenty times what it costs outside, hence no json, no signal, no subprocess. The ports, by name:

    control  lines both ways: a word, then arguments; byte strings as hexadecimal digits
    stdin    raw bytes for the command          stdout, stderr  raw bytes from it
    files    a tar archive of /out, at the end

From outside: `arg HEX`, `env HEX`, `cwd HEX`, `tty ROWS COLUMNS`, `split-stderr`, `files`, `go`; then, while the
command runs, `size ROWS COLUMNS`, `signal NUMBER`, `eof TOTAL` (stdin ends after so many bytes), and `beat`, often.
To outside: `ready`, `started`, `alive` after each beat, `ended`, and when the rest of the output has gone `exit STATUS
STDOUT STDERR FILES TAR`: the command's status as a shell would have it, the bytes that were sent over the three ports,
and tar's status.
"""

from __future__ import annotations

import os
import select
import sys
import termios

CHUNK = 1 << 16
RESET_SIGNALS = (2, 3, 13, 25)
"""SIGINT and SIGQUIT, which shells have background jobs ignore; SIGPIPE and SIGXFSZ, which Python ignores."""
PIPE_CAPACITY = 1 << 16  # pipe(7); a terminal buffers less


class Pump:
    """Moves bytes from one file descriptor to another, neither ever blocking."""

    def __init__(self, source: int, sink: int) -> None:
        """Read from `source` until it ends, write to `sink` until it breaks."""
        self.source: int = source
        self.sink: int = sink
        self.moved = 0
        self.ended = False
        self._pending = memoryview(b"")
        os.set_blocking(source, False)
        os.set_blocking(sink, False)

    def wants(self) -> tuple[int, int]:
        """Return the file descriptor and the poll event that it waits for; -1 once it has ended."""
        if self._pending:
            return self.sink, select.POLLOUT
        return (-1 if self.ended else self.source), select.POLLIN

    def fill(self) -> bool:
        """Read if nothing is pending; return whether anything came."""
        if self._pending or self.ended:
            return False
        try:
            data = os.read(self.source, CHUNK)
        except BlockingIOError:
            return False
        except OSError:  # EIO: a terminal that nobody holds any more
            data = b""
        self.ended = not data
        self._pending = memoryview(data)
        return bool(data)

    def drain(self) -> None:
        """Write as much of what is pending as the sink takes; a broken sink swallows all."""
        while self._pending:
            try:
                done = os.write(self.sink, self._pending)
            except BlockingIOError:
                return
            except OSError:
                done = len(self._pending)
            self.moved += done
            self._pending = self._pending[done:]

    def flush(self) -> None:
        """Write all that is pending, waiting for the sink as long as it takes."""
        while True:
            self.drain()
            if not self._pending:
                return
            poll = select.poll()
            poll.register(self.sink, select.POLLOUT)
            poll.poll()

    def step(self) -> None:
        """Move what can be moved now."""
        self.drain()
        self.fill()
        self.drain()


class Request:
    """What the outside asked for."""

    def __init__(self) -> None:
        """Start with an empty request."""
        self.argv: list[bytes] = []
        self.env: list[bytes] = []
        self.cwd = b"/"
        self.size: tuple[int, int] | None = None
        self.split_stderr = False
        self.files = False

    def take(self, word: str, arguments: list[str]) -> None:
        """Add one line's worth."""
        if word == "arg":
            self.argv.append(bytes.fromhex("".join(arguments)))
        elif word == "env":
            self.env.append(bytes.fromhex("".join(arguments)))
        elif word == "cwd":
            self.cwd = bytes.fromhex("".join(arguments))
        elif word == "tty":
            self.size = (int(arguments[0]), int(arguments[1]))
        elif word == "split-stderr":
            self.split_stderr = True
        elif word == "files":
            self.files = True


class Agent:
    """One command's life."""

    def __init__(self, ports: dict[str, int], out: str) -> None:
        """Take the ports' file descriptors by name, and the folder whose content is wanted back."""
        self._ports = ports
        self._out = out
        self._lines = b""
        self._request = Request()
        self._pid = -1
        self._pidfd = -1
        self._terminal = -1
        self._status: int | None = None
        self._total_in: int | None = None
        self._pumps: dict[str, Pump] = {}
        os.set_blocking(ports["control"], False)

    def serve(self) -> None:
        """Run the command that comes over the control port; return when all its output is sent and its exit told."""
        self._tell("ready")
        while self._status is None:
            self._wait()
            self._read_control()
            for pump in self._pumps.values():
                pump.step()
            self._end_input()
            self._reap()
        self._tell("ended")
        for name in ("stdout", "stderr"):
            self._send_rest(name)
        tar = self._send_files() if self._request.files else 0
        counts = [self._pumps[name].moved if name in self._pumps else 0 for name in ("stdout", "stderr", "files")]
        self._tell("exit", self._status, *counts, tar)

    def _tell(self, *words: object) -> None:
        # Short lines, which the port always has room for: the outside reads them at once.
        os.write(self._ports["control"], (" ".join(map(str, words)) + "\n").encode())

    def _wait(self) -> None:
        """Sleep until something can be done."""
        poll = select.poll()
        poll.register(self._ports["control"], select.POLLIN)
        if self._pidfd >= 0:
            poll.register(self._pidfd, select.POLLIN)
        events: dict[int, int] = {}
        for pump in self._pumps.values():
            descriptor, event = pump.wants()
            events[descriptor] = (
                events.get(descriptor, 0) | event
            )  # a terminal is the sink of one, the source of another
        for descriptor, event in events.items():
            if descriptor >= 0:
                poll.register(descriptor, event)
        poll.poll()

    def _read_control(self) -> None:
        try:
            self._lines += os.read(self._ports["control"], CHUNK)
        except BlockingIOError:
            return
        *lines, self._lines = self._lines.split(b"\n")
        for line in lines:
            word, *arguments = line.decode().split()
            if word == "go":
                self._start()
            elif word == "eof":
                self._total_in = int(arguments[0])
            elif word == "size" and self._terminal >= 0:
                termios.tcsetwinsize(self._terminal, (int(arguments[0]), int(arguments[1])))
            elif word == "signal" and self._pid > 0:
                self._signal(int(arguments[0]))
            elif word == "beat":
                wake_all()
                self._tell("alive")
            else:
                self._request.take(word, arguments)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._pid, number)
        except ProcessLookupError:
            pass  # it is just ending

    def _start(self) -> None:
        """Start the command as leader of its own session, at the end of pipes or of a terminal."""
        request = self._request
        actions: list[tuple[object, ...]] = []
        if request.size is None:
            stdin, feed = os.pipe()
            output, stdout = os.pipe()
            actions.append((os.POSIX_SPAWN_DUP2, stdin, 0))
        else:
            # Our copy of the slave stays open: the terminal outlives any of the command's processes.
            self._terminal, stdin = os.openpty()
            feed, output, stdout = os.dup(self._terminal), self._terminal, os.dup(stdin)
            termios.tcsetwinsize(self._terminal, request.size)
            # Opened by the leader of a session without a terminal, it becomes the controlling one.
            actions.append((os.POSIX_SPAWN_OPEN, 0, os.ttyname(stdin), os.O_RDWR, 0))
        errors, stderr = os.pipe() if request.size is None or request.split_stderr else (-1, os.dup(stdout))
        actions += [(os.POSIX_SPAWN_DUP2, stdout, 1), (os.POSIX_SPAWN_DUP2, stderr, 2)]
        self._pumps["stdin"] = Pump(self._ports["stdin"], feed)
        self._pumps["stdout"] = Pump(output, self._ports["stdout"])
        if errors >= 0:
            self._pumps["stderr"] = Pump(errors, self._ports["stderr"])
        self._spawn(actions, stderr)
        for descriptor in (stdout, stderr) if request.size else (stdin, stdout, stderr):
            os.close(descriptor)
        self._tell("started")

    def _spawn(self, actions: list[tuple[object, ...]], stderr: int) -> None:
        """Start the process; what prevents it is said on the command's stderr, with a shell's statuses for it."""
        request = self._request
        environment = dict(pair.split(b"=", 1) for pair in request.env)
        os.environb[b"PATH"] = environment.get(b"PATH", b"/usr/bin")  # where posix_spawnp looks
        try:
            os.chdir(request.cwd)
            self._pid = os.posix_spawnp(
                request.argv[0],
                request.argv,
                environment,
                file_actions=actions,
                setsid=True,
                setsigdef=RESET_SIGNALS,
            )
            self._pidfd = os.pidfd_open(self._pid)
        except OSError as error:
            name = os.fsdecode(request.argv[0])
            os.write(stderr, f"emulated-host: {name}: {error.strerror}\n".encode())
            self._status = 127 if isinstance(error, FileNotFoundError) else 126

    def _end_input(self) -> None:
        """Close the command's stdin once all of it was delivered."""
        pump = self._pumps.get("stdin")
        if pump and self._terminal < 0 and pump.moved == self._total_in:
            os.close(pump.sink)
            del self._pumps["stdin"]

    def _reap(self) -> None:
        """Bury whatever ended, as process 1 must; note the command's status as a shell would."""
        try:
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return
                if pid == self._pid:
                    code = os.waitstatus_to_exitcode(status)
                    self._status = 128 - code if code < 0 else code
        except ChildProcessError:
            return

    def _send_rest(self, name: str) -> None:
        """Send what the command left in a pipe or terminal, and not what its surviving children go on to write."""
        pump = self._pumps.get(name)
        if pump is None:
            return
        pump.flush()
        limit = pump.moved + PIPE_CAPACITY
        while pump.moved < limit and pump.fill():
            pump.flush()

    def _send_files(self) -> int:
        """Send the folder whose content is wanted as a tar archive; return tar's status."""
        source, sink = os.pipe()
        argv = ["tar", "-C", self._out, "-cf", "-", "."]
        actions = [(os.POSIX_SPAWN_DUP2, sink, 1)]
        pid = os.posix_spawnp("tar", argv, dict(os.environ), file_actions=actions)
        os.close(sink)
        pump = self._pumps["files"] = Pump(source, self._ports["files"])
        os.set_blocking(source, True)
        while pump.fill():
            pump.flush()
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def wake_all() -> None:
    """Go from CPU to CPU: each gets an interrupt, which brings those that QEMU has forgotten (session.BEAT_SECONDS)."""
    all_of_them = os.sched_getaffinity(0)
    if len(all_of_them) > 1:
        for cpu in all_of_them:
            os.sched_setaffinity(0, {cpu})
        os.sched_setaffinity(0, all_of_them)


def open_ports() -> dict[str, int]:
    """Open the five ports, which appear one after another once the driver is loaded."""
    names = ("control", "stdin", "stdout", "stderr", "files")
    devices: dict[str, str] = {}
    while not all(name in devices for name in names):
        for device in os.listdir("/sys/class/virtio-ports"):
            try:
                with open(f"/sys/class/virtio-ports/{device}/name", "rb") as file:  # pathlib is a slow import
                    devices[file.read().decode().strip()] = device
            except OSError:
                pass  # not named yet
        select.select([], [], [], 0.01)
    return {name: os.open(f"/dev/{devices[name]}", os.O_RDWR) for name in names}


def hold_kvm() -> list[int]:
    """Keep two idle VMs, with and without irqchip, as long as this process lives; return what keeps them.

    KVM patches the kernel's code when the first VM appears and when the last one goes, and likewise for irqchips. On
    more than one CPU QEMU 7.2's TCG sometimes goes on running the old code: both CPUs then trap on the breakpoint of a
    patch that is long finished, for ever. With these VMs there is no first and no last.
    """
    import fcntl  # noqa: PLC0415 - process 1 alone needs it

    create_vm, create_irqchip, create_vcpu = 0xAE01, 0xAE60, 0xAE41
    try:
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return []  # no KVM: the command will say so
    held = [kvm]
    for with_irqchip in (False, True):
        vm = fcntl.ioctl(kvm, create_vm, 0)
        if with_irqchip:
            fcntl.ioctl(vm, create_irqchip, 0)
        held += [vm, fcntl.ioctl(vm, create_vcpu, 0)]
    for fd in held:
        os.set_inheritable(fd, False)
    return held


def main() -> None:
    """Serve one command over the virtio ports, or, for tests, over descriptors: FOLDER NAME=NUMBER..."""
    if len(sys.argv) > 1:
        Agent({name: int(number) for name, number in (pair.split("=") for pair in sys.argv[2:])}, sys.argv[1]).serve()
        return
    held = hold_kvm()
    Agent(open_ports(), "/out").serve()
    del held
    select.select([], [], [])  # process 1 may not end; the outside ends the machine


if __name__ == "__main__":
    main()
