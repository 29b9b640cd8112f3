"""What `hv run` says to bad input: one clear line, the right status, nothing left behind. No guest is started."""

import gzip
import os
import struct
import subprocess
import sys

import pytest

from hypervisor.cli.run import parse_ram
from hypervisor.errors import ConfigError


def hv(*arguments, **keywords):
    return subprocess.run(
        [sys.executable, "-m", "hypervisor", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        **keywords,
    )


def refused(result, *words):
    """One error with at most one line of advice, status 2, nothing on stdout, no traceback."""
    lines = result.stderr.splitlines()
    assert result.returncode == 2, result
    assert lines
    assert lines[0].startswith("hv: ")
    assert len(lines) <= 2
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


@pytest.fixture
def image(tmp_path):
    def write(content, name="image"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


def elf64(machine=62, segments=((0x100000, 0x10),), entry=0x100000, size=None):
    """A little ELF64 executable with its segments' bytes right behind the headers."""
    count = len(segments)
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIQQQIHHHHHH", 2, machine, 1, entry, 64, 0, 0, 64, 56, count, 64, 0, 0)
    offset = 64 + 56 * count
    body = b""
    for address, length in segments:
        held = length if size is None else size
        body += struct.pack("<IIQQQQQQ", 1, 7, offset, address, address, held, length, 0x1000)
        offset += held
    return header + body + b"\xf4" * (offset - 64 - 56 * count)


def test_no_such_kernel():
    refused(hv("run", "/no/such/kernel"), "/no/such/kernel", "No such file")


def test_a_directory(tmp_path):
    refused(hv("run", tmp_path), str(tmp_path), "directory")


def test_an_empty_file(image):
    path = image(b"")
    refused(hv("run", path), str(path), "empty")


def test_text(image):
    refused(hv("run", image(b"#!/bin/sh\necho hello\n")), "script")


def test_a_pe_file(image):
    pe = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x80) + b"\0" * 0x40 + b"PE\0\0\x64\x86"
    refused(hv("run", image(pe.ljust(4096, b"\0"))), "PE")


def test_an_elf_of_another_machine(image):
    refused(hv("run", image(elf64(machine=183))), "AArch64")


def test_a_32_bit_elf_without_multiboot(image):
    header = b"\x7fELF\x01\x01\x01".ljust(16, b"\0")
    header += struct.pack("<HHIIIIIHHHHHH", 2, 3, 1, 0x100000, 52, 0, 0, 52, 32, 0, 40, 0, 0)
    refused(hv("run", image(header.ljust(4096, b"\0"))), "32")


def test_a_truncated_elf(image):
    refused(hv("run", image(elf64(segments=((0x100000, 0x4000),))[:0x400])), "image")


def test_random_bytes_behind_a_right_magic(image):
    noise = bytes((i * 7919 + 13) % 251 for i in range(8192))
    refused(hv("run", image(b"\x7fELF" + noise)))
    refused(hv("run", image(noise[:0x1FE] + b"\x55\xaa\xeb\x66HdrS" + noise)))


@pytest.mark.parametrize(
    "segments",
    [
        ((0x100000, 0x2000), (0x101000, 0x2000)),
        ((0x4000_0000_0000, 0x1000),),
        ((0xFFFF_FFFF_FFFF_F000, 0x2000),),
        ((0x9000, 0x1000),),
        ((0x100000, 0x7000_0000),),
    ],
    ids=["overlap", "outside RAM", "wraps", "low structures", "larger than RAM"],
)
def test_segments_that_cannot_be(image, segments):
    refused(hv("run", image(elf64(segments=segments, size=16)), "--protocol", "linux64"))


def test_a_command_line_that_is_too_long(image):
    refused(hv("run", image(elf64()), "--protocol", "linux64", "--append", "x" * 70000), "command line")


def test_ram_too_small_for_the_initrd(image):
    initrd = image(gzip.compress(os.urandom(3 << 20), 1), "initrd")
    refused(hv("run", image(elf64()), "--protocol", "linux64", "--ram", "2", "--initrd", initrd), "MiB")


def test_an_empty_initrd(image):
    refused(hv("run", image(elf64()), "--initrd", image(b"", "initrd")), "initrd")


def test_an_initrd_that_is_not_there(image):
    refused(hv("run", image(elf64()), "--initrd", "/no/initrd"), "/no/initrd")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--cpus", "0"), "cpus is 0"),
        (("--cpus", "5000"), "cpus is 5000"),
        (("--ram", "0"), "ram_mib is 0"),
        (("--ram", "lots"), "--ram 'lots'"),
        (("--flat", "8"), "flat is 8"),
        (("--console", "tcp"), "console 'tcp'"),
        (("--console", "file=/no/such/dir/log"), "/no/such/dir/log"),
        (("--timeout", "0"), "timeout is 0"),
        (("--log-level", "loud"), "'loud'"),
        (("--log-format", "xml"), "'xml'"),
        (("--config", "/no/such.toml"), "/no/such.toml"),
        (("--cpu", "host,-nosuchflag"), "nosuchflag"),
    ],
)
def test_options_that_make_no_sense(image, arguments, word):
    refused(hv("run", image(b"\xf4" * 16), "--flat", "16", *arguments), word)


def test_no_kernel_at_all():
    refused(hv("run"), "no kernel is named")


def test_an_unknown_option_is_bad_usage():
    result = hv("run", "--frobnicate")
    assert result.returncode == 2
    assert "usage: hv" in result.stderr


def test_no_verb_shows_the_help():
    result = hv()
    assert result.returncode == 2
    assert "hv run debian" in result.stdout


def test_the_configuration_file_is_checked(image):
    refused(hv("run", "--config", image(b"kernel = ", "m.toml")), "is not TOML")
    refused(hv("run", "--config", image(b"kernel = 'k'\ncpu_count = 4\n", "m.toml")), "cpu_count")


def test_version():
    result = hv("--version")
    assert result.returncode == 0
    assert result.stdout.startswith("hv ")


@pytest.mark.parametrize(("text", "mib"), [("256", 256), ("512M", 512), ("4G", 4096), ("1GiB", 1024)])
def test_ram_units(text, mib):
    assert parse_ram(text) == mib


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "1T", "G4"])
def test_ram_that_is_no_size(text):
    with pytest.raises(ConfigError):
        parse_ram(text)
