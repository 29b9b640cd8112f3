"""Networks under a stock kernel: a TAP, user networking, a link between two guests, and what a capture holds."""

import contextlib
import hashlib
import http.server
import os
import subprocess
import threading

import pytest
from guest_root import SHELL, root_disk
from linux_shell import QUIET

pytestmark = pytest.mark.hardware

IP = "/usr/bin/ip"  # busybox's shell takes its own `ip` otherwise
MIB = 1 << 20


def rooted(boot, **settings):
    """Boot Debian's kernel to a shell with Python, busybox and iperf3."""
    disks = [f"{root_disk()},overlay=memory"]
    return boot(disks=disks, append=f"{QUIET} root=/dev/vda rw {SHELL}", ram_mib=256, **settings)


def host_ip(*words):
    subprocess.run([IP, *words], check=True)


@pytest.fixture
def tap():
    """A TAP of the host at 10.9.0.1."""
    name = "hvtap0"
    host_ip("tuntap", "add", "dev", name, "mode", "tap")
    host_ip("addr", "add", "10.9.0.1/24", "dev", name)
    host_ip("link", "set", name, "up")
    yield name
    subprocess.run([IP, "link", "delete", name], check=False)


@pytest.fixture
def routable():
    """An address, a default route, which passt wants to pass on, and a router: of our own where there is none."""
    has_route = subprocess.run([IP, "route", "show", "default"], check=True, capture_output=True).stdout
    if not has_route:
        with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:  # who may ping by plain sockets
            file.write("0 2147483647")
        host_ip("netns", "add", "hvrouter")
        host_ip("link", "add", "hvveth0", "type", "veth", "peer", "name", "hvveth1", "netns", "hvrouter")
        host_ip("-n", "hvrouter", "addr", "add", "192.0.2.1/24", "dev", "hvveth1")
        host_ip("-n", "hvrouter", "link", "set", "hvveth1", "up")
        host_ip("addr", "add", "192.0.2.5/24", "dev", "hvveth0")
        host_ip("link", "set", "hvveth0", "up")
        host_ip("route", "add", "default", "via", "192.0.2.1", "dev", "hvveth0")
    yield
    if not has_route:
        host_ip("netns", "delete", "hvrouter")


class Files(http.server.BaseHTTPRequestHandler):
    """Gives `content` out and takes what is put."""

    content = b""
    taken = b""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def do_PUT(self):
        type(self).taken = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *words):
        pass


@contextlib.contextmanager
def files(address, content):
    Files.content, Files.taken = content, b""
    server = http.server.ThreadingHTTPServer((address, 0), Files)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


PUT = (
    "python3 -c \"import urllib.request as u; u.urlopen(u.Request('http://{}:{}/f', open('/mnt/f', 'rb').read(),"
    " method='PUT'))\""
)


def move_a_file_each_way(shell, address, port, content):
    """By HTTP: the guest gets a file, and puts it back."""
    shell.run("busybox mount -t tmpfs t /mnt")
    assert shell.run(f"busybox wget -q -O /mnt/f http://{address}:{port}/f && echo got", timeout=120) == "got"
    assert shell.run("sha256sum /mnt/f", timeout=60).split()[0] == hashlib.sha256(content).hexdigest()
    assert shell.run(PUT.format(address, port) + " && echo put", timeout=120) == "put"
    assert Files.taken == content


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_a_tap(boot, tap, virtio):
    """Ping, a 16 MiB file each way, iperf3 each way, with the kernel's offloads."""
    content = os.urandom(16 * MIB)
    shell = rooted(boot, nets=[f"tap={tap},mac=52:54:00:12:34:56"], virtio=virtio)
    assert shell.run("cat /sys/class/net/eth0/address") == "52:54:00:12:34:56"
    shell.run("ip addr add 10.9.0.2/24 dev eth0; ip link set eth0 up")
    assert " 0% packet loss" in shell.run("busybox ping -c 3 10.9.0.1")
    with files("10.9.0.1", content) as port:
        move_a_file_each_way(shell, "10.9.0.1", port, content)
    for way in ("", "-R"):
        server = subprocess.Popen(["iperf3", "-s", "-1", "-B", "10.9.0.1"], stdout=subprocess.DEVNULL)
        assert "iperf Done" in shell.run(f"iperf3 -c 10.9.0.1 {way} -t 2", timeout=60)
        server.wait(10)
    host_ip("link", "delete", tap)  # the guest learns that its cable is out, and lives
    assert shell.run("busybox ping -c 1 -W 1 10.9.0.1 >/dev/null; echo alive", timeout=60) == "alive"


def test_user_networking_and_what_is_captured(boot, routable, tmp_path):
    """DHCP, ping, a 16 MiB file each way, a forwarded port, all without root, and frames in a file."""
    content = os.urandom(16 * MIB)
    capture = tmp_path / "frames.pcap"
    shell = rooted(boot, nets=[f"user,forward=18080:80,pcap={capture}"])
    script = (
        "echo '#!/bin/sh\nip addr add $ip/24 dev eth0; ip route add default via $router; echo $router > /tmp/router'"
    )
    assert shell.run(f"{script} > /tmp/dhcp; chmod +x /tmp/dhcp; ip link set eth0 up; echo up") == "up"
    assert "obtained" in shell.run("busybox udhcpc -n -q -i eth0 -s /tmp/dhcp 2>&1", timeout=60)
    router = shell.run("cat /tmp/router")
    assert " 0% packet loss" in shell.run(f"busybox ping -c 2 {router}", timeout=60)
    with files("0.0.0.0", content) as port:  # noqa: S104 - the guest comes from no interface of its own
        move_a_file_each_way(shell, router, port, content)
    assert (
        shell.run("mkdir /tmp/www; echo from the guest > /tmp/www/index.html; busybox httpd -h /tmp/www; echo on")
        == "on"
    )
    fetched = subprocess.run(
        ["busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:18080/"], capture_output=True, check=True, timeout=60
    )
    assert fetched.stdout == b"from the guest\n"
    data = capture.read_bytes()
    assert data[:4] == bytes.fromhex("4d3cb2a1")  # little-endian, nanoseconds
    assert len(data) > 2 * len(content)


def test_two_guests_talk_over_a_link(boot, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one = rooted(boot, nets=["link=lab"])
    two = rooted(boot, nets=["link=lab"])
    for number, shell in ((1, one), (2, two)):
        shell.run(f"ip addr add 10.8.0.{number}/24 dev eth0; ip link set eth0 up")
    assert " 0% packet loss" in one.run("busybox ping -c 3 10.8.0.2", timeout=60)
    two.run("mkdir /tmp/w; echo over the link > /tmp/w/f; busybox httpd -h /tmp/w")
    assert one.run("busybox wget -q -O - http://10.8.0.2/f", timeout=60) == "over the link"
