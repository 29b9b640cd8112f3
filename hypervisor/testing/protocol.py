"""What goes over the line between a host and an agent, from the host's side: agent/PROTOCOL.md in code.

Bytes in, values out. Nothing here believes what comes from the guest: lengths are bounded before anything is kept.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag
from struct import Struct
from typing import TYPE_CHECKING, Final, NamedTuple

from hypervisor.testing.errors import AgentError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Frame", "FrameReader", "Operation", "ProtocolError", "Type", "Welcome", "data_frames", "frame", "hello"]

VERSION: Final = 1
PORT_NAME: Final = "org.trapvisor.agent"
HELLO: Final = bytes.fromhex("c4bf82aa92bcdde6cfdb818197a3bae7")
WELCOME: Final = bytes.fromhex("a08ebdabf8e794ddfc9cade1f7bbf7e3")
NONCE: Final = 16
NOBODY: Final = bytes(NONCE)
"""The nonce of an agent that begins: nobody has greeted it yet."""
CHUNK: Final = 32 << 10
"""Most bytes of a payload from the agent, and of DATA to it."""
MOST_PAYLOAD: Final = 256 << 10
MOST_WINDOW: Final = 1 << 20
MOST_PROCESSES: Final = 1024
"""Bounds of what an agent may say of itself."""


class Type(IntEnum):
    """What a frame is."""

    START = 1
    DATA = 2
    SIGNAL = 3
    CREDIT = 4
    CLOSE = 5
    EXIT = 6
    FAILED = 7


class Operation(IntEnum):
    """What START starts."""

    RUN = 0
    GET = 1
    PUT = 2
    PACK = 3
    UNPACK = 4
    REFRESH = 5
    KERNEL_LOG = 6


class Flag(IntFlag):
    """Flags of START."""

    MERGE = 1
    NO_INPUT = 2


KEEP: Final = 1
"""Flag of HELLO: what runs goes on, unheard."""
HEADER: Final = Struct("<BBHII")
_HELLO_FLAGS: Final = Struct("<I")
_WELCOME: Final = Struct("<IIII")
_START: Final = Struct("<BBHHHI")
_PAIR: Final = Struct("<II")
_WORD: Final = Struct("<I")
_FROM_AGENT: Final = {
    int(Type.DATA): (0, CHUNK),
    int(Type.CREDIT): (4, 4),
    int(Type.EXIT): (8, 8),
    int(Type.FAILED): (8, 8),
}
"""Least and most bytes of the payload, by what an agent may send."""


class ProtocolError(AgentError):
    """The agent sent what it must not."""


class Frame(NamedTuple):
    """A frame from the agent."""

    type: int
    stream: int
    id: int
    payload: bytes

    def pair(self) -> tuple[int, int]:
        """Return the two numbers of EXIT and FAILED."""
        first, second = _PAIR.unpack(self.payload)
        return first, second

    def word(self) -> int:
        """Return the number of CREDIT."""
        return int(_WORD.unpack(self.payload)[0])


class Welcome(NamedTuple):
    """What an agent says of itself; `nonce` is that of the HELLO which it answers."""

    nonce: bytes
    version: int
    most_payload: int
    input_window: int
    most_processes: int


# --- to the agent ----------------------------------------------------------------------------------------------------


def hello(nonce: bytes, *, keep: bool) -> bytes:
    """Return what brings the agent into step; `keep`: what the host before has started goes on."""
    return HELLO + nonce + _HELLO_FLAGS.pack(KEEP if keep else 0)


def frame(type_: Type, id_: int, payload: bytes = b"", stream: int = 0) -> bytes:
    """Return a frame.

    Raises:
        ValueError: the payload is too large, or holds the mark of a HELLO.
    """
    if len(payload) > MOST_PAYLOAD:
        raise ValueError(f"{len(payload)} bytes of command and environment; at most {MOST_PAYLOAD}")
    if HELLO in payload:
        raise ValueError("the command holds the 16 bytes that begin a conversation with the agent")
    return HEADER.pack(type_, stream, 0, id_, len(payload)) + payload + b"\0"


def data_frames(id_: int, data: bytes) -> Iterator[bytes]:
    """Yield `data` as frames for a process's standard input; HELLO's mark, where it occurs, is cut in two."""
    while data:
        cut = data.find(HELLO, 0, CHUNK)
        size = CHUNK if cut < 0 else cut + len(HELLO) // 2
        yield frame(Type.DATA, id_, data[:size])
        data = data[size:]


def word(type_: Type, id_: int, value: int, stream: int = 0) -> bytes:
    """Return a frame with a number: SIGNAL, CREDIT."""
    return frame(type_, id_, _WORD.pack(value), stream)


def start(  # noqa: PLR0913 - the fields of the frame
    id_: int,
    operation: Operation,
    *,
    folder: bytes,
    arguments: Sequence[bytes],
    variables: Sequence[bytes] = (),
    flags: int = 0,
    window: int,
) -> bytes:
    """Return the frame that starts something.

    Raises:
        ValueError: a text holds a NUL, or all of them are too many or too long.
    """
    texts = [folder, *arguments, *variables]
    if any(b"\0" in text for text in texts):
        raise ValueError("a NUL in a command, its environment or its folder")
    if not arguments or len(texts) > 4000:
        raise ValueError(f"{len(arguments)} arguments and {len(variables)} variables; 1 to 4000 can be")
    head = _START.pack(operation, flags, len(arguments), len(variables), 0, window)
    return frame(Type.START, id_, head + b"".join(text + b"\0" for text in texts))


# --- from the agent --------------------------------------------------------------------------------------------------


class FrameReader:
    """Takes the line's bytes apart. It keeps at most one frame of them."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._nonce: bytes | None = None
        self._in_step = False

    def expect(self, nonce: bytes) -> None:
        """Take nothing any more until the answer to the HELLO with this nonce."""
        self._held.clear()
        self._nonce = nonce
        self._in_step = False

    def feed(self, data: bytes | memoryview) -> list[Frame | Welcome]:
        """Take what has come and return what is whole.

        Raises:
            ProtocolError: no agent sends this. What was whole before it is lost too; `expect` begins anew.
        """
        self._held += data
        found: list[Frame | Welcome] = []
        if not self._in_step:
            self._seek(found)
        if self._in_step:
            self._frames(found)
        return found

    def _seek(self, found: list[Frame | Welcome]) -> None:
        held = self._held
        while not self._in_step:
            at = held.find(WELCOME)
            if at < 0:
                del held[: max(len(held) - len(WELCOME) + 1, 0)]
                return
            size = len(WELCOME) + NONCE + _WELCOME.size
            if len(held) - at < size:
                del held[:at]
                return
            nonce = bytes(held[at + len(WELCOME) :][:NONCE])
            if nonce in {self._nonce, NOBODY}:
                found.append(_checked(Welcome(nonce, *_WELCOME.unpack_from(held, at + len(WELCOME) + NONCE))))
                self._in_step = nonce == self._nonce
                del held[: at + size]
            else:  # of another conversation; perhaps cut off, with another one inside
                del held[: at + len(WELCOME)]

    def _frames(self, found: list[Frame | Welcome]) -> None:
        held, at = self._held, 0
        while len(held) - at >= HEADER.size:
            type_, stream, zero, id_, length = HEADER.unpack_from(held, at)
            least, most = _FROM_AGENT.get(type_, (1, 0))
            if zero or not least <= length <= most or stream > 2:
                raise ProtocolError(f"the agent lost step: a frame of type {type_} with {length} bytes")
            end = at + HEADER.size + length
            if len(held) <= end:
                break
            if held[end]:
                raise ProtocolError(f"the agent lost step: a frame of type {type_} that does not end")
            found.append(Frame(type_, stream, id_, bytes(held[at + HEADER.size : end])))
            at = end + 1
        del held[:at]


def _checked(welcome: Welcome) -> Welcome:
    if welcome.version != VERSION:
        raise ProtocolError(f"the agent speaks version {welcome.version} of the protocol, this host {VERSION}")
    if not (0 < welcome.input_window <= MOST_WINDOW and 0 < welcome.most_processes <= MOST_PROCESSES):
        raise ProtocolError("the agent promises what it cannot keep")
    return welcome
