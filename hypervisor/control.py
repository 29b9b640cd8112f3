"""Machines that can be looked at while they run: a socket with the machine's name, in a folder of its user's alone.

A client sends one line of JSON and gets one line back; `Control` serves them on the machine's event loop. A machine
that nobody looks at pays for one more file in its epoll set. A start must not wait for Python's socket module, which
takes 10 ms to import, so this uses the C module that is under it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from _socket import AF_UNIX, SO_PEERCRED, SOCK_STREAM, SOL_SOCKET, socket
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

from hypervisor.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterator

    from hypervisor.eventloop import LoopAlarm

__all__ = ["KINDS", "Control", "check_name", "default_name", "folder_of_machines", "machine_names", "who_listens"]

KINDS: Final = ("summary", "exits", "profile")
"""What can be asked for; `hypervisor.profile.forms` says what is in each."""
LONGEST_NAME: Final = 48
LONGEST_PATH: Final = 107
"""Bytes of a unix socket's path (unix(7))."""
LONGEST_LINE: Final = 8192
"""There may be a path in it, of up to 4096 bytes."""
MOST_CLIENTS: Final = 16
NS: Final = 1_000_000_000
REST_NS: Final = 10_000_000
"""A client that has been answered, and the next new one, wait so long: nobody keeps the loop busy."""
NO_FILES_NS: Final = NS
"""When the process has no file descriptor for a client, the next attempt is so much later."""
FRESH_NS: Final = 100_000_000
"""An answer serves everybody for so long, and for COST times the CPU time it took to make, if that is longer."""
COST: Final = 20
LOCK_SECONDS: Final = 1.0
MOST_SWEPT: Final = 32
_NAME_LETTERS: Final = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_.")
_LOCK: Final = ".lock"


