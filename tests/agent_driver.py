"""The guest's agent as a process of this host, over a socket; and its line in bytes, restated from PROTOCOL.md."""

import contextlib
import os
import socket
import struct
import subprocess

from hypervisor.testing import Agent, program
from hypervisor.testing.transport import SocketLine

HELLO = bytes.fromhex("c4 bf 82 aa 92 bc dd e6 cf db 81 81 97 a3 ba e7")
WELCOME = bytes.fromhex("a0 8e bd ab f8 e7 94 dd fc 9c ad e1 f7 bb f7 e3")
START, DATA, SIGNAL, CREDIT, CLOSE, EXIT, FAILED = range(1, 8)
WINDOW = 1 << 18


def frame(kind, number, payload=b"", stream=0):
    return struct.pack("<BBHII", kind, stream, 0, number, len(payload)) + payload + b"\0"


def start(number, *arguments, operation=0, flags=2, folder=b"/", window=WINDOW, variables=()):
    head = struct.pack("<BBHHHI", operation, flags, len(arguments), len(variables), 0, window)
    return frame(START, number, head + b"".join(text + b"\0" for text in (folder, *arguments, *variables)))


@contextlib.contextmanager
def agent_process():
    """Start the program; yields it and the socket that leads to it."""
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    process = subprocess.Popen([program(), str(theirs.fileno())], pass_fds=[theirs.fileno()])
    theirs.close()
    with process, ours:
        try:
            yield process, ours
        finally:
            ours.close()
            try:
                process.wait(60)
            finally:
                process.kill()


@contextlib.contextmanager
def connected():
    """Start the program and yield an Agent for it."""
    with agent_process() as (_, end):
        line = SocketLine(end)
        with Agent(line) as agent:
            yield agent


class Line:
    """The host's end, byte by byte."""

    def __init__(self, end):
        self.end = end
        self.held = b""

    def send(self, data):
        self.end.sendall(data)

    def read(self, size):
        while len(self.held) < size:
            data = self.end.recv(65536)
            assert data, "the agent has gone"
            self.held += data
        data, self.held = self.held[:size], self.held[size:]
        return data

    def greet(self, flags=1):
        """Send a HELLO and read up to its answer; return the four numbers of it."""
        nonce = os.urandom(16)
        self.send(HELLO + nonce + struct.pack("<I", flags))
        while WELCOME + nonce not in self.held or not self.held.split(WELCOME + nonce)[1][15:]:
            data = self.end.recv(65536)
            assert data, "the agent has gone"
            self.held += data
        self.held = self.held.split(WELCOME + nonce)[1]
        return struct.unpack("<IIII", self.read(16))

    def frame(self):
        """Return the next frame: kind, stream, number, payload."""
        kind, stream, zero, number, length = struct.unpack("<BBHII", self.read(12))
        payload = self.read(length)
        assert zero == 0
        assert self.read(1) == b"\0"
        return kind, stream, number, payload

    def all_of(self, number):
        """Read until a command is over; return how it ended and its outputs."""
        outputs, over = {1: b"", 2: b""}, set()
        while len(over) < 3:
            kind, stream, about, payload = self.frame()
            assert about == number
            if kind == DATA and payload:
                outputs[stream] += payload
            elif kind == DATA:
                over.add(stream)
            elif kind in {EXIT, FAILED}:
                over.add(0)
                end = (kind, *struct.unpack("<II", payload))
                if kind == FAILED:
                    break
        return end, outputs[1], outputs[2]
