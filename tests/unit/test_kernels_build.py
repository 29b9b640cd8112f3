"""How each guest kernel is made: from packages, from source, from assembly; and what its modules depend on."""

import gzip
import lzma
import os
import re
import struct
import subprocess
import sys

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st
from images import Load, bzimage, elf
from kernel_host import KernelHost, module

from hypervisor import kernels
from hypervisor.errors import ConfigError, HostError, ImageError
from hypervisor.kernels import assemble, kconfig, programs, recipe, tiny
from hypervisor.kernels.assemble import AssemblyGuest
from hypervisor.kernels.modules import ModuleTree, canonical, read_modinfo, unpack
from hypervisor.kernels.progress import Progress


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = KernelHost(tmp_path / "host")
    monkeypatch.setenv("PATH", host.path)
    monkeypatch.setenv("HOST", str(host.folder))
    return host


KERNEL = elf([Load(0x1000000, b"\x90" * 64)])
IMAGE = bzimage(gzip.compress(KERNEL, mtime=0))
RELEASE = "6.1.0-9-cloud-amd64"
STUB_MAP = b"ffffffffffffffff B the real one is in another package\n"


def debian_files(system_map=STUB_MAP):
    return {
        f"boot/vmlinuz-{RELEASE}": IMAGE,
        f"boot/config-{RELEASE}": b"CONFIG_RD_GZIP=y\n",
        f"boot/System.map-{RELEASE}": system_map,
        f"lib/modules/{RELEASE}/kernel/drivers/virtio.ko": module(),
        f"lib/modules/{RELEASE}/modules.builtin": b"kernel/fs/ext4/ext4.ko\n",
        "usr/share/doc/x": b"x",
    }


def on_debian(host, version="6.1.9-1", **keywords):
    host.package("linux-image-cloud-amd64", version, {}, depends=f"linux-image-{RELEASE} (= {version})", **keywords)
    host.package(f"linux-image-{RELEASE}", version, debian_files(), depends="kmod, linux-base", **keywords)


# --- packages -------------------------------------------------------------------------------------------------------


def test_debians_kernel_is_taken_apart(host):
    on_debian(host)
    found = kernels.get("debian")
    assert found.version == "6.1.9-1"
    assert found.image.read_bytes() == IMAGE
    assert kernels.vmlinux("debian").read_bytes() == KERNEL
    assert found.config.read_bytes() == b"CONFIG_RD_GZIP=y\n"
    assert found.system_map is None  # it only said where the real one is
    assert found.modules.name == RELEASE
    assert ModuleTree(found.modules).has("virtio")
    assert "console=ttyS0" in found.command_line
    assert not any("update" in call for call in host.calls())


def test_ubuntu_keeps_modules_apart(host):
    host.package("linux-image-virtual", "6.8.0.9.9", {}, depends="linux-image-6.8.0-9-generic")
    image = {"boot/vmlinuz-6.8.0-9-generic": IMAGE}
    host.package("linux-image-6.8.0-9-generic", "6.8.0-9.9", image, depends="kmod, linux-modules-6.8.0-9-generic | x")
    rest = {
        "boot/System.map-6.8.0-9-generic": b"0000000000001000 T start_kernel\n" * 200,
        "usr/lib/modules/6.8.0-9-generic/kernel/virtio.ko.zst": b"",
    }
    host.package("linux-modules-6.8.0-9-generic", "6.8.0-9.9", rest)
    found = kernels.get("debian")
    assert found.version == "6.8.0-9.9"
    assert found.system_map.read_bytes().startswith(b"0000000000001000 T start_kernel")
    assert ModuleTree(found.modules).has("virtio")
    assert found.config is None


def test_a_kernel_that_is_no_bzimage_has_no_elf_file(host):
    host.package("linux-image-amd64", "1", {"boot/vmlinuz-1": b"MZ"})
    assert kernels.get("debian").vmlinux is None
    with pytest.raises(ConfigError, match="no ELF file") as caught:
        kernels.vmlinux("debian")
    assert "no bzImage" in caught.value.hint


def test_a_package_without_a_kernel_is_told(host):
    host.package("linux-image-amd64", "1", {"usr/share/doc/x": b""})
    with pytest.raises(HostError, match="holds no boot/vmlinuz"):
        kernels.get("debian")


