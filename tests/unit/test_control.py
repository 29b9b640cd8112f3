"""The socket of a running machine: names, and clients that mean well or not."""

import json
import os
import socket
import stat
import time
from pathlib import Path

import pytest

from hypervisor import control
from hypervisor.control import Control, check_name, default_name, folder_of_machines, machine_names, who_listens
from hypervisor.errors import ConfigError, HostError


class FakeAlarm:
    def __init__(self, callback):
        self.callback = callback
        self.deadline_ns = None

    def set(self, deadline_ns):
        self.deadline_ns = deadline_ns


class FakeLoop:
    """An event loop that turns when it is told to; alarms fire at once then, whatever their time."""

    def __init__(self):
        self.readers, self.writers, self.alarms = {}, {}, []

    def call_soon(self, callback):
        callback()

    def watch(self, fd, callback):
        self.readers[fd] = callback

    def unwatch(self, fd):
        self.readers.pop(fd, None)

    def watch_writable(self, fd, callback):
        self.writers[fd] = callback

    def unwatch_writable(self, fd):
        self.writers.pop(fd, None)

    def alarm(self, callback):
        self.alarms.append(FakeAlarm(callback))
        return self.alarms[-1]

    def turn(self, times=4):
        for _ in range(times):
            for callback in [*self.readers.values(), *self.writers.values()]:
                callback()
            self.fire()

    def fire(self):
        for alarm in self.alarms:
            if alarm.deadline_ns is not None:
                alarm.deadline_ns = None
                alarm.callback()


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder


@pytest.fixture
def asked():
    return []


@pytest.fixture
def published(asked):
    """Return a maker of servers with their loops, closed when the test ends."""
    made = []

    def make(name="web", form=None, act=None):
        def answer(kind):
            asked.append(kind)
            return {"kind": kind} if form is None else form(kind)

        loop = FakeLoop()
        made.append(Control(loop, name, answer, act))
        return made[-1], loop

    yield make
    for server in made:
        server.close()


def connect(server):
    client = socket.socket(socket.AF_UNIX)
    client.connect(server.path)
    client.setblocking(False)
    return client


def received(client):
    data = b""
    try:
        while chunk := client.recv(1 << 20):
            data += chunk
    except BlockingIOError:
        return data
    return data + b"<end>"


def test_a_line_is_answered_with_a_line(published):
    server, loop = published()
    with connect(server) as client:
        client.send(b'{"get": "summary"}\n')
        loop.turn()
        assert json.loads(received(client)) == {"kind": "summary"}
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert json.loads(received(client)) == {"kind": "exits"}


def test_what_is_to_be_done_is_answered_when_it_is_done(published):
    begun = []
    server, loop = published(act=lambda request, reply: begun.append((request, reply)))
    with connect(server) as client, connect(server) as other:
        client.send(b'{"do": "save", "path": "/x"}\n')
        other.send(b'{"do": "save"}\n{"get": "summary"}\n')
        loop.turn()
        assert [request for request, _ in begun] == [{"do": "save", "path": "/x"}, {"do": "save"}]
        assert received(client) == received(other) == b"", "nothing is done yet"
        begun[0][1]({"done": 1})
        loop.turn()
        assert json.loads(received(client)) == {"done": 1}
        assert received(other) == b""
        begun[1][1]({"error": "no room"})
        loop.turn()
        assert received(other).splitlines() == [b'{"error": "no room"}', b'{"kind":"summary"}']


def test_a_client_that_left_before_it_was_done_is_no_trouble(published):
    begun = []
    server, loop = published(act=lambda request, reply: begun.append(reply))
    with connect(server) as client:
        client.send(b'{"do": "save"}\n')
        loop.turn()
    begun[0]({"done": 1})
    loop.turn()
    assert not server._clients


def test_a_machine_that_does_nothing_on_request_says_so(published):
    server, loop = published()
    with connect(server) as client:
        client.send(b'{"do": "save"}\n')
        loop.turn()
        assert "error" in json.loads(received(client))


def test_a_line_may_come_in_pieces_and_two_at_once(published):
    server, loop = published()
    with connect(server) as client:
        for byte in b'{"get": "summary"}':
            client.send(bytes([byte]))
            loop.turn()
        assert received(client) == b""
        client.send(b'\n{"get": "exits"}\n')
        loop.turn()
        assert [json.loads(line)["kind"] for line in received(client).splitlines()] == ["summary", "exits"]


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"\x00\xff\xfe", b"summary", b"{", b"[]", b"[" * 1000, b"1", b'"get"', b'{"get": "all"}'),
        *(b'{"get": ["summary"]}', b'{"get": null}', b'{"got": "summary"}', b'{"get": {"a": 1}}', b"NaN"),
    ],
)
def test_garbage_gets_an_error_that_says_what_is_taken(published, asked, line):
    server, loop = published()
    with connect(server) as client:
        client.send(line + b"\n")
        loop.turn()
        assert "summary, exits, profile" in json.loads(received(client))["error"]
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert json.loads(received(client)) == {"kind": "exits"}
    assert asked == ["exits"]


