"""Disks that the test kit makes, under stock kernels."""

import pytest
from linux_shell import QUIET

from hypervisor.testing.disks import host_folder_image, make_disk

pytestmark = pytest.mark.hardware


@pytest.mark.parametrize("kernel", ["tiny", "debian"])
def test_a_folder_of_the_host_and_a_new_disk(boot, tmp_path, kernel):
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "tool").write_text("#!/bin/sh\necho the tool ran\n")
    (folder / "sub" / "tool").chmod(0o755)
    new = make_disk(tmp_path / "new", 16 << 20, folder=folder)
    shell = boot(kernel, disks=[f"{host_folder_image(folder)},readonly", new], append=QUIET)
    assert shell.run("mount -t ext4 -o ro /dev/vda /mnt && /mnt/sub/tool") == "the tool ran"
    assert "Read-only" in shell.run("touch /mnt/x 2>&1")
    assert shell.run("umount /mnt && mount -t ext4 /dev/vdb /mnt && /mnt/sub/tool") == "the tool ran"
    assert shell.run("echo kept > /mnt/x && sync && umount /mnt && mount -t ext4 /dev/vdb /mnt && cat /mnt/x") == "kept"
