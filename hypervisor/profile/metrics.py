"""Prometheus scrapes a running machine: GET /metrics, over TCP or a unix socket.

One thread serves one client at a time and rests in between, so that the machine keeps its vCPUs' time whatever clients
do. Imported by those who ask for it: prometheus_client and Python's HTTP server take 100 ms to import.
"""

from __future__ import annotations

import errno
import io
import os
import select
import signal
import socket
import socketserver
import stat
import threading
import time
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app

from hypervisor.control import LONGEST_PATH, who_listens
from hypervisor.errors import ConfigError, HostError
from hypervisor.profile.report.prometheus import ProfileCollector

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from prometheus_client.metrics_core import Metric

    from hypervisor.profile.model import Profile

__all__ = ["MetricsServer", "parse_place"]

LOCAL: Final = "127.0.0.1"
PATH: Final = "/metrics"
HINT: Final = "it is PORT, HOST:PORT or unix=PATH"
FRESH_SECONDS: Final = 1.0
"""What has been collected serves everybody for so long."""
CLIENT_SECONDS: Final = 5.0
"""A client that takes longer is dropped."""
REST: Final = 9
"""After a client the thread rests for so many times the CPU time that it took: it has a tenth of a CPU at most."""
LEAST_REST, MOST_REST = 0.01, 2.0
BACKLOG: Final = 8


class Place(NamedTuple):
    """Where to listen: a port of a host, or (port -1) the path of a unix socket."""

    host: str
    port: int

    @property
    def is_unix(self) -> bool:
        """Whether it is a unix socket."""
        return self.port < 0


def parse_place(text: str | int) -> Place:
    """Return where to listen from PORT, HOST:PORT, [HOST]:PORT or unix=PATH; raises ConfigError."""
    words = str(text)
    if words.startswith("unix="):
        path = words.removeprefix("unix=")
        if not path or "\0" in path:
            raise ConfigError(f"--profile-metrics {words!r} names no socket", hint=HINT)
        if len(os.fsencode(path)) > LONGEST_PATH:
            raise ConfigError(
                f"socket {path}: the path is longer than {LONGEST_PATH} bytes", hint="choose a shorter one"
            )
        return Place(path, -1)
    host, colon, port = words.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and int(port) < 1 << 16) or (colon and not host):
        raise ConfigError(f"--profile-metrics {words!r}", hint=HINT)
    return Place(host or LOCAL, int(port))


class _Collector:
    """What the library asks for metrics: a running machine's, not older than a second."""

    def __init__(self, profile: Callable[[], Profile]) -> None:
        self._profile = profile
        self._until = 0.0
        self._metrics: list[Metric] = []

    def describe(self) -> list[Metric]:
        """Return nothing: the registry need not collect to know the names."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics."""
        if time.monotonic() >= self._until:
            self._metrics = list(ProfileCollector(self._profile()).collect())
            self._until = time.monotonic() + FRESH_SECONDS
        return iter(self._metrics)


class _Input(io.RawIOBase):
    """A connection's input, until it has taken too long."""

    def __init__(self, connection: socket.socket) -> None:
        super().__init__()
        self._connection = connection
        self._until = time.monotonic() + CLIENT_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._until - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._connection.settimeout(left)
        return self._connection.recv_into(buffer)


class _Handler(WSGIRequestHandler):
    """One request; says nothing on the terminal, which is the guest's."""

    def setup(self) -> None:
        super().setup()
        self.connection.settimeout(CLIENT_SECONDS)
        self.rfile = io.BufferedReader(_Input(self.connection))

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        del format, args

    def get_stderr(self) -> Any:
        return io.StringIO()


