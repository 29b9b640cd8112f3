"""fw_cfg as a guest reads it (docs/specs/fw_cfg of QEMU)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devices.fw_cfg import FwCfg

SIGNATURE, ID, RAM_SIZE, NB_CPUS, MAX_CPUS, FILE_DIR, FILE_FIRST = 0x00, 0x01, 0x03, 0x05, 0x0F, 0x19, 0x20
FILES = {"opt/org.example/a": b"alpha", "etc/empty": b""}


@pytest.fixture
def fw_cfg() -> FwCfg:
    return FwCfg(cpus=4, ram_bytes=5 << 30, files=FILES)


def read(fw_cfg: FwCfg, key: int, count: int) -> bytes:
    fw_cfg.write(0, 2, key)
    return bytes(fw_cfg.read(1, 1) for _ in range(count))


def directory(fw_cfg: FwCfg) -> dict[str, tuple[int, int]]:
    """Return name -> (selector, size)."""
    (count,) = struct.unpack(">I", read(fw_cfg, FILE_DIR, 4))
    found = {}
    for _ in range(count):  # the position goes on where the count ended
        entry = bytes(fw_cfg.read(1, 1) for _ in range(64))
        size, key, reserved, name = struct.unpack(">IHH56s", entry)
        assert reserved == 0
        assert name.endswith(b"\0")
        found[name.rstrip(b"\0").decode()] = (key, size)
    return found


def test_signature_and_features(fw_cfg):
    """The traditional interface, no DMA."""
    assert read(fw_cfg, SIGNATURE, 4) == b"QEMU"
    assert read(fw_cfg, ID, 4) == b"\x01\0\0\0"


def test_the_signature_is_selected_at_first(fw_cfg):
    assert bytes(fw_cfg.read(1, 1) for _ in range(4)) == b"QEMU"


def test_cpus_and_ram(fw_cfg):
    assert struct.unpack("<H", read(fw_cfg, NB_CPUS, 2)) == (4,)
    assert struct.unpack("<H", read(fw_cfg, MAX_CPUS, 2)) == (4,)
    assert struct.unpack("<Q", read(fw_cfg, RAM_SIZE, 8)) == (5 << 30,)


def test_files(fw_cfg):
    assert directory(fw_cfg) == {"opt/org.example/a": (FILE_FIRST, 5), "etc/empty": (FILE_FIRST + 1, 0)}
    assert read(fw_cfg, FILE_FIRST, 5) == b"alpha"


def test_past_the_end_are_zeros(fw_cfg):
    assert read(fw_cfg, SIGNATURE, 10) == b"QEMU" + bytes(6)
    assert read(fw_cfg, FILE_FIRST + 1, 3) == bytes(3)


def test_selecting_starts_again(fw_cfg):
    assert read(fw_cfg, SIGNATURE, 2) == b"QE"
    assert read(fw_cfg, SIGNATURE, 4) == b"QEMU"


@pytest.mark.parametrize("key", [0x02, 0x18, 0x1A, 0x22, 0x3FFF, 0x8000, 0x8005, 0xFFFF])
def test_unknown_keys_are_zeros(fw_cfg, key):
    """Bit 15 selects items of the architecture, which are others."""
    assert read(fw_cfg, key, 16) == bytes(16)


def test_bit_14_selects_the_same_item(fw_cfg):
    assert struct.unpack("<H", read(fw_cfg, 0x4000 | NB_CPUS, 2)) == (4,)


def test_data_writes_are_ignored(fw_cfg):
    fw_cfg.write(0, 2, SIGNATURE)
    fw_cfg.write(1, 1, 0x55)
    assert bytes(fw_cfg.read(1, 1) for _ in range(4)) == b"QEMU"


def test_the_selector_is_16_bits_and_write_only(fw_cfg):
    fw_cfg.write(0, 2, NB_CPUS)
    fw_cfg.write(0, 1, SIGNATURE)
    assert fw_cfg.read(0, 1) & 0xFF == 0xFF
    assert fw_cfg.read(0, 2) & 0xFFFF == 0xFFFF
    assert fw_cfg.read(1, 1) == 4


names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=55)


@given(files=st.dictionaries(names, st.binary(max_size=64), max_size=8))
def test_every_file_is_listed_and_read_back(files):
    fw_cfg = FwCfg(cpus=1, ram_bytes=1, files=files)
    listed = directory(fw_cfg)
    assert {name: size for name, (_, size) in listed.items()} == {name: len(data) for name, data in files.items()}
    for name, data in files.items():
        assert read(fw_cfg, listed[name][0], len(data) + 1) == data + b"\0"


@pytest.mark.parametrize("name", ["", "x" * 56, "caf\u00e9"])
def test_names_that_do_not_fit_are_refused(name):
    with pytest.raises(ValueError, match="ASCII"):
        FwCfg(cpus=1, ram_bytes=1, files={name: b""})


def test_more_files_than_keys_are_refused():
    with pytest.raises(ValueError, match="keys"):
        FwCfg(cpus=1, ram_bytes=1, files={f"f{i}": b"" for i in range(0x4000 - 0x20 + 1)})
