"""Initramfs archives, read back by a reader of the newc format that restates it."""

import errno
import gzip
import io
import lzma
import os
import stat
import struct
import subprocess
from pathlib import Path

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st
from images import Load, elf
from kernel_host import KernelHost, module
from lz4.block import decompress as lz4_decompress

from hypervisor import cli, initramfs, kernels
from hypervisor.cpio import CpioWriter
from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels import busybox
from hypervisor.kernels.cache import Slot
from hypervisor.kernels.progress import Progress


def read_cpio(data):
    """Return name to (mode, device, content), checking every rule of "initramfs buffer format" on the way."""
    entries, inodes, at = {}, [], 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * index : at + 14 + 8 * index], 16) for index in range(13)]
        inode, mode, uid, gid, links, mtime, size, major, minor, rmajor, rminor, name_size, check = fields
        assert (uid, gid, mtime, major, minor, check) == (0, 0, 0, 0, 0, 0)
        raw = data[at + 110 : at + 110 + name_size]
        assert raw.endswith(b"\0")
        assert b"\0" not in raw[:-1]
        at += 110 + name_size
        assert data[at : at + -at % 4] == bytes(-at % 4)
        at += -at % 4
        content = data[at : at + size]
        assert len(content) == size
        at += size
        assert data[at : at + -at % 4] == bytes(-at % 4)
        at += -at % 4
        name = os.fsdecode(raw[:-1])
        if name == "TRAILER!!!":
            assert size == 0
            assert at == len(data)
            assert len(set(inodes)) == len(inodes)
            return entries
        assert links == (2 if stat.S_ISDIR(mode) else 1)
        parent = name.rpartition("/")[0]
        assert not parent or stat.S_ISDIR(entries[parent][0]), f"{name} comes before its folder"
        assert name not in entries
        assert not name.startswith("/")
        inodes.append(inode)
        entries[name] = (mode, (rmajor, rminor), content)


def files(path):
    return {name: content for name, (mode, _, content) in read_cpio(path.read_bytes()).items() if stat.S_ISREG(mode)}


BUSYBOX = "#!/bin/sh\necho bin/sh\necho sbin/poweroff\necho usr/bin/awk\n"


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def own_busybox(tmp_path, monkeypatch):
    tool = tmp_path / "busybox"
    tool.write_text(BUSYBOX)
    tool.chmod(0o755)
    monkeypatch.setattr(busybox, "ensure", lambda **_: tool)
    return tool


@pytest.fixture
def debian():
    """A kernel in the cache with four modules; it can unpack gzip only."""
    slot = Slot("kernels", "debian")
    with slot.locked(Progress()), slot.workspace() as work:
        folder = work / "made" / "modules" / "6.1.0-test" / "kernel"
        folder.mkdir(parents=True)
        (folder / "virtio_net.ko.xz").write_bytes(lzma.compress(module("virtio,net-failover")))
        (folder / "net-failover.ko").write_bytes(module())
        (folder / "virtio.ko").write_bytes(module())
        (folder / "button.ko").write_bytes(module())
        (work / "made" / "vmlinuz").write_bytes(b"kernel")
        (work / "made" / "config").write_text("CONFIG_RD_GZIP=y\n# CONFIG_RD_ZSTD is not set\n")
        roles = {"image": "vmlinuz", "modules": "modules/6.1.0-test", "config": "config"}
        slot.publish(work / "made", version="1", fingerprint="1", roles=roles, notes=[])
    return kernels.kernel("debian")


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "root.cpio"


# --- the archive ----------------------------------------------------------------------------------------------------

NAMES = st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=40)


@given(st.dictionaries(NAMES.filter(lambda name: name not in (".", "..", "TRAILER!!!")), st.binary(max_size=50)))
def test_what_is_written_is_read_back(content):
    buffer = io.BytesIO()
    archive = CpioWriter(buffer.write)
    for name, data in content.items():
        archive.file(name, data, 0o640)
    archive.finish()
    assert read_cpio(buffer.getvalue()) == {name: (0o100640, (0, 0), data) for name, data in content.items()}


def test_every_kind_of_entry():
    buffer = io.BytesIO()
    archive = CpioWriter(buffer.write)
    archive.folder("dev")
    archive.character_device("dev/tty", 5, 0, 0o666)
    archive.symlink("link", "a/target")
    archive.stream("streamed", 5, (b"ab", b"", b"cde"), 0o755)
    archive.finish()
    assert read_cpio(buffer.getvalue()) == {
        "dev": (0o040755, (0, 0), b""),
        "dev/tty": (0o020666, (5, 0), b""),
        "link": (0o120777, (0, 0), b"a/target"),
        "streamed": (0o100755, (0, 0), b"abcde"),
    }


