"""Snapshots that are not what was saved: every flipped byte is found, and what nobody would write is refused."""

import json
import os
import random
import shutil

import pytest
import xxhash
import zstandard
from snapshots import CHUNK, MANIFEST, PAGE, ram, reindex, rewrite, save, sealed

from hypervisor.errors import DamagedSnapshotError, SnapshotError
from hypervisor.snapshot.store import Snapshot


def whole(path):
    with Snapshot.open(path) as snapshot:
        snapshot.verify()


def refused(path, *words, kind=DamagedSnapshotError):
    """One line that names the file, and what is wrong."""
    with pytest.raises(kind) as caught:
        whole(path)
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 600
    for word in words:
        assert word in text
    return caught.value


def flip(file, at, mask):
    data = bytearray(file.read_bytes())
    data[at] ^= mask
    file.write_bytes(data)


@pytest.fixture
def snapshot(tmp_path):
    save(tmp_path / "s", ram(4, dense=(1, 3)), layers={"disk-0": bytes(range(256)) * 8})
    return tmp_path / "s"


@pytest.fixture
def compressed(tmp_path):
    memory = ram(4, dense=(1,))
    memory[3 * CHUNK : 4 * CHUNK] = b"text " * (CHUNK // 5) + b"."
    save(tmp_path / "z", memory, compress=True)
    return tmp_path / "z"


# --- flipped bytes ----------------------------------------------------------------------------------------------------


def test_a_flipped_byte_at_every_place_of_the_manifest(tmp_path):
    save(tmp_path / "s", bytearray(PAGE), state={"a": 1}, config={}, layers={"disk-0": b"x"})
    file = tmp_path / "s" / MANIFEST
    data = file.read_bytes()
    masks = random.Random(1)
    for at in range(len(data)):
        for mask in (1, 0x20, masks.randrange(1, 256)):
            file.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            with pytest.raises(SnapshotError):
                Snapshot.open(tmp_path / "s")
    file.write_bytes(data)
    whole(tmp_path / "s")


def test_a_manifest_cut_at_every_place(tmp_path):
    save(tmp_path / "s", bytearray(PAGE), state={"a": 1}, config={})
    file = tmp_path / "s" / MANIFEST
    data = file.read_bytes()
    for size in range(len(data)):
        file.write_bytes(data[:size])
        refused(tmp_path / "s", "manifest.json")
    file.write_bytes(data + b"\n")
    refused(tmp_path / "s", "manifest.json")


def test_a_flipped_byte_at_every_place_of_the_index(snapshot):
    file = snapshot / "memory.index"
    for at in range(file.stat().st_size):
        flip(file, at, 1 << at % 8)
        refused(snapshot, "memory.index", "altered")
        flip(file, at, 1 << at % 8)
    whole(snapshot)


def test_a_flipped_byte_in_raw_memory_in_its_chunk_and_in_its_holes(snapshot):
    places = random.Random(2)
    size = 4 * CHUNK
    for at in [0, CHUNK - 1, CHUNK, size - 1, *(places.randrange(size) for _ in range(60))]:
        copy = snapshot.with_name("copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(snapshot, copy)
        flip(copy / "memory", at, 1 << at % 8)
        error = refused(copy, f"chunk {at // CHUNK} ", "altered")
        assert (error.chunk, error.gpa) == (at // CHUNK, at // CHUNK * CHUNK)
        assert error.file == str(copy / "memory")


def test_a_flipped_byte_in_compressed_memory(compressed):
    file = compressed / "memory"
    size = file.stat().st_size
    places = random.Random(3)
    frame = CHUNK  # the first chunk is random and compresses to about its own size; the second is short
    some = [*range(24), *(places.randrange(size) for _ in range(60)), *range(max(frame, size - 200), size)]
    for at in some:
        flip(file, at, 1 << at % 8)
        refused(compressed, "memory", "altered")
        with Snapshot.open(compressed) as snapshot, pytest.raises(DamagedSnapshotError):
            snapshot.map_memory(verify=False)
        flip(file, at, 1 << at % 8)
    whole(compressed)


def test_a_flipped_byte_in_a_layer(snapshot):
    for at in (0, 1000, 2047):
        flip(snapshot / "disk-0", at, 4)
        refused(snapshot, "disk-0", "altered")
        flip(snapshot / "disk-0", at, 4)


def test_zeros_written_into_holes_are_no_damage(snapshot, tmp_path):
    """A copy without holes is as good."""
    (tmp_path / "s" / "memory").write_bytes((snapshot / "memory").read_bytes())
    whole(snapshot)


@pytest.mark.parametrize("name", ["memory", "memory.index", "disk-0"])
def test_files_cut_grown_missing_or_no_files(snapshot, name):
    file = snapshot / name
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    refused(snapshot, name, "is cut short", str(len(data)))
    file.write_bytes(data + b"x")
    refused(snapshot, name, "has grown")
    file.unlink()
    refused(snapshot, name, "is missing")
    file.mkdir()
    refused(snapshot, name, "is no file")
    file.rmdir()
    os.mkfifo(file)
    refused(snapshot, name, "is no file")
    file.unlink()
    file.symlink_to("/etc/passwd")
    refused(snapshot, name, kind=SnapshotError)


def test_memory_that_is_cut_while_it_is_open(snapshot):
    with Snapshot.open(snapshot) as one:
        os.truncate(snapshot / "memory", CHUNK + 10)
        with pytest.raises(DamagedSnapshotError, match=r"chunk 1 .*cut short"):
            one.verify()


# --- what is none -----------------------------------------------------------------------------------------------------


def test_no_snapshot_at_all(tmp_path):
    refused(tmp_path / "nowhere", "cannot open", kind=SnapshotError)
    refused(tmp_path, "is no snapshot", kind=SnapshotError)
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "cannot open", kind=SnapshotError)
    (tmp_path / "d" / MANIFEST).mkdir(parents=True)
    refused(tmp_path / "d", "cannot open", kind=SnapshotError)
    (tmp_path / "e").mkdir()
    for text in (b"", b"{}", b"[]", b"null", b"\xff\xfe", b"{" * 1000, b'{"format":"other","version":1}'):
        (tmp_path / "e" / MANIFEST).write_bytes(text)
        refused(tmp_path / "e", MANIFEST, kind=SnapshotError)


@pytest.mark.parametrize(("version", "word"), [(2, "newer"), (0, "older"), (-1, "older"), (1 << 40, "newer")])
def test_other_versions_say_so(snapshot, version, word):
    rewrite(snapshot, lambda value: value | {"version": version, "hv": "9.9"})
    error = refused(snapshot, f"version {version}", word, kind=SnapshotError)
    assert "9.9" in error.hint


def test_a_newer_version_says_so_whatever_else_it_has(tmp_path):
    (tmp_path / MANIFEST).write_bytes(b'{"format":"trapvisor-snapshot","version":7,"hv":"9","x":[1]}')
    error = refused(tmp_path, "version 7", "newer", kind=SnapshotError)
    assert not isinstance(error, DamagedSnapshotError)


def test_unknown_and_missing_members(snapshot):
    data = json.loads((snapshot / MANIFEST).read_bytes())
    for name in data:
        if name == "digest":
            continue

        def without(value, name=name):
            del value[name]

        copy = snapshot.with_name("copy")
        shutil.copytree(snapshot, copy)
        rewrite(copy, without)
        refused(copy, MANIFEST, name)
        shutil.rmtree(copy)
    rewrite(snapshot, lambda value: value | {"color": 1})
    assert "newer" in refused(snapshot, "color").hint


# --- what nobody would write ------------------------------------------------------------------------------------------

HOSTILE = {
    "a size beyond all memory": lambda v: v["memory"].update(size=1 << 62),
    "a size that is no page": lambda v: v["memory"].update(size=4 * CHUNK - 1),
    "a negative size": lambda v: v["memory"].update(size=-4096),
    "a size that is a text": lambda v: v["memory"].update(size="4096"),
    "a size with a fraction": lambda v: v["memory"].update(size=4096.5),
    "a size of thirty digits": lambda v: v["memory"].update(size=10**30),
    "another size": lambda v: v["memory"].update(size=8 * CHUNK),
    "another chunk size": lambda v: v["memory"].update(chunk=4096),
    "chunks of nothing": lambda v: v["memory"].update(chunk=0),
    "another codec": lambda v: v["memory"].update(codec="lzma"),
    "a codec that it is not in": lambda v: v["memory"].update(codec="zstd"),
    "other counts": lambda v: v["memory"].update(zero=3, data=1),
    "huge counts": lambda v: v["memory"].update(zero=1 << 60),
    "chunks of a parent that there is not": lambda v: v["memory"].update(zero=1, base=1),
    "no ranges": lambda v: v["memory"].update(ranges=[]),
    "a thousand ranges": lambda v: v["memory"].update(ranges=v["memory"]["ranges"] * 1000),
    "ranges that overlap": lambda v: v["memory"].update(ranges=[{"gpa": 0, "size": 2 * CHUNK, "offset": 0}] * 2),
    "a range at the end of all addresses": lambda v: v["memory"]["ranges"][0].update(gpa=(1 << 64) - 4096),
    "a range from behind": lambda v: v["memory"]["ranges"][0].update(gpa=-4096),
    "a range that is not at the start": lambda v: v["memory"]["ranges"][0].update(offset=4096),
    "a range too large": lambda v: v["memory"]["ranges"][0].update(size=1 << 40),
    "another hash": lambda v: v["memory"].update(index="0" * 32),
    "a hash that is none": lambda v: v["memory"].update(index="../../etc/passwd"),
    "an id that is none": lambda v: v.update(id="x"),
    "a layer elsewhere": lambda v: v["layers"][0].update(name="../../../etc/passwd"),
    "a layer at the root": lambda v: v["layers"][0].update(name="/etc/passwd"),
    "a layer in a folder": lambda v: v["layers"][0].update(name="a/b"),
    "a layer with a zero byte": lambda v: v["layers"][0].update(name="disk\0"),
    "a layer that ends in a line": lambda v: v["layers"][0].update(name="disk-0\n"),
    "a hidden layer": lambda v: v["layers"][0].update(name=".."),
    "a layer that is the memory": lambda v: v["layers"][0].update(name="memory"),
    "a layer twice": lambda v: v.update(layers=v["layers"] * 2),
    "ten thousand layers": lambda v: v.update(layers=v["layers"] * 10000),
    "a layer of another size": lambda v: v["layers"][0].update(size=1),
    "a layer of another hash": lambda v: v["layers"][0].update(hash="0" * 32),
    "layers that are no list": lambda v: v.update(layers={}),
    "a state that is no table": lambda v: v.update(state=[]),
    "a machine that is none": lambda v: v.update(machine=None),
    "a version that is a text": lambda v: v.update(version="1"),
    "a parent at the root": lambda v: v.update(parent={"id": "0" * 32, "digest": "0" * 32, "path": "/etc"}),
    "a parent with a zero byte": lambda v: v.update(parent={"id": "0" * 32, "digest": "0" * 32, "path": "a\0b"}),
    "a parent that is no path": lambda v: v.update(
        parent={"id": "0" * 32, "digest": "0" * 32, "path": {"$base64": "AA=="}}
    ),
    "a parent whose path is broken": lambda v: v.update(
        parent={"id": "0" * 32, "digest": "0" * 32, "path": {"$path": "!"}}
    ),
    "a parent's path of two kinds": lambda v: v.update(parent={"id": "0" * 32, "digest": "0" * 32, "path": {"a": "b"}}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_manifests(snapshot, what):
    rewrite(snapshot, HOSTILE[what])
    refused(snapshot)


def test_a_manifest_too_deep(snapshot):
    def deep(value):
        text = json.dumps(value, separators=(",", ":"))
        return text.replace('"state":{', '"state":{"x":' + "[" * 200_000 + "]" * 200_000 + ",", 1).encode()[:-1]

    rewrite(snapshot, deep)
    refused(snapshot, "nested too deeply")


def test_a_state_too_deep_for_python_but_not_for_the_parser(snapshot):
    for depth in (200, 400, 600, 800, 950):
        value = []
        for _ in range(depth):
            value = [value]
        rewrite(snapshot, lambda manifest, value=value: manifest["state"].update(x=value))
        try:
            with Snapshot.open(snapshot) as one:
                assert one.state["x"] == value
        except DamagedSnapshotError:
            pass


def test_a_manifest_too_large(snapshot):
    os.truncate(snapshot / MANIFEST, 1 << 40)  # a hole: nothing is read of it
    refused(snapshot, "a manifest at most")


@pytest.mark.parametrize(
    "value", [{"$base64": "?"}, {"$base64": 5}, {"$base64": "AA==", "b": 1}, {"$else": "AA=="}, {"$base64": "A"}, 1.5]
)
def test_values_that_cannot_have_been_written(snapshot, value):
    rewrite(snapshot, lambda manifest: manifest["state"].update(x=value, y=[value]))
    with Snapshot.open(snapshot) as one, pytest.raises(DamagedSnapshotError, match="state"):
        one.state  # noqa: B018 - it is read here


@pytest.mark.parametrize(
    "machine",
    [{}, {"kernel": 5, "cpus": 10**9}, {"kernel": "x", "color": 1}, {"kernel": "x", "disks": [5]}, {"modules": 5}],
)
def test_machines_that_this_hv_does_not_know(snapshot, machine):
    rewrite(snapshot, lambda manifest: manifest.update(machine=machine))
    with Snapshot.open(snapshot) as one, pytest.raises(SnapshotError, match="machine that this hv does not know"):
        one.config  # noqa: B018 - it is made here


def test_what_a_file_says_stays_one_line_and_reaches_no_terminal_as_it_is(snapshot):
    rewrite(snapshot, lambda value: value | {"a\n\x1b[31m" + "b" * 1000: 1})
    refused(snapshot, "a\\n\\x1b[31mb")
    rewrite(snapshot, lambda value: value | {"hv": "\x1b[31m\n"})
    rewrite(snapshot, lambda value: value | {"version": 2})
    error = refused(snapshot, "newer", kind=SnapshotError)
    assert "\x1b" not in error.hint
    assert "\n" not in error.hint


def test_any_member_may_be_any_value_and_never_ends_in_a_traceback(snapshot):
    """Each member in turn is what no writer would put there."""
    original = (snapshot / MANIFEST).read_bytes()
    value = json.loads(original)
    for path in list(_paths(value)):
        for wrong in (None, -1, 10**40, "", "x" * 300, [], {}, [[]], True, 0.5):

            def put(manifest, path=path, wrong=wrong):
                *way, last = path
                for step in way:
                    manifest = manifest[step]
                manifest[last] = wrong

            rewrite(snapshot, put)
            try:
                with Snapshot.open(snapshot) as one:
                    one.verify()
                    _ = one.state, one.host, one.machine
                    _ = one.config
            except SnapshotError:
                pass
            (snapshot / MANIFEST).write_bytes(original)


def _paths(value, path=()):
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if path or key != "digest":
            yield (*path, key)
        if isinstance(item, dict | list) and item:
            yield from _paths(item, (*path, key))


# --- chunk tables -----------------------------------------------------------------------------------------------------

RECORD = 32  # bytes of a record: 16 of the content's hash, 8 of the frame's, 4 each of length and kind


@pytest.mark.parametrize(
    ("chunk", "at", "value"),
    [
        (0, 28, 1),  # zeros that are said to be here
        (0, 28, 2),  # the parent's, and there is none
        (0, 28, 3),  # no kind
        (0, 31, 0xFF),
        (1, 28, 1),  # data that is said to be zeros
        (1, 24, 1),  # data of another length
        (1, 27, 0xFF),
        (1, 16, 1),  # the hash of a frame where nothing is compressed
        (0, 0, 1),  # another hash of zeros
    ],
)
def test_records_that_do_not_fit(snapshot, chunk, at, value):
    def change(data):
        data[chunk * RECORD + at] ^= value

    reindex(snapshot, change)
    refused(snapshot, "memory.index")


def test_a_hash_that_is_not_the_contents(snapshot):
    reindex(snapshot, lambda data: data.__setitem__(RECORD, data[RECORD] ^ 1))
    assert refused(snapshot, "chunk 1 ").gpa == CHUNK


def test_compressed_records_that_do_not_fit(compressed):
    for at, value in ((24, 1), (27, 0x80), (25, 0x40)):
        reindex(compressed, lambda data, at=at, value=value: data.__setitem__(RECORD + at, data[RECORD + at] ^ value))
        refused(compressed, "memory.index")
        reindex(compressed, lambda data, at=at, value=value: data.__setitem__(RECORD + at, data[RECORD + at] ^ value))
    whole(compressed)


def test_a_frame_that_would_unpack_to_a_gigabyte(tmp_path):
    """Its length is the index's business, not the frame's."""
    save(tmp_path / "z", ram(1, dense=(0,)), compress=True)
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    for frame in (bomb, bomb[:100], b"x" * 20, zstandard.ZstdCompressor().compress(b"short")):
        (tmp_path / "z" / "memory").write_bytes(frame)

        def change(data, frame=frame):
            data[16:24] = xxhash.xxh3_64_digest(frame)
            data[24:28] = len(frame).to_bytes(4, "little")

        rewrite(tmp_path / "z", lambda value, frame=frame: value["memory"].update(stored=len(frame)))
        reindex(tmp_path / "z", change)
        refused(tmp_path / "z", "memory")


def test_parents_that_lead_in_circles(tmp_path):
    save(tmp_path / "s", layers={"disk-0": b""})
    with Snapshot.open(tmp_path / "s") as one:
        entry = {"id": one.id, "digest": one.digest, "path": "s"}
    rewrite(tmp_path / "s", lambda value: value | {"parent": entry})
    refused(tmp_path / "s", "altered", kind=SnapshotError)  # a digest cannot hold itself


def test_a_digest_that_fits_is_not_enough(tmp_path):
    (tmp_path / MANIFEST).write_bytes(sealed(b'{"format":"trapvisor-snapshot","version":1'))
    refused(tmp_path, MANIFEST, "missing")
