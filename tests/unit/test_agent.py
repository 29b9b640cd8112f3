"""Commands and files by the agent: the program itself, running here, over a socket."""

import contextlib
import errno
import hashlib
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
from agent_driver import agent_process, connected
from waiting import until

from hypervisor.errors import ConfigError
from hypervisor.testing import (
    Agent,
    AgentError,
    CommandError,
    CommandTimeout,
    GuestRefusal,
    OutputLimit,
    protocol,
)
from hypervisor.testing.transport import SocketLine
from hypervisor.testing.tree import TreeError

MIB = 1 << 20


@pytest.fixture(scope="module")
def agent():
    with connected() as one:
        yield one


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("exit 0", 0),
        ("exit 3", 3),
        ("exit 255", 255),
        ("kill -9 $$", -9),
        ("kill -SEGV $$", -11),
        ("kill -TERM $$", -15),
    ],
)
def test_statuses_are_those_of_subprocess(agent, command, status):
    assert subprocess.run(["/bin/sh", "-c", command], check=False).returncode == status
    assert agent.run(command).returncode == status


def test_outputs_are_apart_or_merged(agent):
    done = agent.run("echo out; echo err >&2")
    assert (done.args, done.returncode, done.stdout, done.stderr) == ("echo out; echo err >&2", 0, "out\n", "err\n")
    assert agent.run("echo out; echo err >&2", merge=True).stdout == "out\nerr\n"
    assert agent.run("echo out; echo err >&2", text=False)[2:] == (b"out\n", b"err\n")


def test_a_list_is_a_program_with_arguments_and_a_text_is_for_the_shell(agent):
    assert agent.run(["printf", "%s|", "a b", "", "$HOME", "*"]).stdout == "a b||$HOME|*|"
    assert agent.run("echo $HOME").stdout == "/root\n"


def test_environment_and_folder(agent, tmp_path):
    done = agent.run("echo $A; pwd; env", env={"A": "b c=d", "HOME": "/x"}, cwd=str(tmp_path))
    lines = done.stdout.splitlines()
    assert lines[:2] == ["b c=d", str(tmp_path)]
    names = {line.split("=")[0] for line in lines[2:]}
    assert names - {"PWD", "OLDPWD", "SHLVL", "_"} == {"A", "HOME", "PATH"}
    assert "HOME=/x" in lines


def test_path_is_searched_as_the_environment_says(agent, tmp_path):
    (tmp_path / "tool").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "tool").chmod(0o755)
    assert agent.run(["tool"], env={"PATH": f"/nowhere:{tmp_path}"}).stdout == "found\n"
    (tmp_path / "tool").chmod(0o644)
    with pytest.raises(GuestRefusal, match="cannot start tool: Permission denied") as caught:
        agent.run(["tool"], env={"PATH": f"/nowhere:{tmp_path}"})
    assert caught.value.errno == errno.EACCES


def test_what_cannot_be_started_says_why(agent):
    with pytest.raises(GuestRefusal, match="cannot start no-such: No such file or directory") as caught:
        agent.run(["no-such"])
    assert caught.value.errno == errno.ENOENT
    with pytest.raises(GuestRefusal, match="no such folder to start pwd in: No such file"):
        agent.run("pwd", cwd="/no/such")
    with pytest.raises(GuestRefusal, match="Not a directory"):
        agent.popen("pwd", cwd="/etc/passwd").wait()


def test_input_reaches_it_and_ends(agent):
    assert agent.run(["cat"], input="text ü").stdout == "text ü"
    assert agent.run(["cat"], input=bytes(range(256)), text=False).stdout == bytes(range(256))
    assert agent.run(["cat"]).stdout == ""
    assert agent.run("true", input=b"x" * MIB).returncode == 0  # it never reads it
    assert agent.run("exec <&-; sleep 0.1; echo done", input=b"x" * MIB).stdout == "done\n"


def test_much_input_and_output_at_once(agent):
    data = os.urandom(8 * MIB)
    done = agent.run("tee /dev/stderr", input=data, text=False)
    assert done.stdout == data
    assert done.stderr == data


def test_the_marks_of_the_protocol_are_data_as_any_other(agent):
    both = protocol.HELLO + protocol.WELCOME + bytes(16)
    for data in (
        both * 3,
        b"x" + protocol.HELLO,
        protocol.HELLO[:15],
        protocol.HELLO[:8] + protocol.HELLO,
        both * 9999,
    ):
        assert agent.run(["cat"], input=data, text=False).stdout == data


def test_check_raises_with_what_it_said(agent):
    with pytest.raises(CommandError, match=r"(?s)echo no.*status 4.*stderr.*no") as caught:
        agent.run("echo no >&2; exit 4", check=True)
    assert caught.value.returncode == 4
    assert caught.value.stderr == "no\n"
    with pytest.raises(CommandError, match="signal 9 ended it; it wrote nothing"):
        agent.run("kill -9 $$", check=True)