@pytest.mark.parametrize("chunks", [(b"abcd",), (b"abc", b"def"), ()])
def test_a_file_that_changes_while_it_is_read_is_refused(chunks):
    with pytest.raises(ValueError, match="changed its size"):
        CpioWriter(lambda _: None).stream("x", 5, chunks)


def test_a_file_of_4_gib_is_refused():
    with pytest.raises(ValueError, match="less than 4 GiB"):
        CpioWriter(lambda _: None).stream("x", 1 << 32, ())


# --- what is in it --------------------------------------------------------------------------------------------------


def test_a_shell_and_what_it_needs(out):
    assert initramfs.build(out) == out
    entries = read_cpio(out.read_bytes())
    assert entries["bin/busybox"] == (0o100755, (0, 0), BUSYBOX.encode())
    for applet in ("bin/sh", "sbin/poweroff", "usr/bin/awk"):
        assert entries[applet] == (0o120777, (0, 0), b"/bin/busybox")
    # Linux's allocated devices: 5,1 is the system console, 1,3 the null device.
    assert entries["dev/console"] == (0o020600, (5, 1), b"")
    assert entries["dev/null"] == (0o020666, (1, 3), b"")
    assert entries["tmp"][0] == 0o041777
    for folder in ("proc", "sys", "dev", "run", "root", "mnt"):
        assert entries[folder][0] == 0o040755
    assert entries["init"][0] == 0o100755
    assert "init.user" not in entries
    assert not any(name.startswith("lib/modules") for name in entries)


def test_init_is_a_script_that_a_shell_can_read():
    script = initramfs.INIT
    assert script.startswith("#!/bin/sh\n")
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    steps = [script.index(word) for word in ("mount -t proc", "mount -t devtmpfs", "load named", "/init.user")]
    assert steps == sorted(steps)
    assert script.rstrip().endswith("poweroff -f")


def test_the_same_inputs_give_the_same_bytes(out, debian, tmp_path):
    first = initramfs.build(out, kernel="debian", modules=["virtio_net"], compress="gzip").read_bytes()
    os.utime(debian.modules / "kernel" / "virtio.ko", (1, 1))
    assert (
        initramfs.build(tmp_path / "other", kernel="debian", modules=["virtio_net"], compress="gzip").read_bytes()
        == first
    )


@pytest.mark.usefixtures("debian")
def test_modules_come_with_what_they_need_in_order(out):
    initramfs.build(out, kernel="debian", modules=["virtio_net", "button"])
    found = files(out)
    root = "lib/modules/6.1.0-test"
    assert found["etc/modules/named"].decode().splitlines() == [
        f"virtio /{root}/kernel/virtio.ko",
        f"net_failover /{root}/kernel/net-failover.ko",
        f"virtio_net /{root}/kernel/virtio_net.ko",
        f"button /{root}/kernel/button.ko",
    ]
    assert found[f"{root}/kernel/virtio_net.ko"] == module("virtio,net-failover")
    assert found[f"{root}/modules.dep"].decode().splitlines() == [
        "kernel/button.ko:",
        "kernel/net-failover.ko:",
        "kernel/virtio.ko:",
        "kernel/virtio_net.ko: kernel/net-failover.ko kernel/virtio.ko",
    ]


def test_a_script_is_run_whatever_its_mode(out, tmp_path):
    script = tmp_path / "test.sh"
    script.write_text("echo hello\n")
    script.chmod(0o600)
    initramfs.build(out, init=script)
    assert read_cpio(out.read_bytes())["init.user"] == (0o100755, (0, 0), b"echo hello\n")


def test_files_and_folders_are_added(out, tmp_path):
    data = tmp_path / "data"
    (data / "sub").mkdir(parents=True)
    (data / "sub" / "file").write_bytes(b"1")
    (data / "tool").write_bytes(b"2")
    (data / "tool").chmod(0o750)
    (data / "link").symlink_to("tool")
    (data / "dangling").symlink_to("nowhere")
    add = [
        (data, "/srv/data"),
        (data / "tool", "/bin/"),
        (data / "link", "usr/bin/other"),
        (data / "tool", "/"),
        (data, "/"),
    ]
    initramfs.build(out, add=add)
    entries = read_cpio(out.read_bytes())
    assert entries["srv/data/sub/file"] == (0o100644, (0, 0), b"1")
    assert entries["srv/data/link"] == (0o120777, (0, 0), b"tool")
    assert entries["srv/data/dangling"] == (0o120777, (0, 0), b"nowhere")
    for name in ("bin/tool", "usr/bin/other", "tool", "srv/data/tool"):
        assert entries[name] == (0o100750, (0, 0), b"2")
    assert entries["sub/file"][2] == b"1"