class _Server(WSGIServer):
    """A server that accepts at any kind of socket and looks no name up."""

    request_queue_size = BACKLOG

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = family
        super().__init__(address, _Handler)  # binds
        self.socket.setblocking(False)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)
        self.server_name = "hv"
        self.server_port = 0 if self.address_family == socket.AF_UNIX else self.socket.getsockname()[1]
        self.setup_environ()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = self.socket.accept()
        return connection, address or ("unix", 0)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Forget it: a client that was too slow, or has gone."""


def _bind(place: Place) -> _Server:
    """Listen at a place; raises ConfigError, HostError."""
    if place.is_unix:
        return _bind_unix(place.host)
    try:
        found = socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"--profile-metrics: no address is known of {place.host!r}", hint=HINT) from error
    family, _, _, _, address = found[0]
    where = f"port {place.port} of {place.host}"
    try:
        return _Server(family, address)
    except PermissionError as error:
        hint = "ports from 1024 up need no privilege"
        raise HostError(f"cannot listen at {where}: {error.strerror}", hint=hint) from error
    except OSError as error:
        hint = None
        if error.errno == errno.EADDRINUSE:
            hint = f"`ss -ltnp 'sport = :{place.port}'` shows whose it is; 0 takes any port that is free"
        if error.errno == errno.EADDRNOTAVAIL:
            hint = "it is no address of this host; 0.0.0.0 stands for all it has"
        raise HostError(f"cannot listen at {where}: {error.strerror}", hint=hint) from error


def _bind_unix(path: str) -> _Server:
    try:
        if stat.S_ISSOCK(os.lstat(path).st_mode) and who_listens(path) is None:
            os.unlink(path)  # of a process that is gone
    except OSError:
        pass  # binding tells
    try:
        return _Server(socket.AF_UNIX, path)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        hint = "somebody listens there, or it is another file: choose another path" if taken else None
        raise HostError(f"cannot listen at {path}: {error.strerror}", hint=hint) from error


class MetricsServer:
    """Serves a machine's metrics from `start` to `close`.

    Attributes:
        url: where they are.
    """

    def __init__(self, profile: Callable[[], Profile], where: str | int) -> None:
        """Listen at `where` (see `parse_place`), and serve what `profile` returns then.

        Raises:
            ConfigError: `where` is no place.
            HostError: it cannot be listened at.
        """
        place = parse_place(where)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Collector(profile))
        self._metrics = make_wsgi_app(registry)
        self._server = _bind(place)
        self._server.set_app(self._app)
        self._path = place.host if place.is_unix else ""
        self._own = os.lstat(self._path).st_ino if place.is_unix else 0
        host = f"[{place.host}]" if ":" in place.host else place.host
        self.url = f"unix={place.host}" if place.is_unix else f"http://{host}:{self._server.server_port}{PATH}"
        self._end_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Serve: the machine has been started."""
        self._thread = threading.Thread(target=self._run, name="hv-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End that. A client that is being served is let go first. May be called again."""
        if self._end_fd < 0:
            return
        os.eventfd_write(self._end_fd, 1)
        if self._thread is not None:
            self._thread.join()
        self._server.server_close()
        os.close(self._end_fd)
        self._end_fd = -1
        try:
            if self._path and os.lstat(self._path).st_ino == self._own:
                os.unlink(self._path)
        except OSError:
            pass  # somebody has removed it

    def _app(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if environ["PATH_INFO"] != PATH:
            start_response("404 Not Found", [("Content-Type", "text/plain; charset=utf-8")])
            return [f"{PATH} is what there is\n".encode()]
        answer: Iterable[bytes] = self._metrics(environ, start_response)
        return answer

    def _run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are the main thread's
        ready = select.poll()
        ready.register(self._end_fd, select.POLLIN)
        ready.register(self._server.fileno(), select.POLLIN)
        end_only = select.poll()
        end_only.register(self._end_fd, select.POLLIN)
        while self._end_fd not in dict(ready.poll()):
            began = time.thread_time()
            self._server.handle_request()
            rest = min(max(REST * (time.thread_time() - began), LEAST_REST), MOST_REST)
            end_only.poll(1000 * rest)