def test_a_timeout_kills_the_process_group_and_tells_what_ran(agent):
    began = time.monotonic()
    for seconds in (0.3, 3, 30):  # a busy host may not have come to the echo yet
        with pytest.raises(CommandTimeout, match=rf"(?s)sleep 1000.*not done after {seconds} s") as caught:
            agent.run("echo so far $$; sleep 1000 & wait", timeout=seconds)
        if "so far" in caught.value.stdout:
            break
    assert time.monotonic() - began < 120
    assert "so far" in str(caught.value)
    assert isinstance(caught.value, TimeoutError)
    assert isinstance(caught.value, AgentError)
    group = int(caught.value.stdout.split()[-1])
    until(lambda: not living(group))


def test_an_output_limit(agent):
    assert len(agent.run("head -c 100000 /dev/zero", limit=100000).stdout) == 100000
    with pytest.raises(OutputLimit, match=r"more than limit=100000 bytes"):
        agent.run("yes", limit=100000)
    assert agent.run("echo on").stdout == "on\n"


def test_bad_calls_are_refused_here(agent):
    for call in (
        lambda: agent.run(["a\0b"]),
        lambda: agent.run("true", env={"A=B": "c"}),
        lambda: agent.run("true", env={"": "c"}),
        lambda: agent.run([]),
        lambda: agent.run(["x"] * 5000),
        lambda: agent.run("x" * 300000),
        lambda: agent.run(["echo", protocol.HELLO.decode("utf-8", "surrogateescape")]),
    ):
        with pytest.raises(ValueError, match=r"NUL|variable|arguments|bytes"):
            call()
    assert agent.run("echo on").stdout == "on\n"


def test_many_commands_side_by_side(agent):
    """More than the agent's buffers hold, so that it finds no room again and again."""
    answers = {}

    def work(number):
        data = os.urandom(200000)
        answers[number] = agent.run("cat; exit $N", input=data, env={"N": str(number)}, text=False)[1:3] == (
            number,
            data,
        )

    for _ in range(8):
        answers.clear()
        threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert answers == dict.fromkeys(range(20), True)


def test_no_more_than_the_agent_can(agent):
    with contextlib.ExitStack() as stack:
        for _ in range(32):
            stack.enter_context(agent.popen("sleep 1000"))
        with pytest.raises(AgentError, match="32 commands run in the guest already"):
            agent.run("true")
    until(lambda: not agent._session._running)  # they have been killed, which takes its time
    assert agent.run("echo on").stdout == "on\n"


# --- processes -------------------------------------------------------------------------------------------------------


def test_a_conversation_with_a_process(agent):
    with agent.popen('while read line; do echo "<$line>"; done; echo end >&2; exit 7') as process:
        assert process.poll() is None
        for word in ("one", "two"):
            process.stdin.write(f"{word}\n")
            assert process.stdout.readline() == f"<{word}>\n"
        process.stdin.close()
        assert process.stdout.read() == ""
        assert process.stderr.read() == "end\n"
        assert process.wait(60) == 7
        assert process.returncode == 7


def test_signals(agent):
    with agent.popen("trap 'echo got it; exit 5' USR1; echo ready; while :; do sleep 0.01; done") as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "got it\n"
        assert process.wait(60) == 5
    with agent.popen(["sleep", "1000"]) as process:
        with pytest.raises(TimeoutError, match=r"sleep 1000: still runs after 0.05 s"):
            process.wait(0.05)
        process.terminate()
        assert process.wait(60) == -15


def test_the_status_comes_before_the_output_of_what_it_left_behind(agent):
    process = agent.popen("sleep 1000 & exit 2")
    assert process.wait(60) == 2
    process.kill()  # its group is still there
    assert process.stdout.read() == ""


def test_leaving_a_process_kills_it_and_closing_does_not(agent, tmp_path):
    with agent.popen("echo $$; sleep 1000") as process:
        left = int(process.stdout.readline())
    process = agent.popen(f"echo $$; sleep 0.2; echo alive > {tmp_path}/mark")
    process.stdout.readline()
    process.close()
    until((tmp_path / "mark").exists)
    until(lambda: not living(left))