def test_what_the_user_adds_wins(out, tmp_path):
    (tmp_path / "init").write_text("mine")
    (tmp_path / "sh").write_text("my shell")
    initramfs.build(out, add=[(tmp_path / "init", "/init"), (tmp_path / "sh", "/bin/sh")])
    assert files(out)["init"] == b"mine"
    assert files(out)["bin/sh"] == b"my shell"


# --- compression ----------------------------------------------------------------------------------------------------


def unpack_lz4_legacy(data):
    """The legacy frame of lz4_Frame_format.md: magic 0x184C2102, blocks of 8 MiB with their packed length."""
    assert data[:4] == b"\x02\x21\x4c\x18"
    at, whole = 4, b""
    while at < len(data):
        (size,) = struct.unpack_from("<I", data, at)
        assert len(whole) % (8 << 20) == 0
        whole += lz4_decompress(data[at + 4 : at + 4 + size], uncompressed_size=8 << 20)
        at += 4 + size
    return whole


UNPACKERS = {
    "none": bytes,
    "gzip": gzip.decompress,
    "xz": lzma.decompress,
    "zstd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    "lz4": unpack_lz4_legacy,
}


@pytest.mark.parametrize("compress", UNPACKERS)
def test_every_compression_can_be_undone(out, tmp_path, compress):
    big = tmp_path / "big"
    big.write_bytes(b"some text " * 900_000)
    initramfs.build(out, add=[(big, "/big")], compress=compress)
    packed = out.read_bytes()
    assert read_cpio(UNPACKERS[compress](packed))["big"][2] == big.read_bytes()
    assert compress == "none" or len(packed) < 1 << 20


def test_xz_has_the_only_check_that_the_kernel_knows(out):
    """The .xz format, 2.1.1.2: the low half of byte 7 is the type of check, and 1 is CRC32."""
    initramfs.build(out, compress="xz")
    assert out.read_bytes()[7] & 0x0F == 1


def test_gzip_has_no_time_in_it(out):
    """RFC 1952, 2.3: MTIME is in bytes 4 to 7, and flag 3 of byte 3 says that there is a file name."""
    initramfs.build(out, compress="gzip")
    assert out.read_bytes()[3:8] == bytes(5)


@pytest.mark.usefixtures("debian")
def test_a_compression_that_the_kernel_cannot_undo_is_refused(out):
    initramfs.build(out, kernel="debian", compress="gzip")
    with pytest.raises(ConfigError, match="debian cannot unpack zstd: CONFIG_RD_ZSTD is not set"):
        initramfs.build(out, kernel="debian", compress="zstd")
    with pytest.raises(ConfigError, match="'rar' is not known"):
        initramfs.build(out, compress="rar")


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("debian")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"init": "/no/such"}, "/no/such: no such script"),
        ({"init": "/"}, "no such script"),
        ({"add": [("/no/such", "/x")]}, "cannot read /no/such: No such file"),
        ({"add": [("/dev/null", "/x")]}, "neither a file nor a folder"),
        ({"add": [("/etc/passwd", "/a/../x")]}, "cannot be added as '/a/../x'"),
        ({"add": [("/etc/passwd", "")]}, "cannot be added as ''"),
        ({"add": [("/etc/passwd", "/proc")]}, "/proc is to be a folder and something else"),
        ({"add": [("/etc/passwd", "/init/x")]}, "/init is to be a folder and something else"),
        ({"kernel": "debain"}, "no guest kernel 'debain'"),
        ({"kernel": "tiny", "modules": ["x"]}, "tiny is not in the cache"),
        ({"kernel": "exit", "modules": ["x"]}, "exit has no modules"),
        ({"kernel": "debian", "modules": ["virtio_nett"]}, "no module virtio_nett"),
        ({"modules": ["virtio_net"]}, "no kernel is named"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(out, arguments, words):
    with pytest.raises(ConfigError) as caught:
        initramfs.build(out, **arguments)
    assert words in str(caught.value)
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/root.cpio", "file/root.cpio"])
def test_an_out_that_cannot_be_is_named(out, place):
    (out.parent / "file").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"cannot write .*{place}"):
        initramfs.build(out.parent / place)


