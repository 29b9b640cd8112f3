"""Networks under a stock kernel: a TAP, user networking, a link between two guests, and what a capture holds.

The host's side of each, its servers and its TAP, is in a network namespace that the test enters and takes away again:
the host's own interfaces, routes and ports are left alone, and nothing of them can answer in their place.
"""

import contextlib
import hashlib
import http
import http.server
import os
import subprocess
import threading

import pytest
from guest_root import SHELL, root_disk
from linux_shell import COMMAND_SECONDS, QUIET
from namespaces import entered, ip, make_tap, namespace

pytestmark = pytest.mark.hardware

MIB = 1 << 20
SPACE = f"hvhost{os.getpid()}"
ROUTER = f"hvrouter{os.getpid()}"
IPERF3_PORT = 5201


def rooted(boot, **settings):
    """Boot Debian's kernel to a shell with Python, busybox and iperf3."""
    disks = [f"{root_disk()},overlay=memory"]
    return boot(disks=disks, append=f"{QUIET} root=/dev/vda rw {SHELL}", ram_mib=256, **settings)


@pytest.fixture
def space():
    """A namespace of the host. This thread is in it, and so is what it starts: machines, servers, passt."""
    with namespace(SPACE), entered(SPACE):
        yield SPACE


@pytest.fixture
def tap(space):
    """A TAP at 10.9.0.1."""
    make_tap(space, "hvtap0", address="10.9.0.1/24")
    return "hvtap0"


@pytest.fixture
def uplink(space):
    """An address, a default route, which passt wants to pass on, and a router that answers."""
    with open("/proc/sys/net/ipv4/ping_group_range", "w") as file:  # who may ping by plain sockets
        file.write("0 2147483647")
    with namespace(ROUTER):
        ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1", "netns", ROUTER)
        ip("-n", ROUTER, "addr", "add", "192.0.2.1/24", "dev", "veth1")
        ip("-n", ROUTER, "link", "set", "veth1", "up")
        ip("addr", "add", "192.0.2.5/24", "dev", "veth0")
        ip("link", "set", "veth0", "up")
        ip("route", "add", "default", "via", "192.0.2.1", "dev", "veth0")
        yield


# --- addresses by DHCP ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def dhcp_server(folder, interface):
    """A server that has one address to give, 10.9.0.2."""
    (folder / "leases").touch()
    lines = (f"interface {interface}", "start 10.9.0.2", "end 10.9.0.2", "option subnet 255.255.255.0")
    lines += ("option router 10.9.0.1", f"lease_file {folder}/leases", f"pidfile {folder}/pid")
    (folder / "udhcpd.conf").write_text("\n".join(lines) + "\n")
    with subprocess.Popen(["busybox", "udhcpd", "-f", f"{folder}/udhcpd.conf"], stderr=subprocess.DEVNULL) as server:
        try:
            yield
        finally:
            server.terminate()


def take_a_lease(shell):
    """Let the guest's client ask; return its address and its router."""
    script = "#!/bin/sh\n"
    script += '[ -z "$mtu" ] || ip link set eth0 mtu $mtu; '  # passt offers a large one, which is what makes it quick
    script += "ip addr add $ip/24 dev eth0; ip route add default via $router; echo $ip $router > /tmp/lease"
    assert shell.run(f"echo '{script}' > /tmp/dhcp; chmod +x /tmp/dhcp; ip link set eth0 up; echo up") == "up"
    assert "obtained" in shell.run("busybox udhcpc -n -q -t 20 -O mtu -i eth0 -s /tmp/dhcp 2>&1")
    return shell.run("cat /tmp/lease").split()


def is_reached(shell, address):
    """Whether pings are answered, all of three; a busy host has half a minute for the last."""
    return " 0% packet loss" in shell.run(f"busybox ping -c 3 -W 30 {address}")


# --- a file each way ------------------------------------------------------------------------------------------------


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
        # Debian 12's passt resets a connection of the guest's when the other side sent nothing for 16 seconds.
        self.send_response_only(http.HTTPStatus.CONTINUE)
        self.end_headers()
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
    assert shell.run(f"busybox wget -q -O /mnt/f http://{address}:{port}/f && echo got") == "got"
    assert shell.run("sha256sum /mnt/f").split()[0] == hashlib.sha256(content).hexdigest()
    assert shell.run(PUT.format(address, port) + " && echo put") == "put"
    assert Files.taken == content