def test_a_slow_reader_stops_the_writer_and_costs_no_memory(agent):
    with agent.popen("yes", text=False) as process:
        time.sleep(0.3)
        running = process._running
        assert len(running.outputs[1]) <= 256 << 10
        assert agent.run("echo others go on").stdout == "others go on\n"
        assert process.stdout.read(MIB) == b"y\n" * (MIB // 2)


def test_writing_to_what_has_ended(agent):
    with agent.popen("exit 0") as process:
        process.wait(60)
        with pytest.raises(BrokenPipeError):
            process.stdin.write("x")


def living(group):
    """Return the processes of a group that are no zombies (proc(5): state and group stand behind the name)."""
    found = []
    for folder in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{folder}/stat") as file:
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                found.append(folder)
    return found


# --- files -----------------------------------------------------------------------------------------------------------


def test_put_and_get(agent, tmp_path):
    data = os.urandom(300001)
    path = f"{tmp_path}/a/b/file"
    agent.put(data, path, mode=0o4750)
    assert os.stat(path).st_mode & 0o7777 == 0o4750
    assert agent.get(path) == data
    agent.put("text ü", path)
    assert agent.get(path).decode() == "text ü"
    assert os.stat(path).st_mode & 0o777 == 0o750
    agent.put(b"", f"{tmp_path}/empty")
    assert agent.get(f"{tmp_path}/empty") == b""
    assert os.stat(f"{tmp_path}/empty").st_mode & 0o777 == 0o644
    assert agent.get("/proc/version") == Path("/proc/version").read_bytes()


def test_what_files_refuse(agent, tmp_path):
    for call, number in (
        (lambda: agent.get("/no/such"), errno.ENOENT),
        (lambda: agent.get(str(tmp_path)), errno.EISDIR),
        (lambda: agent.put(b"x", str(tmp_path)), errno.EISDIR),
        (lambda: agent.put(b"x" * MIB, "/proc/version/x"), errno.ENOTDIR),
        (lambda: agent.copy_out("/no/such", tmp_path / "x"), errno.ENOENT),
        (lambda: agent.copy_out("/dev/null", tmp_path / "x"), errno.EOPNOTSUPP),
        (lambda: agent.copy_in(__file__, "/proc/version/x"), errno.ENOTDIR),
    ):
        with pytest.raises(GuestRefusal) as caught:
            call()
        assert caught.value.errno == number
    with pytest.raises(GuestRefusal, match=r"^reading /no/such: No such file or directory$"):
        agent.get("/no/such")
    with pytest.raises(OutputLimit):
        agent.get("/dev/zero", limit=MIB)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CommandTimeout, match=r"reading .*fifo: not done after 0.2 s"):
        agent.get(f"{tmp_path}/fifo", timeout=0.2)


def make_tree(root):
    (root / "deep" / "er").mkdir(parents=True)
    (root / "deep" / "er" / "file").write_bytes(os.urandom(200000))
    (root / "empty").mkdir()
    (root / "empty file").touch()
    (root / "deep" / "link").symlink_to("er/file")
    (root / "dangling").symlink_to("/no/such")
    (root / "to a folder").symlink_to("deep")
    (root / os.fsdecode(b"n\xff\n")).write_text("odd name")
    (root / "tool").write_text("#!/bin/sh\n")
    (root / "tool").chmod(0o4755)
    (root / "deep" / "er" / "file").chmod(0o400)
    (root / "deep").chmod(0o2711)


def listing(root):
    found = {}
    for folder, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            what = os.readlink(path) if os.path.islink(path) else None
            if os.path.isfile(path) and what is None:
                what = Path(path).read_bytes()
            found[os.path.relpath(path, root)] = (mode, what)
    return found


def test_folders_there_and_back(agent, tmp_path):
    source = tmp_path / "source"
    make_tree(source)
    wanted = listing(source)
    assert len(wanted) == 10
    agent.copy_in(source, f"{tmp_path}/new/guest")
    assert listing(tmp_path / "new" / "guest") == wanted
    agent.copy_out(f"{tmp_path}/new/guest", tmp_path / "other" / "back")
    assert listing(tmp_path / "other" / "back") == wanted
    agent.copy_in(source, f"{tmp_path}/new/guest")  # over what is there
    agent.copy_out(f"{tmp_path}/new/guest", tmp_path / "other" / "back")
    assert listing(tmp_path / "other" / "back") == wanted


def test_single_files_and_where_they_go(agent, tmp_path):
    (tmp_path / "one").write_text("1")
    (tmp_path / "one").chmod(0o700)
    (tmp_path / "link").symlink_to("one")
    agent.copy_in(tmp_path / "link", f"{tmp_path}/in/")
    assert (tmp_path / "in" / "link").read_text() == "1"
    assert not (tmp_path / "in" / "link").is_symlink()
    agent.copy_in(tmp_path / "one", f"{tmp_path}/in/renamed")
    assert (tmp_path / "in" / "renamed").stat().st_mode & 0o777 == 0o700
    agent.copy_out(f"{tmp_path}/link", f"{tmp_path}/out/")
    assert (tmp_path / "out" / "link").read_text() == "1"
    agent.copy_out(f"{tmp_path}/one", tmp_path / "out" / "x")
    assert (tmp_path / "out" / "x").stat().st_mode & 0o777 == 0o700
    with pytest.raises(TreeError, match="is a folder here"):
        agent.copy_out(f"{tmp_path}/one", tmp_path / "out")
    with pytest.raises(TreeError, match="more than limit=5 bytes"):
        agent.copy_out(f"{tmp_path}/one", tmp_path / "y", limit=5)
    with pytest.raises(FileNotFoundError):
        agent.copy_in(tmp_path / "no", "/x")
    os.mkfifo(tmp_path / "in" / "fifo")
    with pytest.raises(TreeError, match="neither a file"):
        agent.copy_in(tmp_path / "in", f"{tmp_path}/z")
    assert agent.run("echo on").stdout == "on\n"


