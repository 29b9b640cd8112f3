"""A host that dies at any moment leaves a qcow2 image that leaks at worst, and has all that was flushed."""

import random
import subprocess

import pytest

from devices.backends import raw
from devices.backends.image import open_image
from devices.backends.qcow2_header import create

MIB = 1 << 20
SIZE = 2 * MIB


@pytest.fixture
def recorded(monkeypatch):
    """Every write ("w", offset, bytes), hole ("z", offset, size) and fdatasync ("f",) of image files, in order."""
    operations = []

    def watch(name, note):
        real = getattr(raw.RawImage, name)

        def call(self, *arguments):
            result = real(self, *arguments)
            operations.append(note(*arguments))
            return result

        monkeypatch.setattr(raw.RawImage, name, call)

    watch("writev", lambda offset, buffers: ("w", offset, b"".join(buffers)))
    watch("discard", lambda offset, size: ("z", offset, size))
    watch("flush", lambda: ("f",))
    return operations


def work(path, rng, model, operations):
    """Use an image; return what each flush promised: (operations by then, the disk, ranges that changed after it)."""
    image = open_image(str(path), form="qcow2")
    promises = [(0, bytes(model), [])]
    for _ in range(40):
        what = rng.random()
        offset = rng.randrange(SIZE // 512) * 512
        size = min(rng.randrange(1, 150) * 512, SIZE - offset)
        if what > 0.85:
            image.flush()
            promises.append((len(operations), bytes(model), []))
            continue
        promises[-1][2].append((offset, size))
        if what < 0.55:
            data = rng.randbytes(size)
            image.writev(offset, [memoryview(data)])
            model[offset : offset + size] = data
        elif what < 0.7:
            image.write_zeroes(offset, size, unmap=True)
            model[offset : offset + size] = bytes(size)
        else:
            image.discard(offset, size)
            image.readv(offset, [memoryview(model)[offset : offset + size]])
    image.close()
    return promises


def after_crash(start, operations, rng):
    """Return the file: what was synced is there, of the rest any part (`rng` None: all of it)."""
    synced = max((index for index, one in enumerate(operations) if one[0] == "f"), default=-1)
    file = bytearray(start)
    for index, (kind, *what) in enumerate(operations):
        if kind == "w":
            offset, data = what
            file.extend(bytes(max(offset + len(data) - len(file), 0)))
            if index < synced or rng is None or rng.random() < 0.5:
                file[offset : offset + len(data)] = data
        elif kind == "z" and (index < synced or rng is None or rng.random() < 0.5):
            offset, size = what
            end = min(offset + size, len(file))
            file[offset:end] = bytes(max(end - offset, 0))
    return file


def verdict(path, promises, reached):
    """Return None, or what is wrong with an image."""
    result = subprocess.run(["qemu-img", "check", path], check=False, capture_output=True, text=True)
    if result.returncode not in {0, 3}:  # sound, or leaking
        return result.stdout + result.stderr
    _, disk, changed = [one for one in promises if one[0] <= reached][-1]
    found, promised = bytearray(SIZE), bytearray(disk)
    image = open_image(str(path), form="qcow2", readonly=True)
    image.readv(0, [memoryview(found)])
    image.close()
    for offset, size in changed:
        promised[offset : offset + size] = found[offset : offset + size]
    return None if found == promised else "flushed data is lost"


@pytest.mark.parametrize(("bits", "backed"), [(9, False), (9, True), (12, True), (16, False)])
@pytest.mark.parametrize("seed", [3, 9])
def test_no_crash_harms_an_image(tmp_path, recorded, bits, backed, seed):
    rng = random.Random(seed)
    path, base, crashed = tmp_path / "i.qcow2", tmp_path / "base.raw", tmp_path / "crashed.qcow2"
    model = bytearray(SIZE)
    if backed:
        model[:MIB] = rng.randbytes(MIB)
        base.write_bytes(model[:MIB])
    create(
        str(path),
        SIZE,
        cluster_bits=bits,
        backing=str(base) if backed else None,
        backing_format="raw" if backed else None,
    )
    start = path.read_bytes()
    promises = work(path, rng, model, recorded)
    operations = list(recorded)
    flushes = [index for index, one in enumerate(operations) if one[0] == "f"]
    points = {*rng.sample(range(len(operations)), 8), *rng.sample(flushes, min(len(flushes), 16)), len(operations)}
    for reached in sorted(points):
        for lost in (None, rng):
            crashed.write_bytes(after_crash(start, operations[:reached], lost))
            assert verdict(crashed, promises, reached) is None, (reached, lost is not None)