# --- iperf3 ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def iperf3_server():
    """A server in the namespace; it listens when this is entered."""
    words = ["iperf3", "--server", "--forceflush"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert any("listening" in line for line in iter(server.stdout.readline, ""))
            yield
        finally:
            server.kill()


def iperf3_from_the_guest(shell, address):
    """Both ways, to a server of the host."""
    for way in ("", "--reverse"):
        assert "iperf Done" in shell.run(f"iperf3 --client {address} {way} --time 2")


def iperf3_to_the_guest(shell, port):
    """Both ways, to a server in the guest, over a port of the host that leads there."""
    shell.run("iperf3 --server --daemon --forceflush --logfile /tmp/iperf3")
    assert shell.run("until grep -q listening /tmp/iperf3; do busybox usleep 100000; done; echo on") == "on"
    for way in ([], ["--reverse"]):
        words = ["iperf3", "--client", "127.0.0.1", "--port", str(port), *way, "--time", "2"]
        said = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
        assert "iperf Done" in said.stdout, said.stdout + said.stderr


# --- the tests ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_a_tap(tap, boot, tmp_path, virtio):
    """DHCP, ping, a 16 MiB file each way, iperf3 each way, with the kernel's offloads."""
    content = os.urandom(16 * MIB)
    shell = rooted(boot, nets=[f"tap={tap},mac=52:54:00:12:34:56"], virtio=virtio)
    assert shell.run("cat /sys/class/net/eth0/address") == "52:54:00:12:34:56"
    with dhcp_server(tmp_path, tap):
        assert take_a_lease(shell) == ["10.9.0.2", "10.9.0.1"]
    assert is_reached(shell, "10.9.0.1")
    with files("10.9.0.1", content) as port:
        move_a_file_each_way(shell, "10.9.0.1", port, content)
    with iperf3_server():
        iperf3_from_the_guest(shell, "10.9.0.1")
    ip("link", "delete", tap)  # the guest learns that its cable is out, and lives
    assert shell.run("busybox ping -c 1 -W 1 10.9.0.1 >/dev/null; echo alive") == "alive"


def test_user_networking_and_what_is_captured(uplink, boot, tmp_path):
    """DHCP, ping, a 16 MiB file each way, iperf3 both ways from either side, all without root; frames in a file."""
    content = os.urandom(16 * MIB)
    capture = tmp_path / "frames.pcap"
    shell = rooted(boot, nets=[f"user,forward=18080:80,forward=15201:{IPERF3_PORT},pcap={capture}"])
    address, router = take_a_lease(shell)
    assert (address, router) == ("192.0.2.5", "192.0.2.1")  # the host's own
    assert is_reached(shell, router)
    with files("127.0.0.1", content) as port:  # which the router's address leads to
        move_a_file_each_way(shell, router, port, content)
    shell.run("mkdir /tmp/www; echo from the guest > /tmp/www/index.html; busybox httpd -h /tmp/www")
    fetched = subprocess.run(
        ["busybox", "wget", "-q", "-O", "-", "http://127.0.0.1:18080/"],
        capture_output=True,
        check=True,
        timeout=COMMAND_SECONDS,
    )
    assert fetched.stdout == b"from the guest\n"
    data = capture.read_bytes()
    assert data[:4] == bytes.fromhex("4d3cb2a1")  # little-endian, nanoseconds
    assert len(data) > 2 * len(content)
    with iperf3_server():
        iperf3_from_the_guest(shell, router)
    iperf3_to_the_guest(shell, 15201)


def test_two_guests_talk_over_a_link(boot, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    one = rooted(boot, nets=["link=lab"])
    two = rooted(boot, nets=["link=lab"])
    for number, shell in ((1, one), (2, two)):
        shell.run(f"ip addr add 10.8.0.{number}/24 dev eth0; ip link set eth0 up")
    assert is_reached(one, "10.8.0.2")
    two.run("mkdir /tmp/w; echo over the link > /tmp/w/f; busybox httpd -h /tmp/w")
    assert one.run("busybox wget -q -O - http://10.8.0.2/f") == "over the link"
