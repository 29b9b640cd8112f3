"""Qcow2, beside QEMU's own tools."""

import os
import random
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from devices.backends.errors import BackendError
from devices.backends.image import open_image
from devices.backends.qcow2_header import create

MIB = 1 << 20


def qemu_img(*words):
    return subprocess.run(["qemu-img", *map(str, words)], check=True, capture_output=True, text=True).stdout


def check(path):
    """No errors, and no leaks either."""
    result = subprocess.run(["qemu-img", "check", path], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def contents(image):
    data = bytearray(image.size)
    image.readv(0, [memoryview(data)])
    return bytes(data)


def write(image, offset, data, cut=None):
    """Write in pieces, as a guest's buffers are."""
    view = memoryview(data)
    cut = cut or len(data)
    image.writev(offset, [view[at : at + cut] for at in range(0, len(data), cut)])


def as_raw(path, folder):
    raw = folder / f"{path.name}.raw"
    qemu_img("convert", "-O", "raw", path, raw)
    return raw.read_bytes()


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "refcount_bits=1",
        "refcount_bits=8",
        "refcount_bits=64",
        "preallocation=metadata",
        "lazy_refcounts=on",
        "compression_type=zstd",
    ],
)
def test_what_qemu_made_is_read_written_and_sound(tmp_path, options):
    path = tmp_path / "a.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", *(["-o", options] if options else []), path, 3 * MIB + 512)
    subprocess.run(["qemu-io", "-c", "write -P 7 1M 70k", path], check=True, capture_output=True)
    model = bytearray(3 * MIB + 512)
    model[MIB : MIB + 70 * 1024] = b"\x07" * (70 * 1024)
    image = open_image(str(path))
    assert contents(image) == model
    rng = random.Random(1)
    for _ in range(20):
        offset = rng.randrange(0, len(model) // 512) * 512
        data = rng.randbytes(min(rng.randrange(1, 200) * 512, len(model) - offset))
        write(image, offset, data, cut=4096)
        model[offset : offset + len(data)] = data
    assert contents(image) == model
    image.flush()
    image.close()
    check(path)
    assert as_raw(path, tmp_path) == model
    image = open_image(str(path), readonly=True)
    assert contents(image) == model
    image.close()


def test_compressed_clusters_are_read_and_copied_when_written(tmp_path):
    source = tmp_path / "s.raw"
    model = bytearray(b"abcd" * (MIB // 2))
    source.write_bytes(model)
    for kind in ("zlib", "zstd"):
        path = tmp_path / f"{kind}.qcow2"
        qemu_img("convert", "-c", "-O", "qcow2", "-o", f"compression_type={kind}", source, path)
        image = open_image(str(path))
        assert contents(image) == model
        write(image, 70000 // 512 * 512, bytes(512))
        image.close()
        check(path)
        changed = bytearray(model)
        changed[70000 // 512 * 512 :][:512] = bytes(512)
        at = 70000 // 512 * 512
        changed[at : at + 512] = bytes(512)
        assert as_raw(path, tmp_path) == changed


@settings(max_examples=25)
@given(data=st.data())
def test_any_sequence_equals_a_plain_array(tmp_path, data):
    """Writes, discards, zeroes, flushes and reopening, with a backing file or without, and small clusters or large."""
    folder = tmp_path / os.urandom(4).hex()
    folder.mkdir()
    size = data.draw(st.sampled_from([64 * 1024, 300 * 1024 + 512]))
    bits = data.draw(st.sampled_from([9, 12, 16]))
    model = bytearray(size)
    backing = None
    if data.draw(st.booleans()):
        backing = folder / "base.raw"
        length = size // 1024 * 512
        model[:length] = random.Random(2).randbytes(length)
        backing.write_bytes(model[:length])
    path = folder / "i.qcow2"
    create(str(path), size, cluster_bits=bits, backing=backing and str(backing), backing_format=backing and "raw")
    image = open_image(str(path), form="qcow2")
    ranges = st.tuples(st.integers(0, size // 512 - 1), st.integers(1, 140)).map(
        lambda pair: (pair[0] * 512, min(pair[1] * 512, size - pair[0] * 512))
    )
    for _ in range(data.draw(st.integers(1, 12))):
        what = data.draw(st.sampled_from(["write", "write", "discard", "zero", "flush", "reopen"]))
        if what == "flush":
            image.flush()
        elif what == "reopen":
            image.close()
            check(path)
            image = open_image(str(path), form="qcow2")
        else:
            offset, length = data.draw(ranges)
            if what == "write":
                fresh = random.Random(offset + length).randbytes(length)
                write(image, offset, fresh, cut=data.draw(st.sampled_from([512, 4096, 1 << 20])))
                model[offset : offset + length] = fresh
            elif what == "zero":
                image.write_zeroes(offset, length, data.draw(st.booleans()))
                model[offset : offset + length] = bytes(length)
            else:
                image.discard(offset, length)
                now = contents(image)
                assert now[:offset] == model[:offset]
                assert now[offset + length :] == model[offset + length :]
                model[:] = now
        assert contents(image) == model
    image.close()
    check(path)
    assert as_raw(path, folder) == model


def test_an_overlay_file_is_made_used_again_and_refused_for_another_base(tmp_path):
    base, other, overlay = tmp_path / "base.raw", tmp_path / "other.raw", tmp_path / "o.qcow2"
    base.write_bytes(b"b" * MIB)
    other.write_bytes(b"o" * MIB)
    image = open_image(str(base), overlay=str(overlay))
    write(image, 512, b"n" * 512)
    image.close()
    assert base.read_bytes() == b"b" * MIB
    check(overlay)
    image = open_image(str(base), overlay=str(overlay))
    assert contents(image)[:1536] == b"b" * 512 + b"n" * 512 + b"b" * 512
    image.close()
    with pytest.raises(BackendError, match="lies over"):
        open_image(str(other), overlay=str(overlay))


def patched(path, offset, data):
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(data)


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (4, (9).to_bytes(4, "big"), "version 9"),
        (20, (8).to_bytes(4, "big"), "clusters of 2\\^8"),
        (20, (64).to_bytes(4, "big"), "clusters of 2\\^64"),
        (24, (0).to_bytes(8, "big"), "a disk of 0 bytes"),
        (24, (1 << 63).to_bytes(8, "big"), "a disk of"),
        (32, (1).to_bytes(4, "big"), "encrypted"),
        (36, (0).to_bytes(4, "big"), "L1 table of 0 entries"),
        (36, (1 << 31).to_bytes(4, "big"), "L1 table"),
        (40, (3).to_bytes(8, "big"), "L1 table"),
        (40, (1 << 40).to_bytes(8, "big"), "is not in the file"),
        (48, (0).to_bytes(8, "big"), "refcount table"),
        (56, (0).to_bytes(4, "big"), "refcount table of 0"),
        (56, (1 << 30).to_bytes(4, "big"), "refcount table"),
        (60, (1).to_bytes(4, "big"), "internal snapshots"),
        (72, (1).to_bytes(8, "big"), "was not closed"),
        (72, (2).to_bytes(8, "big"), "marked as damaged"),
        (72, (4).to_bytes(8, "big"), "external data file"),
        (72, (16).to_bytes(8, "big"), "extended L2"),
        (72, (1 << 20).to_bytes(8, "big"), "not known"),
        (96, (7).to_bytes(4, "big"), "refcounts of 2\\^7"),
        (100, (5).to_bytes(4, "big"), "header of 5 bytes"),
    ],
)
def test_a_damaged_header_is_one_clear_line(tmp_path, offset, data, words):
    path = tmp_path / "d.qcow2"
    create(str(path), MIB)
    patched(path, offset, data)
    before = path.read_bytes()
    with pytest.raises(BackendError, match=words) as caught:
        open_image(str(path))
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_truncated_file(tmp_path):
    path = tmp_path / "t.qcow2"
    create(str(path), MIB)
    whole = path.read_bytes()
    for length in (4, 50, 72, 100, 1 << 16, 2 << 16):
        path.write_bytes(whole[:length])
        with pytest.raises(BackendError):
            open_image(str(path))


@pytest.mark.parametrize("target", [1, 2, 3, 5, 1 << 30])
def test_l1_and_l2_that_loop_are_errors_of_the_disk_and_latch_it(tmp_path, target):
    """Entries that lead to the header, the tables or beyond: reads fail or give garbage, writes harm nothing."""
    path = tmp_path / "l.qcow2"
    create(str(path), 4 * MIB)
    cluster = 1 << 16
    image = open_image(str(path))
    write(image, 0, b"x" * 512)
    image.close()
    l2 = int.from_bytes(path.read_bytes()[3 * cluster :][:8], "big") & ~(1 << 63)
    entry = (target * cluster | 1 << 63).to_bytes(8, "big")
    patched(path, l2, entry)
    metadata = path.read_bytes()[: 4 * cluster]
    try:
        image = open_image(str(path))
    except BackendError:
        return
    with pytest.raises(OSError, match="damaged"):
        write(image, 0, b"y" * 512)
    with pytest.raises(OSError, match="not written"):
        write(image, MIB, b"y" * 512)
    image.close()
    after = path.read_bytes()[: 4 * cluster]
    assert after[80:] == metadata[80:]
    assert after[79] == 2  # the corrupt bit


def test_backing_files_that_are_missing_circular_or_of_another_format(tmp_path):
    a, b, link = tmp_path / "a.qcow2", tmp_path / "b.qcow2", tmp_path / "link"
    create(str(a), MIB, backing="b.qcow2", backing_format="qcow2")
    with pytest.raises(BackendError, match="No such file"):
        open_image(str(a), form="qcow2")
    link.symlink_to(a)
    create(str(b), MIB, backing="link", backing_format="qcow2")
    with pytest.raises(BackendError, match="leads back to itself"):
        open_image(str(a), form="qcow2")
    b.unlink()
    b.write_bytes(bytes(MIB))
    with pytest.raises(BackendError, match="is no qcow2 image"):
        open_image(str(a), form="qcow2")


@pytest.mark.parametrize("how", [{}, {"readonly": True}, {"overlay": "memory"}, {"overlay": "new"}])
@pytest.mark.parametrize("named", ["backing", "data"])
def test_an_image_told_by_content_names_no_other_file(tmp_path, how, named):
    """A guest that owns a raw image writes a header that names a file of the host: nothing is opened or changed."""
    secret, path = tmp_path / "secret\x1b[2J", tmp_path / "disk.img"
    secret.write_bytes(b"s" * MIB)
    backing = {"backing": str(secret), "backing_format": "raw"} if named == "backing" else {}
    create(str(path), MIB, **backing)
    if named == "data":
        patched(path, 72, (4).to_bytes(8, "big"))  # incompatible features, bit 2: the data is in another file
    how = {key: str(tmp_path / value) if value == "new" else value for key, value in how.items()}
    before = path.read_bytes()
    with pytest.raises(BackendError, match=r"looks like a qcow2 image that names an") as caught:
        open_image(str(path), **how)
    assert str(caught.value).isprintable()
    assert "format=qcow2" in caught.value.hint
    assert "format=raw" in caught.value.hint
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["disk.img", secret.name]
    if named == "backing":
        image = open_image(str(path), form="qcow2", **how)
        assert contents(image) == b"s" * MIB
        image.close()
    (tmp_path / "new").unlink(missing_ok=True)
    image = open_image(str(path), form="raw", **how)
    assert contents(image) == before
    image.close()


def test_a_name_that_fills_the_header_is_shown_in_part(tmp_path):
    path = tmp_path / "disk.img"
    create(str(path), MIB, backing="n" * 1000, backing_format="raw")
    with pytest.raises(BackendError, match="nnn") as caught:
        open_image(str(path))
    assert len(str(caught.value)) < len(str(path)) + 200


def test_a_backing_file_without_a_stated_format_is_raw(tmp_path):
    """What a guest wrote to a raw base does not make it another format."""
    base, path = tmp_path / "base", tmp_path / "a.qcow2"
    base.write_bytes(b"b" * MIB)
    create(str(path), MIB, backing="base")
    image = open_image(str(path), form="qcow2")
    assert contents(image) == b"b" * MIB
    image.close()
    base.unlink()
    create(str(base), MIB)
    with pytest.raises(BackendError, match="no format is stated") as caught:
        open_image(str(path), form="qcow2")
    assert "-F qcow2" in caught.value.hint
    qemu_img("rebase", "-u", "-b", base, "-F", "qcow2", path)
    open_image(str(path), form="qcow2").close()


def test_two_cannot_write_one_image_and_qemu_respects_it(tmp_path):
    path = tmp_path / "two.qcow2"
    create(str(path), MIB)
    image = open_image(str(path))
    with pytest.raises(BackendError, match="in use"):
        open_image(str(path))
    with pytest.raises(BackendError, match="in use"):
        open_image(str(path), readonly=True)
    assert subprocess.run(["qemu-io", "-c", "write 0 512", path], check=False, capture_output=True).returncode
    image.close()
    readers = [open_image(str(path), readonly=True) for _ in range(2)]
    assert subprocess.run(["qemu-io", "-c", "write 0 512", path], check=False, capture_output=True).returncode
    for reader in readers:
        reader.close()
    subprocess.run(["qemu-io", "-c", "write 0 512", path], check=True, capture_output=True)


def test_a_compressed_cluster_that_lies(tmp_path):
    source, path = tmp_path / "s.raw", tmp_path / "c.qcow2"
    source.write_bytes(b"abcd" * (MIB // 4))
    qemu_img("convert", "-c", "-O", "qcow2", source, path)
    image = open_image(str(path), readonly=True)
    place = image._compressed_place(image._entry(0))[0]
    image.close()
    patched(path, place, b"\xff" * 64)
    image = open_image(str(path), readonly=True)
    with pytest.raises(OSError, match=r"unpacked|cluster of"):
        contents(image)
    image.close()
