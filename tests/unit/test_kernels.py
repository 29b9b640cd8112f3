"""The catalogue of guest kernels and its cache, with stand-ins for the package client and the compiler."""

import errno
import json
import os
import threading
import time

import pytest
from kernel_host import KernelHost

from hypervisor import cli, kernels
from hypervisor.errors import ConfigError, HostError
from hypervisor.kernels import cache, recipe
from hypervisor.kernels.cache import Slot
from hypervisor.kernels.progress import BarProgress, LineProgress, Progress, for_stream


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "trapvisor"


@pytest.fixture
def host(tmp_path, monkeypatch):
    host = KernelHost(tmp_path / "host")
    monkeypatch.setenv("PATH", host.path)
    monkeypatch.setenv("HOST", str(host.folder))
    return host


class Words(Progress):
    """Keeps what it is told."""

    def __init__(self):
        self.steps = []
        self.said = []

    def begin(self, what, **_):
        self.steps.append(what)

    def say(self, text):
        self.said.append(text)


class FakeRecipe:
    """Makes a kernel of two files, and counts how often."""

    name = "debian"
    kind = "package"
    summary = "a kernel"
    command_line = "console=ttyS0"
    flat = None
    room = 1000

    def __init__(self):
        self.made = 0
        self.hash = "f" * 64
        self.newest = "1"
        self.before_end = lambda: None

    def fingerprint(self):
        return self.hash

    def latest(self, _scratch, _progress):
        return self.newest

    def make(self, folder, _scratch, _progress):
        self.made += 1
        (folder / "vmlinuz").write_bytes(b"kernel " + str(self.made).encode())
        (folder / "modules").mkdir()
        (folder / "modules" / "a.ko").write_bytes(b"module")
        self.before_end()
        return recipe.Product(self.newest, {"image": "vmlinuz", "modules": "modules"}, ["a note"])


@pytest.fixture
def fake(monkeypatch):
    fake = FakeRecipe()
    monkeypatch.setattr(kernels, "_recipe", lambda _name: fake)
    return fake


def publish(slot, files, *, version="1", fingerprint="f" * 64, roles=None):
    with slot.locked(Progress()), slot.workspace() as work:
        made = work / "made"
        made.mkdir()
        for name, data in files.items():
            (made / name).write_bytes(data)
        return slot.publish(made, version=version, fingerprint=fingerprint, roles=roles or {}, notes=[])


# --- the cache ------------------------------------------------------------------------------------------------------


def test_the_cache_is_where_xdg_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/x")
    assert str(cache.root()) == "/var/x/trapvisor"
    monkeypatch.setenv("HOME", str(tmp_path))
    for useless in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", useless)
        assert cache.root() == tmp_path / ".cache" / "trapvisor"


def test_what_is_published_is_found_again():
    slot = Slot("kernels", "x")
    assert slot.current() is None
    published = publish(slot, {"vmlinuz": b"abc", "config": b""}, version="6.1", roles={"image": "vmlinuz"})
    found = slot.current()
    assert found == published
    assert found.role("image").read_bytes() == b"abc"
    assert found.role("vmlinux") is None
    assert found.size == 3
    assert found.damage(deep=True) == []
    assert json.loads((slot.folder / "current" / "manifest.json").read_text())["files"]["vmlinuz"][0] == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    )


def test_a_new_version_takes_the_place_of_the_old_one():
    slot = Slot("kernels", "x")
    old = publish(slot, {"vmlinuz": b"1"}, version="1")
    new = publish(slot, {"vmlinuz": b"2"}, version="2")
    again = publish(slot, {"vmlinuz": b"3"}, version="2")
    assert not old.folder.exists()
    assert not new.folder.exists()
    assert slot.current() == again
    assert sorted(path.name for path in slot.folder.iterdir()) == sorted([again.folder.name, "current", "lock"])


def test_damage_is_seen_by_size_at_once_and_by_hash_when_deep():
    slot = Slot("kernels", "x")
    found = publish(slot, {"vmlinuz": b"abc", "other": b"def"}, roles={"image": "vmlinuz"})
    image, other = found.folder / "vmlinuz", found.folder / "other"
    other.write_bytes(b"DEF")
    assert found.damage(deep=False) == []
    assert found.damage(deep=True) == ["other"]
    before = image.stat()
    image.write_bytes(b"ABC")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert found.damage(deep=False) == []
    assert found.damage(deep=True) == ["other", "vmlinuz"]
    image.write_bytes(b"ab")
    assert found.damage(deep=False) == ["vmlinuz"]
    image.unlink()
    assert found.damage(deep=False) == ["vmlinuz"]