def test_missing_lists_are_fetched_without_touching_the_systems(host):
    on_debian(host, lists="mirror-lists")
    assert kernels.get("debian").version == "6.1.9-1"
    assert list((host.folder / "lists").iterdir()) == []
    assert "apt-get update" in host.calls()


def test_old_lists_name_what_the_mirror_no_longer_has(host):
    host.package("linux-image-cloud-amd64", "1", {}, depends="linux-image-1-cloud")
    host.package("linux-image-1-cloud", "1", {})
    on_debian(host, version="2", lists="mirror-lists")
    assert kernels.get("debian").version == "2"


def test_an_update_looks_at_the_lists(host):
    on_debian(host)
    kernels.get("debian")
    kernels.get("debian", update=True)
    downloads = [call for call in host.calls() if call == f"apt-get download linux-image-{RELEASE}"]
    assert len(downloads) == 2  # one asked for the size, one was the fetch
    on_debian(host, version="6.1.10-1")
    assert kernels.get("debian", update=True).version == "6.1.10-1"


@pytest.mark.usefixtures("host")
def test_no_network_is_one_error_with_apts_own_words():
    with pytest.raises(HostError, match="Could not resolve") as caught:
        kernels.get("debian")
    assert "network" in caught.value.hint
    assert kernels.listing()[0].state == "to get"


def test_without_apt_there_is_another_way(host):
    host.drop("apt-get")
    with pytest.raises(HostError, match="apt-get is not on this host") as caught:
        kernels.get("debian")
    assert "path of a kernel file" in caught.value.hint


# --- the tiny kernel ------------------------------------------------------------------------------------------------


SOURCE = {
    "Kconfig": b"",
    "init/main.c": b"",
    "arch/x86/kernel/head.S": b"",
    "arch/x86/configs/tiny.config": b"",
    "arch/arm/Kconfig": b"",
    "arch/arm/kernel/head.S": b"",
    "arch/arm/configs/defconfig": b"",
    "arch/xtensa/kernel/head.S": b"",
    "Documentation/Kconfig": b"",
    "Documentation/admin-guide/x.rst": b"",
    "drivers/gpu/drm/Kconfig": b"",
    "drivers/gpu/drm/a/b.c": b"",
    "drivers/net/ethernet/a.c": b"",
    "drivers/net/virtio_net.c": b"",
    "include/sound/core.h": b"",
}


def source_package(host, tmp_path, files=None):
    tree = tmp_path / "linux-source-6.1"
    for name in files or SOURCE:
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_bytes(b"")
    tarball = tmp_path / "source.tar.xz"
    subprocess.run(["tar", "-c", "-J", "-f", tarball, "-C", tmp_path, tree.name], check=True)
    host.package("linux-source", "6.1.9-1", {}, depends="linux-source-6.1 (= 6.1.9-1)")
    host.package("linux-source-6.1", "6.1.9-1", {"usr/src/linux-source-6.1.tar.xz": tarball.read_bytes()})


@pytest.fixture
def builder(host, tmp_path):
    host.build_tools()
    source_package(host, tmp_path)
    return host


@pytest.mark.usefixtures("builder")
def test_tiny_is_built_and_kept():
    class Steps(Progress):
        reached = 0

        def reach(self, done):
            self.reached = max(self.reached, done) if done < 100 else self.reached

    steps = Steps()
    found = kernels.get("tiny", progress=steps)
    assert found.version == "6.1.9-1"
    assert (found.image.name, found.image.read_bytes()) == ("bzImage", b"image\n")
    assert found.vmlinux.read_bytes() == b"elf\n"
    assert found.system_map.read_bytes() == b"map\n"
    assert (found.modules / "kernel/drivers/net/dummy.ko").read_bytes() == b"module\n"
    assert found.modules.name == "6.1.9-tiny"
    assert steps.reached == 3
    options = kconfig.parse(found.config.read_text())
    assert options["CONFIG_A_DEFAULT"] == "y"
    for name in ("SMP", "ACPI", "EXT4_FS", "VIRTIO_BLK", "VIRTIO_NET", "SERIAL_8250_CONSOLE", "PVH", "KVM_GUEST"):
        assert options[f"CONFIG_{name}"] == "y"


