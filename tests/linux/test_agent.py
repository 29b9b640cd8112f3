"""The agent in real guests: commands, files, and what a copy of a machine has changed in it."""

import os
import time

import pytest
from guest_root import root_disk
from linux_shell import BOOT_SECONDS, COMMAND_SECONDS, QUIET
from waiting import until

from hypervisor import Machine, MachineConfig
from hypervisor.initramfs import build
from hypervisor.testing import RDINIT, Agent, CommandTimeout, GuestRefusal, initramfs, port

pytestmark = pytest.mark.hardware

OTHER = "52:54:00:aa:bb:cc"


@pytest.fixture
def guest(tmp_path):
    """Return a function that boots a kernel with the agent in its initramfs and returns the agent."""
    machines = []

    def start(kernel, *, append="", base=None, **settings):
        archive = initramfs(tmp_path / "root.cpio", kernel=kernel, base=base)
        config = MachineConfig(
            kernel, initrd=archive, append=f"{QUIET} {RDINIT} {append}", ports=[port()], decompress="host", **settings
        )
        machine = Machine(config)
        machines.append(machine)
        machine.start()
        agent = Agent.of(machine)
        agent.machine = machine
        agent.ready(BOOT_SECONDS)
        return agent

    yield start
    for machine in machines:
        machine.close()


@pytest.mark.parametrize("kernel", ["tiny", "debian"])
def test_a_guest_by_name(guest, kernel, tmp_path):
    agent = guest(kernel, nets=["none"])
    commands(agent)
    files(agent, tmp_path)
    its_own(agent)
    copies(agent)
    agent.resync(keep=False)
    assert agent.run("echo on").stdout == "on\n"


def commands(agent):
    done = agent.run("echo out; echo err >&2; exit 3", env={"A": "b"}, cwd="/etc")
    assert done[1:] == (3, "out\n", "err\n")
    assert agent.run(["cat", "-"], input=bytes(range(256)), text=False).stdout == bytes(range(256))
    assert agent.run("kill -9 $$").returncode == -9
    for seconds in (2, 20, 60):  # a busy host may not have begun in the first
        with pytest.raises(CommandTimeout) as caught:
            agent.run("echo begun; sleep 1000 & wait", timeout=seconds)
        if "begun" in str(caught.value):
            break
    assert "begun" in str(caught.value)
    with pytest.raises(GuestRefusal, match="cannot start no-such"):
        agent.run(["no-such"])
    process = agent.popen("while read x; do echo $x$x; done")
    for word in ("ab", "cd"):
        process.stdin.write(f"{word}\n")
        assert process.stdout.readline() == f"{word}{word}\n"
    process.stdin.close()
    assert process.wait(COMMAND_SECONDS) == 0


def files(agent, tmp_path):
    data = os.urandom(1 << 20)
    (tmp_path / "tree" / "sub").mkdir(parents=True)
    (tmp_path / "tree" / "sub" / "data").write_bytes(data)
    (tmp_path / "tree" / "link").symlink_to("sub/data")
    (tmp_path / "tree" / "sub").chmod(0o750)
    agent.copy_in(tmp_path / "tree", "/root/a/tree")
    assert agent.run("stat -c %a /root/a/tree/sub; readlink /root/a/tree/link").stdout == "750\nsub/data\n"
    assert agent.get("/root/a/tree/link") == data
    agent.put(data, "/root/a/tree/more", mode=0o600)
    agent.copy_out("/root/a/tree", tmp_path / "back")
    assert (tmp_path / "back" / "sub" / "data").read_bytes() == data
    assert (tmp_path / "back" / "more").stat().st_mode & 0o777 == 0o600
    assert os.readlink(tmp_path / "back" / "link") == "sub/data"


def its_own(agent):
    """The guest's first process is its own, and what the agent has mounted to begin with is not there."""
    assert agent.run("cat /proc/1/comm").stdout == "init\n"
    assert ".trapvisor" not in agent.get("/proc/mounts").decode()
    assert "Linux version" in agent.dmesg()


def copies(agent):
    """What `refresh` changes, in one call."""
    agent.run("ip link set eth0 up", check=True)
    agent.refresh(
        mac={"eth0": OTHER}, entropy=os.urandom(64), machine_id="0123456789abcdef" * 2, hostname="copy-7", clock=True
    )
    assert agent.get("/sys/class/net/eth0/address").decode().strip() == OTHER
    assert int(agent.get("/sys/class/net/eth0/flags"), 16) & 1  # IFF_UP
    assert agent.run("hostname; cat /etc/machine-id").stdout == "copy-7\n0123456789abcdef0123456789abcdef\n"
    assert abs(int(agent.run("date +%s").stdout) - time.time()) < 60


def test_a_guest_that_leaves_the_initramfs_for_its_root(guest):
    """Commands run where the guest's first process is, and the agent outlives the files that it was started from."""
    agent = guest(
        "debian",
        disks=[f"{root_disk()},overlay=memory"],
        append="root=/dev/vda rw init=/bin/busybox -- sh",
        ram_mib=512,
    )
    deadline = time.monotonic() + COMMAND_SECONDS
    while time.monotonic() < deadline:
        try:
            if agent.run("test -e /etc/debian_version").returncode == 0:
                break
        except GuestRefusal:
            pass  # it is just moving: there is no shell, neither here nor there
        time.sleep(0.2)
    assert agent.run("python3 -c 'print(6 * 7)'", check=True).stdout == "42\n"
    assert agent.run("ls -d /.trapvisor").returncode != 0
    agent.put("x", "/root/file")
    assert agent.run("cat /root/file").stdout == "x"


def test_the_users_own_initramfs(guest, tmp_path):
    """Packed, without any module in it, and with an init program that does not know of the agent."""
    (tmp_path / "init").write_text("#!/bin/sh\necho mine > /mine\nexec sleep 1000000\n")
    build(tmp_path / "own.cpio", init=tmp_path / "init", compress="gzip")
    agent = guest("debian", base=tmp_path / "own.cpio")
    deadline = time.monotonic() + COMMAND_SECONDS
    while agent.run("test -e /mine").returncode != 0 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert agent.run("cat /mine; uname -r").stdout.startswith("mine\n")


def test_a_guest_that_was_saved_and_restored(guest, tmp_path):
    """A new host's first call is one round trip to the agent as it was; what ran goes on."""
    agent = guest("tiny")
    process = agent.popen("echo ready; sleep 1000; echo never")
    assert process.stdout.readline() == "ready\n"
    agent.put("before", "/root/mark")
    machine = agent.machine
    machine.save(tmp_path / "snapshot")
    assert agent.run("echo on > /root/mark; cat /root/mark").stdout == "on\n"  # the conversation goes on here
    machine.close()
    with Machine.restore(tmp_path / "snapshot", clone=True) as copy:
        copy.start()
        again = Agent.of(copy)
        again.ready(COMMAND_SECONDS)
        assert again.get("/root/mark") == b"before"
        assert "echo never" in again.run("ps").stdout
        again.refresh(entropy=os.urandom(32), hostname="copy")
        assert again.run("hostname").stdout == "copy\n"
        again.resync(keep=False)
        until(lambda: "echo never" not in again.run("ps").stdout, COMMAND_SECONDS)  # they have died of their signal