def test_a_line_without_an_end_is_not_kept(published):
    server, loop = published()
    with connect(server) as client:
        client.send(b"x" * 100_000)
        loop.turn(8)
        with pytest.raises(ConnectionResetError):
            received(client)
    assert not server._clients


def test_a_client_that_does_not_read_keeps_one_answer_and_nobody_waits(published):
    server, loop = published(form=lambda kind: {"kind": kind, "much": "x" * 5_000_000})
    with connect(server) as slow, connect(server) as quick:
        loop.turn()
        slow.send(b'{"get": "exits"}\n' * 50)
        loop.turn(20)
        quick.send(b'{"get": "summary"}\n')
        got = b""
        while not got.endswith(b"\n"):
            loop.turn(1)
            got += received(quick)
        assert json.loads(got)["kind"] == "summary"
        assert [len(one.received) <= 8192 and len(one.unsent) <= 5_000_100 for one in server._clients.values()] == [
            True,
            True,
        ]


def test_clients_come_and_go_and_leave_nothing(published):
    server, loop = published()
    for request in (b"", b"half a li", b'{"get": "exits"}\n', b'{"get": "exits"}\n{"get": "exits"}\n'):
        with connect(server) as client:
            loop.turn()
            client.send(request)
        loop.turn()
    assert not server._clients
    assert not loop.writers
    assert len(loop.readers) == 1


def test_a_client_that_goes_while_its_answer_is_sent_is_dropped(published):
    server, loop = published(form=lambda kind: {"much": "x" * 5_000_000})
    with connect(server) as client:
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert server._clients
    loop.turn()
    assert not server._clients
    assert not loop.writers


def test_of_too_many_clients_the_one_that_was_silent_longest_goes(published):
    server, loop = published()
    clients = []
    for _ in range(16):
        clients.append(connect(server))
        loop.turn()
    clients[0].send(b'{"get": "exits"}\n')
    loop.turn()
    assert received(clients[0])
    for _ in range(3):
        clients.append(connect(server))
        loop.turn()
    states = [received(client) == b"<end>" for client in clients]
    assert states == [False, True, True, True] + [False] * 15
    assert len(server._clients) == 16
    for client in clients:
        client.close()


def test_an_answer_is_made_once_for_all_who_ask_within_a_tenth_of_a_second(published, asked, monkeypatch):
    now = [10**12]
    monkeypatch.setattr(control.time, "monotonic_ns", lambda: now[0])
    server, loop = published()
    clients = [connect(server) for _ in range(5)]
    loop.turn(8)
    for client in clients:
        client.send(b'{"get": "exits"}\n')
    loop.turn()
    assert asked == ["exits"]
    now[0] += 99_000_000
    clients[0].send(b'{"get": "exits"}\n')
    loop.turn()
    assert asked == ["exits"]
    now[0] += 2_000_000
    clients[0].send(b'{"get": "exits"}\n')
    loop.turn()
    assert asked == ["exits", "exits"]
    for client in clients:
        client.close()


def test_an_answer_that_took_long_serves_longer(published, asked, monkeypatch):
    """A machine spends no more than a twentieth of its loop's time on being looked at; the first time is imports."""
    now, cpu = [10**12], [0]
    monkeypatch.setattr(control.time, "monotonic_ns", lambda: now[0])
    monkeypatch.setattr(control.time, "thread_time_ns", lambda: cpu[0])

    def form(kind):
        cpu[0] += 50_000_000
        return {}

    server, loop = published(form=form)
    with connect(server) as client:
        loop.turn()
        for pause, expected in ((0, 1), (110_000_000, 2), (990_000_000, 2), (20_000_000, 3)):
            now[0] += pause
            client.send(b'{"get": "exits"}\n')
            loop.turn()
            assert len(asked) == expected


def test_a_client_that_has_been_answered_rests(published):
    server, loop = published()
    with connect(server) as client:
        loop.turn()
        client.send(b'{"get": "exits"}\n' * 3)
        for callback in list(loop.readers.values()):
            callback()
        for _ in range(5):
            for callback in [*loop.readers.values(), *loop.writers.values()]:
                callback()
        assert received(client).count(b"\n") == 1
        loop.fire()
        assert received(client).count(b"\n") == 1


def test_what_cannot_be_said_is_an_error_and_the_machine_goes_on(published):
    def form(kind):
        raise ZeroDivisionError("a device's own")

    server, loop = published(form=form)
    with connect(server) as client:
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert json.loads(received(client)) == {"error": "ZeroDivisionError: a device's own"}