def test_only_what_is_built_is_unpacked(builder, tmp_path):
    archive = tmp_path / "source.deb"
    archive.write_bytes((builder.folder / "mirror" / "linux-source-6.1.deb").read_bytes())
    tiny._unpack_source(archive, tmp_path / "tree")
    kept = {str(path.relative_to(tmp_path / "tree")) for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    dropped = {"arch/arm/kernel/head.S", "arch/arm/configs/defconfig", "arch/xtensa/kernel/head.S"}
    dropped |= {"Documentation/admin-guide/x.rst", "drivers/gpu/drm/a/b.c", "drivers/net/ethernet/a.c"}
    dropped |= {"include/sound/core.h"}
    assert kept == set(SOURCE) - dropped


def test_an_option_that_guests_need_and_the_source_lacks_is_named(builder):
    (builder.folder / "unknown").write_text("CONFIG_VIRTIO_BLK=y\n")
    with pytest.raises(HostError, match="does not take CONFIG_VIRTIO_BLK=y"):
        kernels.get("tiny")


def test_a_trim_that_the_source_does_not_take_is_noted(builder):
    (builder.folder / "unknown").write_text("CONFIG_SLAB=y\n")
    assert "not taken: CONFIG_SLAB=y" in kernels.get("tiny").notes


def test_the_compilers_words_reach_the_user(builder):
    (builder.folder / "broken").touch()
    with pytest.raises(HostError, match=r"make failed with status 2: init/main.c:1: error: expected ;"):
        kernels.get("tiny")


def test_all_that_is_missing_is_named_with_its_packages(builder):
    builder.drop("flex")
    builder.drop("bison")
    builder.tool("gcc", "#!/bin/sh\nexit 1\n")  # and so there is no gelf.h
    with pytest.raises(HostError, match=r"flex, bison, gelf\.h") as caught:
        kernels.get("tiny")
    assert caught.value.hint == "apt-get install flex bison libelf-dev"
    assert builder.calls() == []


def test_other_fragments_are_another_kernel(monkeypatch, tmp_path):
    for name in ("tiny.config", "tiny-trim.config"):
        (tmp_path / name).write_text((recipe.sources() / name).read_text())
    before = tiny.TinyKernel().fingerprint()
    monkeypatch.setattr(tiny, "sources", lambda: tmp_path)
    assert tiny.TinyKernel().fingerprint() == before
    (tmp_path / "tiny-trim.config").write_text("CONFIG_SMP=y\n")
    assert tiny.TinyKernel().fingerprint() != before


def test_the_fragments_do_not_contradict_each_other():
    wanted = kconfig.parse((recipe.sources() / "tiny.config").read_text())
    trimmed = kconfig.parse((recipe.sources() / "tiny-trim.config").read_text())
    assert not wanted.keys() & trimmed.keys()
    assert "n" not in wanted.values()


def test_kconfig_lines():
    text = '# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C="x y"\n# CONFIG_D=y\nCONFIG_B=m\n  CONFIG_E=y\n'
    assert kconfig.parse(text) == {"CONFIG_A": "n", "CONFIG_B": "m", "CONFIG_C": '"x y"'}
    assert kconfig.differences({"CONFIG_A": "n", "CONFIG_B": "y", "CONFIG_Z": "y"}, kconfig.parse(text)) == [
        "CONFIG_B=y",
        "CONFIG_Z=y",
    ]


# --- assembly guests ------------------------------------------------------------------------------------------------


@pytest.fixture
def guests(tmp_path, monkeypatch):
    folder = tmp_path / "guests"
    folder.mkdir()
    monkeypatch.setattr(assemble, "sources", lambda: folder)
    (folder / "guest.ld").write_text("ENTRY(_start) SECTIONS { . = 0x200000; .text : { *(.text) } }")
    (folder / "guest64.ld").write_text("ENTRY(_start) SECTIONS { . = 0x300000; .text : { *(.text) } }")
    (folder / "code.inc").write_text(".equ VALUE, 0x11\n")

    def write(name, build, text):
        (folder / f"{name}.S").write_text(f"# summary: does {name}\n{build}\n\n{text}")
        return folder / f"{name}.S"

    return write


START = '.include "code.inc"\n.globl _start\n_start: mov $VALUE, %al\nhlt\n'


@pytest.mark.parametrize(
    ("build", "kind", "machine", "entry"),
    [("", 1, 3, 0x200000), ("# build: multiboot", 1, 3, 0x200000), ("# build: elf64", 2, 62, 0x300000)],
)
def test_elf_guests(guests, build, kind, machine, entry):
    guests("one", build, START)
    found = kernels.kernel("one")
    data = found.image.read_bytes()
    assert data[:5] == b"\x7fELF" + bytes([kind])
    assert struct.unpack_from("<H", data, 18) == (machine,)
    assert struct.unpack_from("<I", data, 24) == (entry,)
    assert b"\xb0\x11\xf4" in data
    assert (found.summary, found.flat, found.is_linux, found.vmlinux) == ("does one", None, False, found.image)


@pytest.mark.parametrize(("bits", "address"), [(16, 0x7C00), (32, 0x100000), (64, 0x100000)])
def test_flat_guests_are_linked_where_they_are_loaded(guests, bits, address):
    guests("flat", f"# build: flat{bits}\n# append: 5 7", f".code{bits}\n{START}.data\nwhere: .long where\n")
    found = kernels.kernel("flat")
    image = found.image.read_bytes()
    assert image.startswith(b"\xb0\x11\xf4")
    place = struct.unpack("<I", image[-4:])[0]
    assert address + 3 <= place < address + 32
    assert image[place - address :] == image[-4:]
    assert (found.flat, found.command_line) == (bits, "5 7")
    assert found.vmlinux.read_bytes()[:4] == b"\x7fELF"


def test_a_script_of_its_own_goes_first(guests):
    source = guests("own", "", START)
    source.with_suffix(".ld").write_text("ENTRY(_start) SECTIONS { . = 0x400000; .text : { *(.text) } }")
    assert struct.unpack_from("<I", kernels.path("own").read_bytes(), 24) == (0x400000,)


def test_a_guest_is_built_again_when_what_it_includes_has_changed(guests):
    source = guests("one", "", START)
    first = kernels.path("one")
    assert kernels.path("one") == first
    (source.parent / "code.inc").write_text(".equ VALUE, 0x22\n")
    assert b"\xb0\x22\xf4" in kernels.path("one").read_bytes()
    assert not first.exists()
    (source.parent / "guest.ld").write_text("ENTRY(_start) SECTIONS { . = 0x500000; .text : { *(.text) } }")
    assert struct.unpack_from("<I", kernels.path("one").read_bytes(), 24) == (0x500000,)


def test_a_damaged_guest_is_built_again(guests):
    guests("one", "", START)
    image = kernels.path("one")
    image.write_bytes(b"")
    assert kernels.path("one").read_bytes()[:4] == b"\x7fELF"


def test_faults_of_a_source_are_told(guests):
    guests("bad", "", "frobnicate\n")
    with pytest.raises(HostError, match=r"as failed with status 1: .*bad\.S:4: Error: .*frobnicate"):
        kernels.kernel("bad")
    guests("odd", "# build: elf128", START)
    with pytest.raises(ConfigError, match="build is 'elf128'") as caught:
        kernels.kernel("odd")
    assert "multiboot" in caught.value.hint


@pytest.mark.usefixtures("host")
def test_without_binutils_the_package_is_named(guests):
    guests("one", "", START)
    with pytest.raises(HostError, match="as is not on this host") as caught:
        kernels.kernel("one")
    assert caught.value.hint == "apt-get install binutils"


@pytest.mark.parametrize("name", assemble.guests())
def test_the_sources_say_what_they_are(name):
    guest = AssemblyGuest(name)
    assert re.fullmatch(r"[a-z0-9][a-z0-9-]*", name)
    assert guest.summary


# --- modules --------------------------------------------------------------------------------------------------------


@pytest.fixture
def tree(tmp_path):
    folder = tmp_path / "6.1.0-test"
    (folder / "kernel").mkdir(parents=True)
    (folder / "modules.builtin").write_text("kernel/fs/ext4/ext4.ko\nkernel/lib/crc-16.ko\n")

    def write(**modules):
        for name, data in modules.items():
            (folder / "kernel" / f"{name}.ko").write_bytes(data)
        return ModuleTree(folder)

    return write


def order(tree, *names):
    return [path.name.partition(".")[0] for path in tree.order(names)]


def test_what_a_module_depends_on_goes_first_and_once(tree):
    found = tree(
        net=module("ring,failover,virtio"), blk=module("virtio,ring"), ring=module(), virtio=module("ring"),
        failover=module(),
    )  # fmt: skip
    assert order(found, "net", "blk", "net") == ["ring", "failover", "virtio", "net", "blk"]
    assert order(found, "blk") == ["ring", "virtio", "blk"]
    assert order(found) == []


def test_dashes_and_underscores_are_the_same(tree):
    found = tree(**{"virtio-rng": module("rng_core"), "rng-core": module()})
    assert order(found, "virtio_rng") == ["rng-core", "virtio-rng"]
    assert order(found, "virtio-rng.ko") == ["rng-core", "virtio-rng"]
    assert canonical("a-b_c.ko.xz") == "a_b_c"


def test_what_is_built_in_is_there_already(tree):
    found = tree(blk=module("crc_16"))
    assert order(found, "ext4", "blk") == ["blk"]


def test_soft_dependencies_go_first_where_they_are(tree):
    found = tree(fs=module("lib", "pre: crc32c crypto-alias post: late"), lib=module(), crc32c=module(), late=module())
    assert order(found, "fs") == ["crc32c", "lib", "fs"]


def test_a_circle_ends(tree):
    assert order(tree(a=module("b"), b=module("a")), "a") == ["b", "a"]


def test_an_unknown_module_is_told_with_those_near(tree):
    found = tree(virtio_net=module(), virtio_blk=module("gone"))
    with pytest.raises(ConfigError, match=r"kernel 6\.1\.0-test has no module virtio_nett") as caught:
        found.order(["virtio_nett"])
    assert "virtio_net" in caught.value.hint
    with pytest.raises(ConfigError, match="has no module qqq") as caught:
        found.order(["qqq"])
    assert str(found.folder) in caught.value.hint
    with pytest.raises(ConfigError, match="virtio_blk depends on gone"):
        found.order(["virtio_blk"])


@pytest.mark.parametrize(
    ("suffix", "pack"),
    [(".ko", bytes), (".ko.xz", lzma.compress), (".ko.gz", gzip.compress), (".ko.zst", zstandard.compress)],
)
def test_modules_are_unpacked(tmp_path, suffix, pack):
    path = tmp_path / f"virtio{suffix}"
    path.write_bytes(pack(module("a,b")))
    assert unpack(path) == module("a,b")
    assert ModuleTree(tmp_path).has("virtio")
    if suffix != ".ko":
        path.write_bytes(pack(module())[:-9] + bytes(5))
        with pytest.raises(ImageError, match=f"virtio{suffix}: the module cannot be read"):
            unpack(path)


@given(st.binary(max_size=300), st.integers(0, 400), st.booleans())
@example(data=struct.pack("<18xQ10xHHH", 1 << 63, 64, 1, 0), cut=22, patch=True)  # section headers beyond all memory
def test_no_bytes_make_the_reader_of_modules_fail_otherwise(tmp_path_factory, data, cut, patch):
    whole = bytearray(module("a", "pre: b"))
    broken = bytes(whole[:cut]) + data if patch else b"\x7fELF\x02" + data
    try:
        read_modinfo(broken, tmp_path_factory.getbasetemp() / "x.ko")
    except ImageError as error:
        assert "not a kernel module" in str(error)  # noqa: PT017 - both answers are right, no other is


# --- running programs -----------------------------------------------------------------------------------------------


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(HostError, match="no-such-program is not installed"):
        programs.capture(["no-such-program"])


def test_the_telling_line_of_a_failure_is_told():
    script = "echo first >&2; echo 'E: the cause' >&2; echo 'E: what came of it' >&2; exit 7"
    with pytest.raises(HostError, match="sh failed with status 7: E: the cause") as caught:
        programs.capture(["sh", "-c", script], hint="do this")
    assert caught.value.hint == "do this"
    with pytest.raises(HostError, match="status 3: it said nothing"):
        programs.follow(["sh", "-c", "exit 3"], print)


def test_who_interrupts_a_program_ends_it(tmp_path):
    def stop(_line):
        raise KeyboardInterrupt

    script = (
        f"import os, time; print(os.getpid(), flush=True); open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    )
    script += "; print('ready', flush=True); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        programs.follow([sys.executable, "-c", script], lambda line: stop(line) if "ready" in line else None)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_watch_looks_while_the_program_runs(tmp_path):
    looks, seen = [], tmp_path / "seen"

    def look():
        looks.append(1)
        if len(looks) == 2:
            seen.touch()

    script = 'for i in $(seq 600); do test -e "$1" && exit; sleep 0.1; done; exit 1'
    programs.watch(["sh", "-c", script, "sh", str(seen)], look)
    assert len(looks) >= 2
