"""Devices in words."""

import pytest

from hypervisor import MachineConfig
from hypervisor.errors import ConfigError
from hypervisor.options import BalloonConfig, DiskConfig, NetConfig, PortConfig, RngConfig, VsockConfig, parse


@pytest.mark.parametrize(
    ("text", "disk"),
    [
        ("a.img", DiskConfig("a.img")),
        ("path=a.img,readonly", DiskConfig("a.img", readonly=True)),
        ("a,,b.img,readonly=off", DiskConfig("a,b.img")),
        (
            "a.img,overlay=memory,serial=S1,cache=none,iops=100,bandwidth=10M",
            DiskConfig("a.img", overlay="memory", serial="S1", cache="none", iops=100, bandwidth=10 << 20),
        ),
        ({"path": "a.img", "iops": 5}, DiskConfig("a.img", iops=5)),
        (DiskConfig("x"), DiskConfig("x")),
    ],
)
def test_disk(text, disk):
    assert parse(DiskConfig, text, "--disk") == disk


@pytest.mark.parametrize(
    ("text", "net"),
    [
        ("tap=tap0", NetConfig("tap", "tap0")),
        ("user", NetConfig("user")),
        (
            "user,forward=2222:22,forward=53:53/udp,pcap=f",
            NetConfig("user", pcap="f", forward=("2222:22", "53:53/udp")),
        ),
        ("link=lab,mac=52:54:00:12:34:56", NetConfig("link", "lab", mac="52:54:00:12:34:56")),
        ("none", NetConfig("none")),
        ({"kind": "tap", "name": "t"}, NetConfig("tap", "t")),
        ({"user": True, "forward": ["1:2"]}, NetConfig("user", forward=("1:2",))),
    ],
)
def test_net(text, net):
    assert parse(NetConfig, text, "--net") == net


def test_forwards():
    net = parse(NetConfig, "user,forward=2222:22,forward=53/udp", "--net")
    assert net.forwards() == [(2222, 22, "tcp"), (53, 53, "udp")]


@pytest.mark.parametrize(
    ("kind", "text", "what"),
    [
        (PortConfig, "socket=/s", PortConfig(socket="/s")),
        (PortConfig, "agent,file=/f", PortConfig("agent", file="/f")),
        (PortConfig, "agent,inner", PortConfig("agent", inner=True)),
        (VsockConfig, "3,path=/v", VsockConfig(3, "/v")),
        (VsockConfig, {"cid": 4, "path": "/v"}, VsockConfig(4, "/v")),
        (BalloonConfig, "64", BalloonConfig(64)),
        (BalloonConfig, "mib=1,reporting=off", BalloonConfig(1, reporting=False)),
        (BalloonConfig, {}, BalloonConfig()),
        (RngConfig, "bandwidth=1k", RngConfig(1024)),
    ],
)
def test_others(kind, text, what):
    assert parse(kind, text, "--x") == what


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        (DiskConfig, "", "path has no value"),
        (DiskConfig, "readonly=on", "path is missing"),
        (DiskConfig, "a,size=5", "unknown key 'size'"),
        (DiskConfig, "a,serial=1,serial=2", "serial is given twice"),
        (DiskConfig, "a,cache=writethrough", "cache is 'writethrough'"),
        (DiskConfig, "a,serial=" + "x" * 21, "serial is"),
        (DiskConfig, "a,iops=0", "iops is 0"),
        (DiskConfig, "a,iops=many", "iops is 'many'"),
        (DiskConfig, "a,readonly=perhaps", "readonly is 'perhaps'"),
        (DiskConfig, "a,readonly,overlay=memory", "contradict"),
        (DiskConfig, "a,overlay", "overlay has no value"),
        (DiskConfig, 7, "--x is 7"),
        (NetConfig, "", "which network"),
        (NetConfig, "tap=a,user", "which network"),
        (NetConfig, "tap", "tap needs a name"),
        (NetConfig, "tap=t,forward=1:2", "user only"),
        (NetConfig, "user,forward=1:99999", "forward is '1:99999'"),
        (NetConfig, "user,forward=1:2/icmp", "forward is '1:2/icmp'"),
        (NetConfig, "user,forward=1:", "forward is '1:'"),
        (NetConfig, "user,forward=1/", "forward is '1/'"),
        (NetConfig, "user,forward=1:2,forward=1:2/udp,forward=1:3", "port 1/tcp is forwarded twice"),
        (NetConfig, {"kind": "bridge"}, "kind is 'bridge'"),
        (NetConfig, "none,mac=01:00:00:00:00:01", "multicast"),
        (NetConfig, "none,mac=rubbish", "mac|MAC"),
        (PortConfig, "agent", "where does it lead"),
        (PortConfig, "a,socket=s,file=f", "where does it lead"),
        (PortConfig, "a,socket=s,inner", "where does it lead"),
        (PortConfig, "a,inner=off", "where does it lead"),
        (VsockConfig, "2,path=p", "cid is 2"),
        (VsockConfig, "path=p", "cid is missing"),
        (VsockConfig, "3", "path is missing"),
        (BalloonConfig, "mib=-1", "mib is '-1'"),
        (BalloonConfig, {"mib": -1}, "mib is -1"),
        (RngConfig, "bandwidth=0", "bandwidth is 0"),
    ],
)
def test_what_is_wrong_is_said(kind, text, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse(kind, text, "--x")
    assert caught.value.hint or "twice" in str(caught.value)


def test_a_config_parses_them_at_birth():
    config = MachineConfig(
        b"", disks=["a", {"path": "b"}], nets=["user"], rng=True, balloon="5", vsock="3,path=v", ports=["file=f"]
    )
    assert config.disks == (DiskConfig("a"), DiskConfig("b"))
    assert (config.rng, config.balloon) == (RngConfig(), BalloonConfig(5))
    assert config.virtio_count == 7
    again = config.replace(disks=())
    assert again.nets == config.nets
    assert MachineConfig(b"").virtio_count == 0


def test_a_toml_table_has_them_as_texts_or_tables():
    table = {"kernel": "k", "disks": ["a,readonly", {"path": "b"}], "rng": True, "virtio": "mmio", "balloon": False}
    config = MachineConfig.from_mapping(table, "x.toml")
    assert config.disks == (DiskConfig("a", readonly=True), DiskConfig("b"))
    assert (config.virtio, config.balloon) == ("mmio", None)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"disks": "a.img"}, "disks"),
        ({"ports": ["file=a", "file=b"]}, "the same name"),
        ({"disks": ["a"] * 32}, "32 virtio devices"),
        ({"disks": ["a"] * 17, "virtio": "mmio"}, "17 virtio devices"),
        ({"virtio": "usb"}, "virtio is 'usb'"),
    ],
)
def test_a_config_refuses(values, words):
    with pytest.raises(ConfigError, match=words):
        MachineConfig(b"", **values)