def test_a_process_without_descriptors_tries_again_later(published, monkeypatch):
    server, loop = published()
    with connect(server) as client:
        listener = server._listener

        class Full:
            fileno = listener.fileno

            def _accept(self):
                raise OSError(24, "Too many open files")

        server._listener = Full()
        loop.readers[listener.fileno()]()
        assert not loop.readers, "it would be called again and again"
        server._listener = listener
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert json.loads(received(client)) == {"kind": "exits"}


# --- names and sockets ------------------------------------------------------------------------------------------------


def test_socket_and_folder_are_the_users_alone(published, runtime):
    before = os.umask(0)
    try:
        server, _ = published("web")
    finally:
        os.umask(before)
    assert server.path == str(runtime / "trapvisor" / "machines" / "web")
    assert stat.S_IMODE(os.lstat(server.path).st_mode) == 0o600
    for folder in (runtime / "trapvisor", runtime / "trapvisor" / "machines"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_name_that_is_taken_is_refused_with_who_has_it(published):
    published("web")
    with pytest.raises(ConfigError, match=f"'web' is taken by process {os.getpid()}") as caught:
        published("web")
    assert "--name" in caught.value.hint
    published("web2")


def test_a_dead_machines_name_can_be_had(published, runtime):
    folder = folder_of_machines(make=True)
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(os.path.join(folder, "web"))
    dead.close()
    server, loop = published("web")
    with connect(server) as client:
        client.send(b'{"get": "exits"}\n')
        loop.turn()
        assert received(client)


def test_dead_sockets_are_removed_by_who_looks_living_ones_and_files_are_not(published):
    published("living")
    folder = folder_of_machines()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.path.join(folder, "dead"))
    with open(os.path.join(folder, "file"), "w") as file:
        file.write("somebody's")
    assert machine_names(folder) == ["living"]
    assert sorted(os.listdir(folder)) == [".lock", "file", "living"]


def test_publishing_removes_what_processes_that_died_have_left(published):
    folder = folder_of_machines(make=True)
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    for name in (f"guest-{most + 1}", f"guest-{os.getpid()}"):
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.path.join(folder, name))
    published("web")
    assert sorted(os.listdir(folder)) == [".lock", f"guest-{os.getpid()}", "web"]


def test_closing_removes_its_own_socket_only(published):
    first, _ = published("web")
    os.unlink(first.path)
    second, _ = published("web")
    first.close()
    assert who_listens(second.path) == os.getpid()
    second.close()
    assert who_listens(second.path) is None
    assert not os.path.exists(second.path)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "../x", "a b", "é", "a\n", "x" * 49, "a\0", "\x1b[2J"])
def test_names_that_are_none(name, published):
    with pytest.raises(ConfigError, match="no name of a machine"):
        published(name)


@pytest.mark.parametrize(
    ("kernel", "base"),
    [
        ("debian", "debian"),
        ("/a b/vm linux\x1b[2J", "vm_linux__2J"),
        ("../..", "guest"),
        (b"\xeb\xfe", "guest"),
        ("k" * 300, "k"),
        ("/x/\udcff", "_"),
    ],
)
def test_default_names_are_names(kernel, base):
    name = default_name(kernel)
    check_name(name)
    assert name.startswith(base)
    assert name.endswith(f"-{os.getpid()}")


def test_a_folder_that_others_can_write_to_is_refused(published, runtime):
    (runtime / "trapvisor").mkdir()
    (runtime / "trapvisor").chmod(0o777)
    with pytest.raises(HostError, match="not a folder of yours alone"):
        published()


def test_a_folder_that_is_a_link_is_refused(published, runtime, tmp_path):
    (runtime / "trapvisor").mkdir(mode=0o700)
    (runtime / "trapvisor" / "machines").symlink_to(tmp_path)
    with pytest.raises(HostError, match="not a folder of yours alone"):
        published()


def test_a_path_that_is_too_long_for_a_socket_is_said_so(published, runtime, monkeypatch):
    deep = runtime / ("d" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    with pytest.raises(HostError, match="longer than 107 bytes") as caught:
        published()
    assert "XDG_RUNTIME_DIR" in caught.value.hint


def test_a_runtime_folder_that_is_not_there_is_not_used(monkeypatch, runtime):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime / "gone"))
    user = os.geteuid()
    bases = (f"/run/user/{user}/trapvisor", f"/tmp/trapvisor-{user}")  # noqa: S108 - the rule says so
    assert folder_of_machines() in {f"{base}/machines" for base in bases}


def test_the_folders_lock_is_waited_for_but_not_for_ever(published, runtime, monkeypatch):
    import fcntl  # noqa: PLC0415 - this test's own

    monkeypatch.setattr(control, "LOCK_SECONDS", 0.05)
    folder = folder_of_machines(make=True)
    with open(os.path.join(folder, ".lock"), "w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        began = time.monotonic()
        with pytest.raises(HostError, match="cannot publish"):
            published()
        assert time.monotonic() - began < 60
    published()
