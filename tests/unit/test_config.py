"""Descriptions of machines are checked at birth."""

import json
from pathlib import Path

import pytest

from hypervisor.config import MachineConfig
from hypervisor.errors import ConfigError


def test_defaults():
    config = MachineConfig("vmlinux")
    assert (config.ram_mib, config.cpus, config.cpu, config.irqchip) == (256, 1, "host", "kernel")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"cpus": 0}, "cpus is 0"),
        ({"cpus": -1}, "cpus is -1"),
        ({"cpus": 256}, "cpus is 256"),
        ({"cpus": True}, "cpus is True"),
        ({"ram_mib": 0}, "ram_mib is 0"),
        ({"ram_mib": 1.5}, "ram_mib is 1.5"),
        ({"ram_mib": 1 << 40}, "ram_mib is"),
        ({"flat": 8}, "flat is 8"),
        ({"decompress": "both"}, "decompress is 'both'"),
        ({"debug_exit": "x"}, "debug_exit is 'x'"),
        ({"irqchip": "none", "cpus": 2}, "irqchip none"),
    ],
)
def test_wrong_values_are_named(change, named):
    with pytest.raises(ConfigError) as caught:
        MachineConfig("vmlinux", **change)
    assert named in str(caught.value)
    assert caught.value.hint


def test_it_cannot_be_changed_but_copied():
    config = MachineConfig("vmlinux")
    with pytest.raises(AttributeError, match="immutable"):
        config.cpus = 4
    assert config.replace(cpus=4).cpus == 4
    assert config.cpus == 1


@pytest.mark.parametrize(
    ("table", "named"),
    [
        ({"kernel": "k", "cpu_count": 2}, "unknown key 'cpu_count'"),
        ({"kernel": "k", "cpus": "2"}, "cpus is '2'"),
        ({"kernel": "k", "cpus": True}, "cpus is True"),
        ({"cpus": 2}, "no kernel is named"),
    ],
)
def test_tables_are_checked(table, named):
    with pytest.raises(ConfigError, match=r"m\.toml: ") as caught:
        MachineConfig.from_mapping(table, "m.toml")
    assert named in str(caught.value)


def test_a_table_becomes_a_config():
    config = MachineConfig.from_mapping({"kernel": "k", "cpus": 2, "modules": ["a", "b c"]}, "m.toml")
    assert (config.kernel, config.cpus, config.modules) == ("k", 2, ("a", "b c"))


def test_a_description_survives_being_written_down():
    config = MachineConfig(
        Path("vmlinux"),
        ram_mib=64,
        cpus=2,
        modules=("one two",),
        disks=["disk.img,readonly,serial=x", {"path": "b", "iops": 5}],
        nets=["user,forward=8080:80", "none,mac=52:54:00:00:00:01"],
        ports=[{"name": "log", "file": "log.txt"}],
        rng=True,
        vsock="3,path=socket",
        balloon="16",
        virtio="mmio",
    )
    plain = json.loads(json.dumps(config.to_plain()))
    again = MachineConfig(**plain)
    assert again.to_plain() == config.to_plain()
    assert (again.disks, again.nets, again.ports, again.vsock) == (
        config.disks,
        config.nets,
        config.ports,
        config.vsock,
    )
    assert (again.kernel, again.balloon, again.rng) == ("vmlinux", config.balloon, config.rng)
