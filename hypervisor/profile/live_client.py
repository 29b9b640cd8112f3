"""Asks running machines how they are: the other end of `hypervisor.control`.

from hypervisor.profile.live_client import ask
ask("debian-1234", "summary")["vcpus"]
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from hypervisor.control import folder_of_machines, machine_names
from hypervisor.errors import ConfigError, HostError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Link", "Machines", "ask", "no_such_machine", "request"]

CHUNK: Final = 1 << 18
LARGEST: Final = 256 << 20
"""An answer that is longer is none of a machine's."""
SECONDS: Final = 5.0
BUSY_SECONDS: Final = 0.01


class Link:
    """A connection to one machine, which never waits.

    Attributes:
        name: the machine's.
        is_waiting: whether there is no answer yet to what was asked.
        is_open: False once the machine is gone.
    """

    def __init__(self, folder: str, name: str) -> None:
        """Connect; raises OSError when nobody is there."""
        self.name = name
        self.is_waiting = False
        self.is_open = True
        self._received: list[bytes] = []
        self._size = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._socket.setblocking(False)
            self._socket.connect(os.path.join(folder, name))
        except OSError:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """Return the socket."""
        return self._socket.fileno()

    def ask(self, kind: str) -> None:
        """Ask for one of `hypervisor.control.KINDS`, unless an answer is still to come."""
        self.request({"get": kind})

    def request(self, what: dict[str, Any]) -> None:
        """Send a request of `hypervisor.control`, unless an answer is still to come."""
        if self.is_waiting or not self.is_open:
            return
        try:
            self._socket.send(json.dumps(what).encode() + b"\n")
        except OSError:  # a line finds room in an empty socket: nobody is there
            self.close()
            return
        self.is_waiting = True

    def receive(self) -> dict[str, Any] | None:
        """Take what has come, and return the answer if it is whole."""
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return None
        except OSError:
            data = b""
        self._size += len(data)
        if not data or self._size > LARGEST:
            self.close()
            return None
        self._received.append(data)
        if not data.endswith(b"\n"):
            return None
        line = b"".join(self._received)
        self._received, self._size, self.is_waiting = [], 0, False
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            self.close()
            return None
        return answer

    def close(self) -> None:
        """Leave the machine alone."""
        self.is_open = False
        self.is_waiting = False
        self._socket.close()


class Machines:
    """This user's running machines, with a connection to each; they come and go.

    Attributes:
        links: by name, in order.
    """

    def __init__(self, selector: selectors.BaseSelector, on_answer: Callable[[str, dict[str, Any]], None]) -> None:
        """Have `selector` watch the connections, with a callback as data; answers go to `on_answer` with the name."""
        self.links: dict[str, Link] = {}
        self._selector = selector
        self._on_answer = on_answer
        self._folder = folder_of_machines()

    def look(self) -> None:
        """Find machines that are new; forget those that are gone."""
        for name in machine_names(self._folder, known=self.links):
            if name not in self.links:
                try:
                    self.links[name] = link = Link(self._folder, name)
                except OSError:  # gone again, or busy: the next look may find it
                    continue
                self._selector.register(link, selectors.EVENT_READ, lambda link=link: self._receive(link))
        self.links = dict(sorted(self.links.items()))

    def ask(self, kind_of: Callable[[str], str | None]) -> None:
        """Ask every machine for what `kind_of` says of its name."""
        for name, link in list(self.links.items()):
            kind = kind_of(name)
            if kind is not None:
                fd = link.fileno()
                link.ask(kind)
                if not link.is_open:
                    self._forget(link, fd)

    @property
    def are_waiting(self) -> bool:
        """Whether an answer is still to come."""
        return any(link.is_waiting for link in self.links.values())

    def _receive(self, link: Link) -> None:
        fd = link.fileno()
        answer = link.receive()
        if not link.is_open:
            self._forget(link, fd)
        elif answer is not None:
            self._on_answer(link.name, answer)

    def _forget(self, link: Link, fd: int) -> None:
        self._selector.unregister(fd)
        if self.links.get(link.name) is link:
            del self.links[link.name]

    def close(self) -> None:
        """Close all connections."""
        for link in list(self.links.values()):
            fd = link.fileno()
            link.close()
            self._forget(link, fd)


def no_such_machine(name: str, names: list[str]) -> ConfigError:
    """Return the error for a name that no machine has."""
    here = f"these run: {', '.join(names)}" if names else "none runs; `hv run KERNEL` starts one"
    return ConfigError(f"no machine is called {name!r}", hint=here)


def ask(name: str, kind: str, *, timeout: float = SECONDS) -> dict[str, Any]:
    """Return what a machine answers; see `hypervisor.profile.forms`.

    Raises:
        ConfigError: no machine has this name.
        HostError: it does not answer, or cannot.
    """
    return request(name, {"get": kind}, timeout=timeout)


def request(name: str, what: dict[str, Any], *, timeout: float = SECONDS) -> dict[str, Any]:
    """Return what a machine answers to a request of `hypervisor.control`; raises as `ask` does."""
    until = time.monotonic() + timeout
    link = _connect(name, until)
    try:
        link.request(what)
        with selectors.DefaultSelector() as selector:
            selector.register(link, selectors.EVENT_READ)
            while link.is_open and time.monotonic() < until:
                if selector.select(until - time.monotonic()) and (answer := link.receive()) is not None:
                    break
            else:
                raise HostError(f"machine {name!r} {'does not answer' if link.is_open else 'has ended'}")
    finally:
        link.close()
    if "error" in answer:
        raise HostError(f"machine {name!r} answers: {answer['error']}", hint=answer.get("hint"))
    return answer


def _connect(name: str, until: float) -> Link:
    """Connect to a machine, however many others want to."""
    folder = folder_of_machines()
    while True:
        try:
            return Link(folder, name)
        except BlockingIOError:
            if time.monotonic() > until:
                raise HostError(f"machine {name!r} does not answer") from None
            time.sleep(BUSY_SECONDS)
        except OSError:
            raise no_such_machine(name, machine_names(folder)) from None
