"""Disks under stock kernels with their own drivers: file systems, formats, transports, a root disk."""

import contextlib
import hashlib
import os
import subprocess

import pytest
from guest_root import SHELL, root_disk
from linux_shell import COMMAND_SECONDS, QUIET

from devices.backends.image import open_image
from hypervisor import Stop

pytestmark = pytest.mark.hardware

MIB = 1 << 20
SIZE = 48 * MIB
FIO = (
    "fio --name=verify --directory=/mnt --size=8m --bs=4k-64k --rw=randwrite --ioengine=psync --verify=crc32c"
    " --do_verify=1 --fsync=64 --randseed=7 --minimal >/tmp/fio"
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """One empty image of each kind, and the base of the overlay."""
    folder = tmp_path_factory.mktemp("images")
    for name in ("raw.img", "base.img"):
        with open(folder / name, "wb") as file:
            file.truncate(SIZE)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", folder / "q.qcow2", str(SIZE)], check=True)
    return folder


def digest(path, **options):
    """Return the SHA-256 of a disk's bytes, whatever its format."""
    image = open_image(str(path), readonly=True, **options)
    with contextlib.closing(image):
        total = hashlib.sha256()
        for offset in range(0, image.size, MIB):
            chunk = bytearray(min(MIB, image.size - offset))
            image.readv(offset, [memoryview(chunk)])
            total.update(chunk)
    return total.hexdigest()


def rooted(boot, *disks, more="", **settings):
    """Boot Debian's kernel from the root disk, with other disks behind it: /dev/vdb and so on."""
    disks = [f"{root_disk()},overlay=memory", *disks]
    return boot(disks=disks, append=f"{QUIET} root=/dev/vda rw {more} {SHELL}", ram_mib=256, **settings)


def power_off(shell):
    shell.machine.console.write("busybox poweroff -f\n")
    outcome = shell.machine.wait(timeout=COMMAND_SECONDS)
    shell.machine.close()
    return outcome


@pytest.mark.parametrize("virtio", ["pci", "mmio"])
def test_file_systems_on_every_format(boot, images, virtio):
    """mkfs, mount, fio verify and what the host finds afterwards: raw, qcow2, an overlay file and one in memory."""
    overlay = images / f"over-{virtio}.qcow2"
    shell = rooted(
        boot,
        f"{images}/raw.img,serial=RAW-{virtio}",
        f"{images}/q.qcow2",
        f"{images}/base.img,overlay={overlay}",
        f"{images}/base.img,overlay=memory",
        virtio=virtio,
        cpus=2,
    )
    assert shell.run("cat /sys/block/vdb/serial") == f"RAW-{virtio}"
    assert shell.run("cat /sys/block/vdb/size") == str(SIZE // 512)
    hashes = {}
    for name in ("vdb", "vdc", "vdd", "vde"):
        prepared = shell.run(f"mkfs.ext4 -q -F /dev/{name} && mount /dev/{name} /mnt && echo ready")
        assert prepared.endswith("ready"), prepared
        assert shell.run(f"{FIO} && echo verified").endswith("verified"), shell.run("cat /tmp/fio")
        assert shell.run("umount /mnt && echo done") == "done"
        assert shell.run(f"e2fsck -fn /dev/{name} >/tmp/fsck 2>&1 && echo clean") == "clean", shell.run("cat /tmp/fsck")
        hashes[name] = shell.run(f"sha256sum /dev/{name}").split()[0]
    assert power_off(shell).reason is Stop.POWER_OFF
    assert digest(images / "raw.img") == hashes["vdb"]
    assert digest(images / "q.qcow2") == hashes["vdc"]
    assert digest(overlay, form="qcow2") == hashes["vdd"]
    assert digest(images / "base.img") == hashlib.sha256(bytes(SIZE)).hexdigest()
    subprocess.run(["e2fsck", "-fn", images / "raw.img"], check=True, capture_output=True)
    for image in (images / "q.qcow2", overlay):
        subprocess.run(["qemu-img", "check", "-q", image], check=True)


def test_a_root_disk_and_its_features(boot, images):
    """A stock root file system, the topology that the guest sees, discard that punches holes, read-only disks."""
    holes = images / "holes.img"
    holes.write_bytes(os.urandom(8 * MIB))
    shell = rooted(boot, str(holes), f"{images}/base.img,readonly")
    assert shell.run("busybox mount | grep ' / '").startswith("/dev/vda on / type ext4 (rw")
    assert shell.run("python3 -c 'print(6 * 7)'") == "42"
    before = os.stat(holes).st_blocks
    assert shell.run("busybox blkdiscard -o 1048576 -l 4194304 /dev/vdb && echo discarded") == "discarded"
    assert os.stat(holes).st_blocks <= before - 4 * MIB // 512
    assert shell.run("dd if=/dev/vdb bs=1M skip=1 count=4 2>/dev/null | tr -d '\\0' | wc -c") == "0"
    assert shell.run("cat /sys/block/vdc/ro") == "1"
    assert power_off(shell).reason is Stop.POWER_OFF


@pytest.fixture
def small(tmp_path):
    """A file system of the host with room for 6 MiB."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "none", tmp_path], check=True)
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("kind", ["raw", "qcow2", "overlay"])
def test_a_full_file_system_of_the_host(boot, small, images, kind):
    """Writes that find no room are errors for the guest, which lives; what was acknowledged stays."""
    disk = small / "disk"
    if kind == "raw":
        with open(disk, "wb") as file:
            file.truncate(SIZE)
        described = str(disk)
    elif kind == "qcow2":
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, str(SIZE)], check=True)
        described = str(disk)
    else:
        described = f"{images}/base.img,overlay={disk}"
    shell = rooted(boot, described)
    write = (
        "dd if=/dev/urandom of=/tmp/data bs=1M count={0} 2>/dev/null; dd if=/tmp/data of=/dev/vdb bs=64k oflag=direct"
    )
    assert shell.run(f"{write.format(2)} conv=fsync 2>/dev/null && echo written") == "written"
    kept = shell.run("sha256sum /tmp/data").split()[0]
    said = shell.run(f"{write.format(16)} seek=64 2>&1")
    assert "Input/output error" in said or "I/O error" in said, said
    assert shell.run("echo alive") == "alive"
    assert shell.run("dd if=/dev/vdb bs=64k count=32 iflag=direct 2>/dev/null | sha256sum").split()[0] == kept
    assert power_off(shell).reason is Stop.POWER_OFF
    with contextlib.closing(open_image(str(disk), readonly=True, form=None if kind == "raw" else "qcow2")) as image:
        data = bytearray(2 * MIB)
        image.readv(0, [memoryview(data)])
    assert hashlib.sha256(data).hexdigest() == kept
    if kind != "raw":
        subprocess.run(["qemu-img", "check", "-q", disk], check=True)