def test_an_out_that_is_no_file_is_left_alone(out):
    out.mkdir()
    with pytest.raises(ConfigError, match="no regular file"):
        initramfs.build(out)
    with pytest.raises(ConfigError, match="/dev/null: it is there, and no regular file"):
        initramfs.build("/dev/null")
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_a_full_disk_is_told_and_leaves_nothing(out, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out.write_bytes(b"an earlier one")
    monkeypatch.setattr(CpioWriter, "finish", refuse)
    with pytest.raises(HostError, match=r"cannot write .*: No space left on device"):
        initramfs.build(out)
    assert [path.name for path in out.parent.iterdir()] == ["root.cpio"]
    assert out.read_bytes() == b"an earlier one"


def test_a_link_stays_a_link(out):
    target = out.with_name("target")
    out.symlink_to(target.name)
    initramfs.build(out)
    assert out.is_symlink()
    assert "init" in files(target)


# --- the default ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("debian")
def test_the_default_is_made_once_and_loads_what_the_kernel_has(monkeypatch):
    path = kernels.default_initramfs("debian")
    found = files(path)
    assert "etc/modules/named" not in found
    assert [line.split()[0] for line in found["etc/modules/virtio"].decode().splitlines()] == [
        "virtio",
        "net_failover",
        "virtio_net",
    ]
    assert found["etc/modules/power"].decode().startswith("button ")
    before = path.stat().st_mtime_ns
    assert kernels.default_initramfs("debian") == path
    assert path.stat().st_mtime_ns == before
    path.write_bytes(b"")
    assert "init" in files(kernels.default_initramfs("debian"))
    monkeypatch.setattr(initramfs, "INIT", initramfs.INIT + "# another\n")
    assert files(kernels.default_initramfs("debian"))["init"].endswith(b"# another\n")


def test_an_assembly_guest_takes_no_initramfs():
    with pytest.raises(ConfigError, match="no Linux kernel"):
        kernels.default_initramfs("exit")


# --- busybox --------------------------------------------------------------------------------------------------------


def test_a_program_is_static_when_it_names_no_interpreter(tmp_path):
    """System V ABI, chapter 5: PT_INTERP (3) names the interpreter; e_machine 62 is x86-64, 183 is AArch64."""
    path = tmp_path / "program"
    code = [Load(0x400000, b"\x90" * 8)]
    for data, verdict in [
        (elf(code), True),
        (elf(code, extra=[(3, b"/lib64/ld-linux-x86-64.so.2\0")]), False),
        (elf(code, machine=183), False),
        (elf(code, bits=32), False),
        (elf(code)[:40], False),
        (b"#!/bin/sh\n", False),
        (b"", False),
    ]:
        path.write_bytes(data)
        assert busybox.is_static(path) is verdict
    assert not busybox.is_static(tmp_path / "missing")
    assert not busybox.is_static(tmp_path)


def test_the_hosts_own_busybox_is_taken_if_it_is_static(monkeypatch, tmp_path):
    monkeypatch.undo()
    dynamic, static = tmp_path / "dynamic", tmp_path / "static"
    dynamic.write_bytes(elf([Load(0x400000, b"\x90")], extra=[(3, b"/lib/ld.so\0")]))
    static.write_bytes(elf([Load(0x400000, b"\x90")]))
    assert busybox.ensure(own=[str(tmp_path / "missing"), str(dynamic), str(static)]) == static


def test_otherwise_the_package_is_fetched_once(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    host = KernelHost(tmp_path / "host")
    monkeypatch.setenv("PATH", host.path)
    monkeypatch.setenv("HOST", str(host.folder))
    program = elf([Load(0x400000, b"\x90")])
    host.package("busybox-static", "1:1.35.0-4", {"bin/busybox": program})
    path = busybox.ensure(own=[])
    assert path.read_bytes() == program
    calls = host.calls()
    assert busybox.ensure(own=[]) == path
    assert host.calls() == calls
    path.write_bytes(b"")
    assert busybox.ensure(own=[]).read_bytes() == program


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("debian")
def test_the_command_writes_the_archive_and_says_nothing(out, tmp_path, capsys):
    script = tmp_path / "a=b.sh"
    script.write_text("#!/bin/sh\n")
    arguments = ["--module", "button", "--init", str(script), "--add", f"{script}=/bin/", "--compress", "gzip"]
    assert cli.main(["initramfs", str(out), *arguments]) == 0
    assert capsys.readouterr() == ("", "")
    entries = read_cpio(gzip.decompress(out.read_bytes()))
    assert entries["bin/a=b.sh"][2] == b"#!/bin/sh\n"
    assert entries["etc/modules/named"][2].startswith(b"button ")


@pytest.mark.parametrize("pair", ["x", "=/x", "x=", ""])
def test_an_add_that_is_no_pair_is_told(out, capsys, pair):
    assert cli.main(["initramfs", str(out), "--add", pair]) == 2
    assert "SRC=DST" in capsys.readouterr().err


def test_the_command_knows_every_compression():
    from hypervisor.cli import initramfs as verb  # noqa: PLC0415 - the module of the same name is in use above

    assert verb.FORMATS == initramfs.COMPRESSIONS
    assert set(verb.FORMATS) == set(UNPACKERS)


def test_a_kernel_is_asked_for_only_when_modules_are(out, capsys):
    assert cli.main(["initramfs", str(out)]) == 0
    assert cli.main(["initramfs", str(out), "--module", "virtio_net"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].strip() == "hv kernel get debian"
