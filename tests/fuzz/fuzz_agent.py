"""Coverage-guided fuzzing of what a guest's agent sends (needs atheris, the `fuzz` extra).

    python tests/fuzz/fuzz_agent.py TARGET [libFuzzer options]      e.g. agent_frames -runs=20000
    python tests/fuzz/fuzz_agent.py list

The property: whatever the guest sends, the host raises only what it means to, keeps a bounded amount of it, writes
nothing outside of the folder that it was asked to write to, and can begin a new conversation afterwards.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from struct import pack
from typing import TYPE_CHECKING

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

with atheris.instrument_imports(include=["hypervisor.testing"]):
    from hypervisor.testing import tree
    from hypervisor.testing.protocol import FrameReader, Operation, ProtocolError
    from hypervisor.testing.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable

WELCOME = bytes.fromhex("a08ebdabf8e794ddfc9cade1f7bbf7e3")
FACTS = pack("<IIII", 1, 1 << 18, 65536, 32)
LIMIT = 1 << 16


class Line:
    """A line whose other end is the fuzzer."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self.on_data: Callable[[bytes], None] = lambda _: None
        self.on_end: Callable[[], None] = lambda: None

    def send(self, data: bytes) -> None:
        self.sent.append(data)

    def drop(self) -> None:
        pass

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        pass


def pieces(source: atheris.FuzzedDataProvider) -> list[bytes]:
    """Mostly frames, so that what is behind the reader is reached too."""
    found = []
    while source.remaining_bytes() > 4:
        if source.ConsumeIntInRange(0, 7) == 0:
            found.append(source.ConsumeBytes(source.ConsumeIntInRange(0, 40)))
        else:
            payload = source.ConsumeBytes(source.PickValueInList([0, 4, 8, 8, source.ConsumeIntInRange(0, 60)]))
            kind, stream, number = (source.ConsumeIntInRange(0, most) for most in (8, 3, 3))
            found.append(pack("<BBHII", kind, stream, 0, number, len(payload)) + payload + b"\0")
    return found


def fuzz_frames(data: bytes) -> None:
    """The reader alone: any bytes, in any cut."""
    source = atheris.FuzzedDataProvider(data)
    reader = FrameReader()
    nonce = bytes(range(16))
    reader.expect(nonce)
    with contextlib.suppress(ProtocolError):
        if source.ConsumeBool():
            reader.feed(WELCOME + nonce + FACTS)
        for piece in pieces(source):
            cut = source.ConsumeIntInRange(0, len(piece))
            reader.feed(piece[:cut])
            reader.feed(piece[cut:])
            assert len(reader._held) <= (32 << 10) + 13
    reader.expect(nonce)
    assert reader.feed(WELCOME + nonce + FACTS)


def fuzz_session(data: bytes) -> None:
    """A conversation with two commands that run."""
    line = Line()
    session = Session(line)
    session.greet(keep=True, why="first")
    line.on_data(WELCOME + line.sent[-1][16:32] + FACTS)
    running = [session.start(Operation.RUN, [b"x"]) for _ in range(2)]
    session.close(running[1])
    for piece in pieces(atheris.FuzzedDataProvider(data)):
        line.on_data(piece)
    assert sum(len(output) for output in running[0].outputs.values()) <= 1 << 19
    assert not any(running[1].outputs.values())
    session.greet(keep=True, why="again")
    line.on_data(WELCOME + line.sent[-1][16:32] + FACTS)
    assert session.welcome is not None


def fuzz_tree(data: bytes) -> None:
    """A folder that a guest sends: nothing lands beside it."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        inside = os.path.join(folder, "inside")
        with contextlib.suppress(tree.TreeError, OSError):
            tree.unpack(io.BytesIO(data), inside, limit=LIMIT)
        assert set(os.listdir(folder)) <= {"inside"}


def entry(kind: int, name: bytes, more: bytes = b"") -> bytes:
    """Return a record of a tree."""
    return pack("<BBHI", kind, 0, len(name), 0o755) + name + more


TREE = entry(1, b"") + entry(2, b"a", pack("<I2sI", 2, b"hi", 0)) + entry(1, b"b") + entry(4, b"")
TREE += entry(3, b"l", pack("<I4s", 4, b"/tmp")) + entry(1, b"l") + entry(2, b"x", bytes(4)) + entry(4, b"") * 2
SEED = [bytes(64), bytes(range(256)), TREE, entry(2, b"", pack("<I2sI", 2, b"hi", 0))]
CHILD = "--child"
TARGETS = {"agent_frames": fuzz_frames, "agent_session": fuzz_session, "agent_tree": fuzz_tree}


def main(arguments: list[str]) -> int:
    """Write the seeds and run one target in a process of its own, as libFuzzer ends its process without a clean-up."""
    name = arguments[1] if len(arguments) > 1 else ""
    if name == CHILD:
        atheris.Setup([arguments[0], *arguments[3:]], TARGETS[arguments[2]])
        atheris.Fuzz()
    if name not in TARGETS:
        print("\n".join(TARGETS))
        return 0 if name == "list" else 2
    with tempfile.TemporaryDirectory() as folder:
        for index, seed in enumerate(SEED):
            Path(folder, f"seed{index}").write_bytes(seed)
        return subprocess.run([sys.executable, __file__, CHILD, *arguments[1:], folder], check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv))