def is_running(program):
    for link in Path("/proc").glob("[0-9]*/exe"):
        with contextlib.suppress(OSError):  # it has ended, or is the kernel's
            if link.readlink() == Path(program):
                return True
    return False


def test_a_running_program_can_be_replaced(agent, tmp_path):
    agent.copy_in("/bin/sleep", f"{tmp_path}/tool")
    with agent.popen([f"{tmp_path}/tool", "1000"]) as process:
        until(lambda: is_running(f"{tmp_path}/tool"))
        agent.copy_in("/bin/sleep", f"{tmp_path}/tool")
        agent.put(b"new", f"{tmp_path}/tool")
        assert process.poll() is None
    assert agent.get(f"{tmp_path}/tool") == b"new"


def test_64_mib_each_way_in_bounded_memory(agent, tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.writelines(os.urandom(1024) * 1024 for _ in range(64))
    before = peak_kib()
    agent.copy_in(tmp_path / "large", f"{tmp_path}/guest")
    agent.copy_out(f"{tmp_path}/guest", tmp_path / "back")
    assert peak_kib() - before < 16 << 10
    assert digest(tmp_path / "back") == digest(tmp_path / "large")


def peak_kib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- the guest itself ------------------------------------------------------------------------------------------------


def test_refreshing_is_checked_here(agent):
    for wrong in (
        {"mac": {"eth0": "52:54:00:00:00"}},
        {"mac": {"eth0": "52:54:00:00:00:0g"}},
        {"mac": {"a=b": "52:54:00:00:00:01"}},
        {"entropy": b""},
        {"entropy": bytes(5000)},
        {"machine_id": "x" * 32},
        {"machine_id": "a" * 33},
        {"hostname": ""},
        {"hostname": "a b"},
    ):
        with pytest.raises(ConfigError):
            agent.refresh(clock=False, **wrong)
    agent.refresh(clock=False)
    with pytest.raises(GuestRefusal, match=r"refreshing the guest: no-such"):
        agent.refresh(clock=False, mac={"no-such0": "52:54:00:00:00:01"})


# --- the conversation ------------------------------------------------------------------------------------------------


def test_a_new_conversation_ends_the_calls_of_the_old_one():
    with connected() as agent:
        process = agent.popen("echo $$; sleep 1000")
        number = int(process.stdout.readline())
        agent.resync(keep=True)
        with pytest.raises(AgentError, match="put back to another moment"):
            process.wait(60)
        with pytest.raises(AgentError, match="put back"):
            process.stdout.read()
        assert living(number)
        assert agent.run("echo on").stdout == "on\n"
        agent.resync(keep=False)
        until(lambda: not living(number))


def test_what_was_kept_is_drained_and_its_places_come_back():
    with connected() as agent:
        for _ in range(3):
            for _ in range(20):
                agent.popen("head -c 1000000 /dev/zero")
            agent.resync(keep=True)
            until(lambda: agent.run("echo on").stdout == "on\n")


def test_an_agent_that_dies():
    with agent_process() as (process, end), Agent(SocketLine(end)) as agent:
        running = agent.popen("sleep 1")
        process.kill()
        with pytest.raises(AgentError, match="the agent has gone"):
            running.wait(60)
        with pytest.raises(AgentError, match="the agent has gone"):
            agent.run("true")


def test_nobody_answers():
    ours, theirs = socket.socketpair()
    with theirs, Agent(SocketLine(ours)) as agent, pytest.raises(AgentError, match=r"has not answered after 0.2 s"):
        agent.ready(0.2)


def test_the_host_breaks_a_conversation_off_and_begins_another():
    with connected() as agent:
        agent.run("true")
        before = agent.received
        agent.run("echo some output")
        assert agent.received >= before + len("some output")

        def abort():
            until(lambda: agent._session._running)
            agent.abort("the guest has panicked")

        thread = threading.Thread(target=abort)
        thread.start()
        with pytest.raises(AgentError, match="the guest has panicked"):
            agent.run("sleep 1000")
        thread.join()
        assert agent.run("echo again").stdout == "again\n"
