"""Entropy, console ports, vsock and the balloon under a stock kernel."""

import os
import socket
import threading

import pytest
from guest_root import SHELL, root_disk
from linux_shell import COMMAND_SECONDS, QUIET
from waiting import until

pytestmark = pytest.mark.hardware

MIB = 1 << 20
ECHO = """python3 -c "
import socket
l = socket.socket(socket.AF_VSOCK); l.bind((socket.VMADDR_CID_ANY, 77)); l.listen()
print('LISTEN' + 'ING')
k, _ = l.accept(); n = 0
while True:
    x = k.recv(65536)
    if not x: break
    n += len(x); k.sendall(x)
k.close()
print('echoed', n)
"
"""
SEND = """python3 -c "
import socket
s = socket.socket(socket.AF_VSOCK); s.connect((2, 5000)); s.sendall(bytes(1000000)); s.shutdown(1)
d = b''
while True:
    x = s.recv(4096)
    if not x: break
    d += x
print('answer', len(d))
" """


@pytest.fixture(params=["pci", "mmio"])
def shell(request, boot, tmp_path):
    """A guest with one of each."""
    return boot(
        disks=[f"{root_disk()},overlay=memory"],
        rng=True,
        balloon=True,
        vsock=f"3,path={tmp_path}/vsock",
        ports=[f"socket={tmp_path}/hvc", f"agent,socket={tmp_path}/agent"],
        append=f"{QUIET} root=/dev/vda rw {SHELL}",
        ram_mib=512,
        cpus=2,
        virtio=request.param,
    )


def connect(path):
    end = socket.socket(socket.AF_UNIX)
    end.settimeout(COMMAND_SECONDS)
    end.connect(str(path))
    return end


def read_all(end):
    data = b""
    while chunk := end.recv(65536):
        data += chunk
    return data


def read_line(end):
    data = b""
    while not data.endswith(b"\n"):
        chunk = end.recv(100)
        assert chunk, data
        data += chunk
    return data.strip()


def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmRSS"))


def test_every_channel(shell, tmp_path):
    entropy(shell)
    ports(shell, tmp_path)
    vsock(shell, tmp_path)
    balloon(shell)


def entropy(shell):
    """FIPS 140-2 over a megabit; one block in 1250 may fail by chance."""
    shell.run("dd if=/dev/hwrng bs=1k count=200 of=/tmp/random 2>/dev/null")
    report = shell.run("rngtest < /tmp/random 2>&1")
    successes = int(report.split("FIPS 140-2 successes: ")[1].split()[0])
    failures = int(report.split("FIPS 140-2 failures: ")[1].split()[0])
    assert successes >= 78
    assert failures <= 2


def ports(shell, tmp_path):
    """Named ports and the second console, both ways."""
    end = connect(tmp_path / "agent")
    assert shell.run("cat /sys/class/virtio-ports/*/name") == "agent"
    shell.run("P=/dev/$(grep -l agent /sys/class/virtio-ports/*/name | cut -d/ -f5); echo to the host > $P")
    assert read_line(end) == b"to the host"
    shell.run("exec 3< $P")
    end.sendall(b"to the guest\n")
    assert shell.run("head -n 1 <&3") == "to the guest"
    shell.run("exec 3<&-")
    end.close()
    console = connect(tmp_path / "hvc")
    shell.run("echo on the console > /dev/hvc0")
    assert read_line(console) == b"on the console"
    console.close()


def vsock(shell, tmp_path):
    """A megabyte to the host and an answer; then the host connects, and everything it sends comes back."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "vsock_5000"))
    server.listen()
    got = []

    def serve():
        end, _ = server.accept()
        got.append(len(read_all(end)))
        end.sendall(bytes(1000))
        end.close()

    thread = threading.Thread(target=serve)
    thread.start()
    assert shell.run(SEND) == "answer 1000"
    thread.join(COMMAND_SECONDS)
    assert got == [1000000]
    server.close()
    shell.machine.console.write(ECHO)
    shell.machine.console.expect("LISTENING", timeout=COMMAND_SECONDS)
    end = connect(tmp_path / "vsock")
    end.sendall(b"CONNECT 77\n")
    assert end.recv(100).startswith(b"OK ")
    data = os.urandom(300000)
    thread = threading.Thread(target=lambda: (end.sendall(data), end.shutdown(socket.SHUT_WR)))
    thread.start()
    assert read_all(end) == data
    thread.join(COMMAND_SECONDS)
    assert shell.machine.console.expect(rb"echoed (\d+)\s", timeout=COMMAND_SECONDS)[1] == b"300000"
    nobody = connect(tmp_path / "vsock")
    nobody.sendall(b"CONNECT 78\n")
    assert nobody.recv(100) == b""
    nobody.close()
    end.close()
    shell.run("true")


def balloon(shell):
    """What the guest frees, reports or puts into the balloon comes back to the host."""
    shell.run("busybox mount -t tmpfs t /mnt; dd if=/dev/urandom of=/mnt/f bs=1M count=150 2>/dev/null")
    filled = resident_mib()
    shell.run("rm /mnt/f")
    until(lambda: resident_mib() < filled - 100, COMMAND_SECONDS)  # by free page reporting
    shell.machine.balloon.set_target(200)
    until(lambda: shell.machine.balloon.actual_mib == 200, COMMAND_SECONDS)
    assert int(shell.run("free -m | awk '/^Mem/ {print $4}'")) < 512 - 200
    shell.machine.balloon.set_target(0)
    until(lambda: shell.machine.balloon.actual_mib == 0, COMMAND_SECONDS)
    assert shell.machine.balloon.statistics["total"] > 400 * MIB