def test_a_copied_cache_has_other_times_and_is_whole():
    found = publish(Slot("kernels", "x"), {"vmlinuz": b"abc"}, roles={"image": "vmlinuz"})
    os.utime(found.folder / "vmlinuz", (1, 1))
    assert found.damage(deep=False) == []
    (found.folder / "vmlinuz").write_bytes(b"abX")
    os.utime(found.folder / "vmlinuz", (1, 1))
    assert found.damage(deep=False) == ["vmlinuz"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": 2}', '{"schema": 1, "files": 3}'])
def test_a_manifest_that_cannot_be_read_is_none(text):
    slot = Slot("kernels", "x")
    found = publish(slot, {"vmlinuz": b"abc"})
    (found.folder / "manifest.json").write_text(text)
    assert slot.current() is None


def test_a_failure_leaves_nothing_and_keeps_what_was(fake):
    kept = kernels.get("debian")

    def fail():
        raise HostError("the network is gone")

    fake.before_end, fake.hash = fail, "0" * 64
    with pytest.raises(HostError, match="network"):
        kernels.get("debian")
    assert kernels.kernel("debian") == kept
    assert [path.name for path in kept.image.parent.parent.glob(".work*")] == []


def test_what_a_killed_process_left_is_cleared(own_cache):
    stale = own_cache / "kernels" / "x" / ".work-1"
    stale.mkdir(parents=True)
    (stale / "half").write_bytes(b"")
    with Slot("kernels", "x").workspace() as work:
        assert not stale.exists()
        assert list(work.iterdir()) == []


def test_two_gets_at_once_make_it_once(fake):
    words = [Words(), Words()]

    def somebody_waits():
        return sum("debian: another process is getting it; waiting" in one.steps for one in words)

    def until_somebody_waits():
        end = time.monotonic() + 60
        while not somebody_waits() and time.monotonic() < end:
            time.sleep(0.01)

    fake.before_end = until_somebody_waits
    threads = [threading.Thread(target=kernels.get, args=("debian",), kwargs={"progress": one}) for one in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert fake.made == 1
    assert somebody_waits() == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_refusal_of_the_file_system_says_where_and_what_to_do(fake, own_cache, number):
    def fail():
        raise OSError(number, os.strerror(number))

    fake.before_end = fail
    with pytest.raises(HostError, match=os.strerror(number)) as caught:
        kernels.get("debian")
    assert str(own_cache) in str(caught.value)
    assert "XDG_CACHE_HOME" in caught.value.hint


@pytest.mark.usefixtures("fake")
def test_a_cache_that_is_a_file_is_refused(monkeypatch, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(HostError, match="cannot be written"):
        kernels.get("debian")


def test_too_little_room_is_said_before_anything_is_fetched(fake):
    fake.room = 1 << 62
    with pytest.raises(HostError, match="MB while it is made") as caught:
        kernels.get("debian")
    assert fake.made == 0
    assert "XDG_CACHE_HOME" in caught.value.hint


# --- the catalogue --------------------------------------------------------------------------------------------------


def test_the_catalogue_has_linux_first_and_every_source():
    names = kernels.names()
    assert names[:2] == ["debian", "tiny"]
    assert sorted(names[2:]) == sorted(path.stem for path in recipe.sources().glob("*.S"))


def test_every_kernel_says_what_it_is():
    for line in kernels.listing():
        assert line.summary, line.name
        assert line.state == "to get"


def test_sources_come_with_an_installed_package_or_with_the_checkout(monkeypatch, tmp_path):
    package = tmp_path / "site" / "hypervisor"
    package.mkdir(parents=True)
    monkeypatch.setattr(recipe, "PACKAGE", package)
    assert recipe.sources() == tmp_path / "site" / "guest-kernels"
    (package / "guest_kernels").mkdir()
    assert recipe.sources() == package / "guest_kernels"


def test_a_name_that_is_none_is_told_with_those_near():
    with pytest.raises(ConfigError, match="no guest kernel 'debain'") as caught:
        kernels.kernel("debain")
    assert "debian" in caught.value.hint
    with pytest.raises(ConfigError) as caught:
        kernels.path("qqqqqqqq")
    assert "hv kernel list" in caught.value.hint
    assert kernels.find("debain") is None


@pytest.mark.parametrize(
    "ask", [kernels.kernel, kernels.find, kernels.path, kernels.vmlinux, kernels.default_initramfs]
)
def test_a_kernel_that_is_not_here_is_told_how_to_get(ask):
    with pytest.raises(ConfigError, match="tiny is not in the cache") as caught:
        ask("tiny")
    assert caught.value.hint == "hv kernel get tiny"


def test_get_makes_once_and_then_finds(fake):
    made = kernels.get("debian")
    assert made.image.read_bytes() == b"kernel 1"
    assert (made.version, made.command_line, made.is_linux, made.notes) == ("1", "console=ttyS0", True, ["a note"])
    assert made.modules == made.image.parent / "modules"
    assert kernels.get("debian") == made == kernels.kernel("debian") == kernels.find("debian")
    assert kernels.ensure("debian") == made.image == kernels.path("debian")
    assert fake.made == 1
    with pytest.raises(ConfigError, match="no ELF file"):
        kernels.vmlinux("debian")


@pytest.mark.usefixtures("fake")
def test_ensure_gets_what_is_missing():
    assert kernels.ensure("debian").read_bytes() == b"kernel 1"


@pytest.mark.usefixtures("fake")
def test_damage_is_told_and_mended():
    image = kernels.get("debian").image
    image.write_bytes(b"kernel")
    with pytest.raises(ConfigError, match="damaged in the cache: vmlinuz") as caught:
        kernels.path("debian")
    assert caught.value.hint == "hv kernel get debian"
    words = Words()
    assert kernels.get("debian", progress=words).image.read_bytes() == b"kernel 2"
    assert "vmlinuz is damaged" in words.said[0]


def test_get_hashes_every_file(fake):
    made = kernels.get("debian")
    (made.modules / "a.ko").write_bytes(b"MODULE")
    assert kernels.kernel("debian") == made
    assert kernels.get("debian").modules.joinpath("a.ko").read_bytes() == b"module"
    assert fake.made == 2


def test_another_recipe_makes_it_anew_on_get_only(fake):
    made = kernels.get("debian")
    fake.hash = "0" * 64
    assert kernels.kernel("debian") == made
    assert kernels.listing()[0].state == "outdated"
    assert kernels.get("debian").image.read_bytes() == b"kernel 2"


def test_a_newer_version_is_got_on_demand(fake):
    kernels.get("debian")
    fake.newest = "2"
    assert kernels.get("debian").version == "1"
    assert kernels.get("debian", update=True).version == "2"
    kernels.get("debian", update=True)
    assert fake.made == 2


# --- progress -------------------------------------------------------------------------------------------------------


class Stream:
    def __init__(self, *, terminal=False):
        self.text = ""
        self.terminal = terminal

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return self.terminal


def test_a_log_gets_a_line_for_a_step_and_one_every_ten_seconds():
    stream, now = Stream(), [0.0]
    progress = LineProgress(stream, clock=lambda: now[0])
    progress.begin("building", total=200, unit="objects")
    for second in range(26):
        now[0] = float(second)
        progress.reach(second)
    progress.begin("fetching")
    now[0] = 40.0
    progress.reach(5)
    progress.end()
    assert stream.text == "building\nbuilding: 5%\nbuilding: 10%\nfetching\nfetching: 5 \n"


def test_only_a_terminal_gets_a_bar():
    assert isinstance(for_stream(Stream()), LineProgress)
    stream = Stream(terminal=True)
    bar = for_stream(stream)
    assert isinstance(bar, BarProgress)
    bar.say("first")
    bar.end()
    assert stream.text == "first\n"
    bar.begin("fetching", total=2_000_000, unit="bytes")
    bar.reach(1_000_000)
    bar.say("said [in] between")
    bar.begin("building", total=10, unit="objects")
    bar.reach(3)
    bar.end()
    assert "said [in] between" in stream.text
    assert "3 objects" in stream.text


# --- the command ----------------------------------------------------------------------------------------------------


def test_list_as_a_table_and_as_json(capsys):
    assert cli.main(["kernel", "list"]) == 0
    head, first, *_ = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "KIND", "STATE", "SIZE", "VERSION", "SUMMARY"]
    assert first.startswith("debian ")
    assert "to get" in first
    assert cli.main(["kernel", "list", "--json"]) == 0
    lines = json.loads(capsys.readouterr().out)
    assert [line["name"] for line in lines] == kernels.names()
    assert lines[0]["state"] == "to get"
    assert lines[0]["image"] is None


@pytest.mark.usefixtures("fake")
def test_get_and_path_print_paths(capsys):
    assert cli.main(["kernel", "get", "debian"]) == 0
    got = capsys.readouterr()
    assert got.out.startswith("debian 1: /")
    assert "a note" in got.err
    assert cli.main(["kernel", "path", "debian"]) == 0
    assert capsys.readouterr().out.strip() == str(kernels.path("debian"))
    assert cli.main(["kernel", "path", "debian", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] == str(kernels.path("debian"))
    assert cli.main(["kernel", "path", "debian", "--elf"]) == 2
    assert "no ELF file" in capsys.readouterr().err


def test_get_without_a_name_or_with_a_wrong_one_gets_nothing(capsys, host):
    assert cli.main(["kernel", "get"]) == 2
    assert "--all" in capsys.readouterr().err
    assert cli.main(["kernel", "get", "debian", "tinny"]) == 2
    assert "tinny" in capsys.readouterr().err
    assert host.calls() == []


def test_path_of_what_is_not_here_ends_with_2_and_a_hint(capsys):
    assert cli.main(["kernel", "path", "debian"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "hv: the guest kernel debian is not in the cache",
        "    hv kernel get debian",
    ]