# --- names and the folder ---------------------------------------------------------------------------------------------


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` can be a machine's name."""
    if not 1 <= len(name) <= LONGEST_NAME or name[0] == "." or not _NAME_LETTERS.issuperset(name):
        raise ConfigError(
            f"{name!r} is no name of a machine",
            hint=f"1 to {LONGEST_NAME} of a-z, A-Z, 0-9, '-', '_', '.'; no '.' first",
        )


def default_name(kernel: str | os.PathLike[str] | bytes) -> str:
    """Return a name for a machine of this process that runs `kernel`: its file's name and the process's number."""
    base = "guest" if isinstance(kernel, bytes) else os.path.basename(os.fspath(kernel))
    end = f"-{os.getpid()}"
    letters = "".join(letter if letter in _NAME_LETTERS else "_" for letter in base).lstrip(".")
    return (letters[: LONGEST_NAME - len(end)] or "guest") + end


def _base_folder() -> str:
    """Return where this user's machines are, the folder `machines` in it not included."""
    user = os.geteuid()
    for run in (os.environ.get("XDG_RUNTIME_DIR"), f"/run/user/{user}"):
        if run and os.path.isabs(run) and _is_usable(run, user):
            return os.path.join(run, "trapvisor")
    return f"/tmp/trapvisor-{user}"  # noqa: S108 - its owner is checked


def _is_usable(run: str, user: int) -> bool:
    """Whether a runtime folder is there, and is this user's: `su` and `sudo` may leave another's in the environment."""
    try:
        return os.stat(run).st_uid == user and os.access(run, os.W_OK | os.X_OK)
    except OSError:
        return False


def folder_of_machines(*, make: bool = False) -> str:
    """Return the folder of this user's machines.

    Args:
        make: make it where it is not there.

    Raises:
        HostError: it cannot be made, or others can write to it.
    """
    base = _base_folder()
    path = os.path.join(base, "machines")
    try:
        for folder, forbidden in ((base, 0o022), (path, 0o077)):
            if make:
                try:
                    os.mkdir(folder, 0o700)
                except FileExistsError:
                    pass
            status = os.lstat(folder)
            if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & forbidden:
                raise HostError(f"{folder} is not a folder of yours alone", hint=f"`rm -r {folder}`, or chmod 700")
    except FileNotFoundError as error:
        if make:
            raise HostError(f"cannot make {path}: {error.strerror}") from error
    except OSError as error:
        raise HostError(f"cannot use {path}: {error.strerror}") from error
    return path


def who_listens(path: str) -> int | None:
    """Return the process that serves a socket, 0 if it is too busy to say; None if it is gone."""
    probe = socket(AF_UNIX, SOCK_STREAM)
    try:
        probe.setblocking(False)
        probe.connect(path)
        return int.from_bytes(probe.getsockopt(SOL_SOCKET, SO_PEERCRED, 12)[:4], "little")
    except (ConnectionRefusedError, FileNotFoundError):
        return None
    except OSError:
        return 0
    finally:
        probe.close()


def machine_names(folder: str, known: Container[str] = ()) -> list[str]:
    """Return the names of the machines in a folder; what dead processes have left there is removed.

    Those of `known` names are not asked whether they live.
    """
    names = []
    for name in _entries(folder):
        if name not in known and who_listens(os.path.join(folder, name)) is None:
            _remove_dead(folder, name)
        else:
            names.append(name)
    return sorted(names)


def _entries(folder: str) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [one.name for one in entries if one.name[0] != "." and _is_socket(one)]
    except OSError:
        return []


def _is_socket(entry: os.DirEntry[str]) -> bool:
    return stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)


@contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Hold the folder's lock: who takes a name, or removes one, does it alone."""
    fd = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        until = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.001)
        yield
    finally:
        os.close(fd)


def _remove_dead(folder: str, name: str) -> None:
    """Remove the socket of a machine that is gone, unless a new one has taken its name meanwhile."""
    path = os.path.join(folder, name)
    try:
        with _locked(folder):
            if who_listens(path) is None:
                os.unlink(path)
    except OSError:
        pass  # somebody else has done it, or will


def _sweep(folder: str) -> None:
    """Remove what a few dead processes have left. Only those that their names say are dead are asked."""
    for name in _entries(folder)[:MOST_SWEPT]:
        number = name.rpartition("-")[2]
        if number.isdecimal() and not os.path.exists(f"/proc/{number}"):
            _remove_dead(folder, name)


def _listen(folder: str, name: str) -> socket:
    """Make the listening socket of a machine called `name`; raises ConfigError, HostError."""
    path = os.path.join(folder, name)
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise HostError(
            f"socket {path}: the path is longer than {LONGEST_PATH} bytes",
            hint="set XDG_RUNTIME_DIR to a folder with a shorter one",
        )
    server = socket(AF_UNIX, SOCK_STREAM)
    try:
        os.fchmod(server.fileno(), 0o600)  # bind gives the socket's file this mode (and the umask can only take away)
        server.setblocking(False)
        with _locked(folder):
            try:
                server.bind(path)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
                pid = who_listens(path)
                if pid is not None:
                    who = f"by process {pid}" if pid else "already"
                    raise ConfigError(
                        f"the machine's name {name!r} is taken {who}",
                        hint="choose another --name; `hv top` shows the machines that run",
                    ) from None
                os.unlink(path)
                server.bind(path)
            server.listen(MOST_CLIENTS)
    except OSError as error:
        server.close()
        raise HostError(f"cannot publish the machine as {path}: {error.strerror}") from error
    except ConfigError:
        server.close()
        raise
    return server


# --- the server -------------------------------------------------------------------------------------------------------


class Loop(Protocol):
    """What of `hypervisor.eventloop.EventLoop` serves clients."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is readable."""

    def unwatch(self, fd: int) -> None:
        """Stop that."""

    def watch_writable(self, fd: int, callback: Callable[[], None]) -> None:
        """Call back whenever `fd` is writable."""

    def unwatch_writable(self, fd: int) -> None:
        """Stop that."""

    def alarm(self, callback: Callable[[], None]) -> LoopAlarm:
        """Make a timer."""

    def call_soon(self, callback: Callable[[], None]) -> None:
        """Call back once."""


class _Client:
    """One connection: what it has sent and not yet been answered, and what of its answer is still to be sent."""

    __slots__ = ("connection", "fd", "received", "seen", "unsent")

    def __init__(self, connection: socket) -> None:
        self.connection = connection
        self.fd = connection.fileno()
        self.received = b""
        self.unsent = memoryview(b"")
        self.seen = 0


class Control:
    """A machine's name and who asks there.

    Whatever clients do, they take a bounded share of memory and of the loop's time: MOST_CLIENTS connections, each
    with one line and one answer, which is made once for all of them. When there are too many, the one that has been
    silent, or has not read its answer, for longest is dropped. All methods but `close` are the loop's thread's.

    Attributes:
        name: the machine's.
        path: the socket's.
    """

    def __init__(
        self,
        loop: Loop,
        name: str,
        answer: Callable[[str], dict[str, Any]],
        act: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], None] | None = None,
    ) -> None:
        """Take the name and serve it.

        Args:
            loop: calls back.
            name: see `check_name`.
            answer: returns what one of KINDS asks for.
            act: begins what a request says, `{"do": WHAT, ...}`, and has what it is given called with the answer, once,
                from any thread.

        Raises:
            ConfigError: a living machine has the name, or it is none.
            HostError: the host does not let us.
        """
        check_name(name)
        folder = folder_of_machines(make=True)
        _sweep(folder)
        self.name = name
        self.path = os.path.join(folder, name)
        self._answer_to = answer
        self._act = act
        self._loop = loop
        self._listener = _listen(folder, name)
        self._own = os.lstat(self.path).st_ino
        self._clients: dict[int, _Client] = {}
        self._resting: list[_Client] = []
        self._answers: dict[str, tuple[int, bytes]] = {}
        self._rest = loop.alarm(self._rested)
        self._accept_again = loop.alarm(lambda: loop.watch(self._listener.fileno(), self._accept))
        loop.watch(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Give the name back and drop all clients; the loop has ended."""
        try:
            if os.lstat(self.path).st_ino == self._own:  # or else somebody has removed it and another machine is there
                os.unlink(self.path)
        except OSError:
            pass
        self._listener.close()
        for client in self._clients.values():
            client.connection.close()
        self._clients.clear()

    def _accept(self) -> None:
        rest = REST_NS
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001 - the C module calls it so
            client = _Client(socket(fileno=fd))
            client.connection.setblocking(False)
        except (BlockingIOError, ConnectionAbortedError):
            return
        except OSError:
            rest = NO_FILES_NS
        else:
            if len(self._clients) >= MOST_CLIENTS:
                self._drop(min(self._clients.values(), key=lambda one: one.seen))
            client.seen = time.monotonic_ns()
            self._clients[client.fd] = client
            self._watch(client)
        self._loop.unwatch(self._listener.fileno())
        self._accept_again.set(time.monotonic_ns() + rest)

    def _watch(self, client: _Client) -> None:
        self._loop.watch(client.fd, lambda: self._receive(client))

    def _drop(self, client: _Client) -> None:
        self._loop.unwatch(client.fd)
        self._loop.unwatch_writable(client.fd)
        self._clients.pop(client.fd, None)
        if client in self._resting:
            self._resting.remove(client)
        client.connection.close()

    def _receive(self, client: _Client) -> None:
        try:
            data = client.connection.recv(LONGEST_LINE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        client.received += data
        if not data or (b"\n" not in client.received and len(client.received) > LONGEST_LINE):
            self._drop(client)
        else:
            self._serve(client)

    def _serve(self, client: _Client) -> None:
        """Answer the client's first line, if it is there."""
        line, end, rest = client.received.partition(b"\n")
        if not end:
            return
        client.received = rest
        client.seen = time.monotonic_ns()
        self._loop.unwatch(client.fd)
        request = _parse(line)
        if self._act is not None and isinstance(request.get("do"), str):
            self._act(request, lambda form: self._loop.call_soon(lambda: self._reply(client, form)))
        else:
            self._say(client, self._answer(request.get("get")))

    def _reply(self, client: _Client, form: dict[str, Any]) -> None:
        """Tell a client, if it is still there, how what it had asked to be done went."""
        import json  # noqa: PLC0415 - for those who ask

        if client in self._clients.values():
            self._say(client, json.dumps(form).encode())

    def _say(self, client: _Client, answer: bytes) -> None:
        client.unsent = memoryview(answer + b"\n")
        self._send(client)

    def _send(self, client: _Client) -> None:
        try:
            client.unsent = client.unsent[client.connection.send(client.unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            self._drop(client)
            return
        if client.unsent:
            self._loop.watch_writable(client.fd, lambda: self._send(client))
            return
        self._loop.unwatch_writable(client.fd)
        self._resting.append(client)
        if len(self._resting) == 1:
            self._rest.set(time.monotonic_ns() + REST_NS)

    def _rested(self) -> None:
        """Listen again to those that have been answered."""
        resting, self._resting = self._resting, []
        for client in resting:
            if b"\n" in client.received:
                self._serve(client)
            else:
                self._watch(client)

    def _answer(self, kind: Any) -> bytes:
        """Return the answer to what was asked for, made now or not long ago."""
        import json  # noqa: PLC0415 - for those who look

        if kind not in KINDS:
            return json.dumps({"error": f'it takes {{"get": WHAT}}, where WHAT is one of: {", ".join(KINDS)}'}).encode()
        now = time.monotonic_ns()
        until, data = self._answers.get(kind, (0, b""))
        if now < until:
            return data
        began = time.thread_time_ns()
        try:
            form = self._answer_to(kind)
        except Exception as error:  # noqa: BLE001 - to be looked at shall not end a machine, whatever its devices say
            form = {"error": f"{type(error).__name__}: {error}"}
        data = json.dumps(form, separators=(",", ":")).encode()
        took = time.thread_time_ns() - began
        if kind not in self._answers:
            took = 0  # the first one imports what it needs
        self._answers[kind] = time.monotonic_ns() + max(FRESH_NS, COST * took), data
        return data


def _parse(line: bytes) -> dict[str, Any]:
    """Return a request; {} for what is none."""
    import json  # noqa: PLC0415 - for those who ask

    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return request if isinstance(request, dict) else {}
