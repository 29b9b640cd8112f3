"""`hv snapshot info`, `check` and `diff`: what they say, as text and as JSON, and their status."""

import json
import os

import pytest
from kallsyms_writer import LAYOUTS, MIB, put_kernel
from snapshots import CHUNK, MACHINE, PAGE, STATE, kvm, ram, rewrite, save

from devices.ports import GuestFault
from hypervisor import cli
from hypervisor.cpuid import Entry
from hypervisor.errors import HostError
from hypervisor.memory import GuestMemory, RamRange
from hypervisor.snapshot import compare, fit
from hypervisor.snapshot.store import Snapshot, Writer

AMD = Entry(0, 0, 0, 1, 0x68747541, 0x444D4163, 0x69746E65)
HOST = fit.Host(
    cpuid=[AMD, Entry(1, 0, 0, 0, 0, 0xFFFF_FFFF, 0xFFFF_FFFF)],
    msrs=[0x10, 0xC000_0080],
    capabilities=dict.fromkeys(fit.CAPABILITIES, 8192),
    max_vcpus=8,
    page_size=4096,
    available=1 << 30,
)


@pytest.fixture
def hv(capsys):
    def run(*arguments):
        status = cli.main(["snapshot", *map(str, arguments)])
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def host(monkeypatch):
    """The host that `check` finds."""

    def use(**changes):
        monkeypatch.setattr(fit, "this_host", lambda: HOST._replace(**changes))

    use()
    return use


# --- info -------------------------------------------------------------------------------------------------------------


def test_info(tmp_path, hv):
    machine = {"kernel": "debian", "cpus": 2, "ram_mib": 1, "disks": [{"path": "root.img"}], "rng": {"bandwidth": None}}
    facts = {"vendor": "AuthenticAMD", "kernel": "6.1.0"}
    save(tmp_path / "base", ram(16, dense=(1, 2)), config=machine, host=facts, layers={"disk-0": bytes(3 << 20)})
    status, out, err = hv("info", tmp_path / "base")
    assert (status, err) == (0, "")
    for words in (
        "by hv 0.1.0 (format 1)",
        "debian, 2 vCPUs, 1 MiB of RAM",
        "disk root.img, rng",
        "AuthenticAMD, Linux 6.1.0",
        "chunks of 64 KiB: 2 here, 14 of zeros; 128 KiB on disk",
        "disk-0, 3 MiB",
    ):
        assert words in out
    value = json.loads(hv("info", tmp_path / "base", "--json")[1])
    assert value["version"] == 1
    assert value["machine"] == machine
    assert value["memory"]["on_disk"] == 2 * CHUNK
    assert value["parents"] == []
    assert value["parent_missing"] is None


def test_info_of_a_change_and_of_one_whose_parent_is_gone(tmp_path, hv):
    name = save(tmp_path / "base")
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "s", base=base, compress=True)
    status, out, _ = hv("info", tmp_path / "s")
    assert status == 0
    assert f"id {name}" in out
    assert "0 here in zstd, 3 of zeros, 1 the parent's" in out
    os.rename(tmp_path / "base", tmp_path / "gone")
    status, out, _ = hv("info", tmp_path / "s")
    assert status == 0
    assert "needs its parent" in out
    assert "needs its parent" in json.loads(hv("info", tmp_path / "s", "--json")[1])["parent_missing"]


@pytest.mark.parametrize("verb", ["info", "check", "diff"])
def test_what_is_no_snapshot(tmp_path, hv, verb):
    names = [tmp_path / "nowhere"] * (2 if verb == "diff" else 1)
    status, out, err = hv(verb, *names)
    assert (status, out) == (2, "")
    assert err == f"hv: cannot open the snapshot {tmp_path / 'nowhere'}: No such file or directory\n"


def test_what_a_file_says_does_not_reach_the_terminal_as_it_is(tmp_path, hv):
    save(tmp_path / "s", config={"kernel": "\x1b[31mred\u202e", "disks": [{"path": "\x07"}], "nets": 5, "cpus": []})
    out = hv("info", tmp_path / "s")[1]
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "\\x1b[31mred\\u202e" in out


def test_help_and_usage(capsys):
    for arguments in (["snapshot", "--help"], ["snapshot", "check", "--help"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 0
    assert "exit status" in capsys.readouterr().out
    for arguments in (["snapshot"], ["snapshot", "sing"], ["snapshot", "info"], ["snapshot", "diff", "a"]):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        assert end.value.code == 2


# --- check ------------------------------------------------------------------------------------------------------------


def test_check_of_one_that_is_fine(tmp_path, hv, host):
    save(tmp_path / "s")
    assert hv("check", tmp_path / "s") == (0, f"{tmp_path / 's'} is whole, and runs on this host\n", "")
    status, out, _ = hv("check", tmp_path / "s", "--json")
    assert status == 0
    value = json.loads(out)
    assert value["ok"] is True
    assert value["problems"] == []
    assert value["memory_verified"] is True


def test_check_with_and_without_memory(tmp_path, hv, host):
    save(tmp_path / "s")
    with open(tmp_path / "s" / "memory", "r+b") as file:
        file.seek(CHUNK + 9)
        file.write(b"!")
    status, out, _ = hv("check", tmp_path / "s")
    assert status == 1
    assert out.startswith("damage: ")
    assert "chunk 1 (guest memory at 0x10000)" in out
    assert len(out.splitlines()) == 1
    value = json.loads(hv("check", tmp_path / "s", "--json")[1])
    (problem,) = value["problems"]
    assert (problem["kind"], problem["chunk"], problem["gpa"]) == ("damage", 1, CHUNK)
    status, out, _ = hv("check", tmp_path / "s", "--no-memory")
    assert status == 0
    assert "memory, which was not read" in out


def test_check_of_one_that_cannot_even_be_opened(tmp_path, hv, host):
    save(tmp_path / "s", layers={"disk-0": b"x"})
    os.unlink(tmp_path / "s" / "disk-0")
    status, out, _ = hv("check", tmp_path / "s", "--json")
    assert status == 1
    assert json.loads(out)["problems"][0]["text"] == f"{tmp_path / 's' / 'disk-0'}: is missing"


def test_check_of_a_change_without_its_parent(tmp_path, hv, host):
    save(tmp_path / "base")
    with Snapshot.open(tmp_path / "base") as base:
        save(tmp_path / "s", base=base)
    os.rename(tmp_path / "base", tmp_path / "gone")
    status, out, _ = hv("check", tmp_path / "s")
    assert status == 1
    assert out.startswith("parent: ")
    assert "No such file" in out


# what the host has otherwise, the kind of problem, words in its text
LACKS = [
    ({"cpuid": [AMD, Entry(1, 0, 0, 0, 0, 0, 0)]}, "cpuid", ["pni", "fpu", "leaf 0x1 ECX", "leaf 0x1 EDX"]),
    ({"cpuid": [Entry(0, 0, 0, 1, 0x756E6547, 0x6C65746E, 0x49656E69), HOST.cpuid[1]]}, "vendor", ["GenuineIntel"]),
    ({"msrs": [0x10]}, "msr", ["0xc0000080"]),
    ({"capabilities": HOST.capabilities | {"XCRS": 0}}, "capability", ["KVM_CAP_XCRS"]),
    ({"capabilities": HOST.capabilities | {"PIT2": 0}}, "capability", ["KVM_CAP_PIT2"]),
    ({"max_vcpus": 1}, "vcpus", ["2 vCPUs", "allows 1"]),
    ({"available": CHUNK // 2}, "memory", ["MiB"]),
    ({"page_size": 16384}, "page-size", ["4096", "16384"]),
]


@pytest.mark.parametrize("row", LACKS, ids=[f"{row[1]}-{at}" for at, row in enumerate(LACKS)])
def test_check_says_what_this_host_lacks(tmp_path, hv, host, row):
    changes, kind, words = row
    save(tmp_path / "s", state={"kvm": kvm(2)})
    assert hv("check", tmp_path / "s")[0] == 0
    host(**changes)
    status, out, _ = hv("check", tmp_path / "s")
    assert status == 1
    assert {line.split(":")[0] for line in out.splitlines()} == {kind}
    for word in words:
        assert word in out
    problems = json.loads(hv("check", tmp_path / "s", "--json")[1])["problems"]
    assert {problem["kind"] for problem in problems} == {kind}


def test_check_names_a_missing_disk_image(tmp_path, hv, host):
    (tmp_path / "there.img").write_bytes(b"")
    disks = [{"path": str(tmp_path / "there.img")}, {"path": str(tmp_path / "gone.img")}]
    save(tmp_path / "s", config=MACHINE | {"disks": disks})
    status, out, _ = hv("check", tmp_path / "s")
    assert (status, out) == (1, f"disk: the disk image {tmp_path / 'gone.img'} is not there\n")


def test_check_on_a_host_without_kvm(tmp_path, hv, monkeypatch):
    def none():
        raise HostError("cannot open /dev/kvm")

    monkeypatch.setattr(fit, "this_host", none)
    save(tmp_path / "s")
    status, out, _ = hv("check", tmp_path / "s")
    assert (status, out) == (1, "kvm: no machine runs here: cannot open /dev/kvm\n")


def test_an_msr_of_zero_is_as_good_as_absent_and_mtrrs_are_known(tmp_path, host):
    save(tmp_path / "s", state={"kvm": kvm(msrs=[[0x123, 0], [0x200, 6], [0x2FF, 0xC00], [0x400, 1]])})
    with Snapshot.open(tmp_path / "s") as snapshot:
        assert fit.problems(snapshot, HOST) == []


@pytest.mark.parametrize(
    ("changes", "name", "value"),
    [
        ({"xsave": bytes(4096) + b"\1" + bytes(100)}, "XSAVE2", 4097),
        ({"nested": b"x"}, "NESTED_STATE", 1),
        ({"special": {"pdptr0": 1}}, "SREGS2", 1),
    ],
)
def test_capabilities_follow_from_the_state(changes, name, value):
    assert name not in fit.needed_capabilities({"kvm": kvm()})
    assert fit.needed_capabilities({"kvm": kvm(**changes)})[name] == value


@pytest.mark.parametrize(
    "state",
    [
        {},
        {"kvm": None},
        {"kvm": {"vcpus": []}},
        {"kvm": kvm(cpuid=[[1]])},
        {"kvm": kvm(msrs=[5])},
        {"kvm": kvm(xsave=None)},
        {"kvm": kvm(0)},
    ],
)
def test_states_that_are_none(tmp_path, hv, host, state):
    save(tmp_path / "s", state=state)
    status, out, _ = hv("check", tmp_path / "s")
    assert status == 1
    assert out.startswith("state: ")


def test_available_memory_is_what_the_kernel_says(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable:     40 kB\nSwapFree:  2 kB\n")
    assert fit._available(str(tmp_path / "meminfo")) == 42 * 1024


# --- diff -------------------------------------------------------------------------------------------------------------


def test_no_difference(tmp_path, hv):
    save(tmp_path / "a")
    save(tmp_path / "b", compress=True)
    assert hv("diff", tmp_path / "a", tmp_path / "b") == (0, "no difference\n", "")


def test_values_that_differ_by_their_path(tmp_path, hv):
    save(tmp_path / "a", state=STATE)
    lapic = bytearray(1024)
    lapic[0x20], lapic[0x80] = 7, 1
    other = kvm(lapic=bytes(lapic), msrs=[[0x10, 6], [0x1B, 1]], registers={"rax": 2, "rip": 0x1000})
    save(tmp_path / "b", state={"kvm": other, "devices": {"uart0": {"ier": 1, "fifo": b"", "dlab": 1}}}, config={})
    status, out, _ = hv("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0
    lines = out.splitlines()
    for line in (
        "kvm.vcpus[0].registers.rax: 0x1 -> 0x2",
        "kvm.vcpus[0].msrs.0x10: 0x5 -> 0x6",
        "kvm.vcpus[0].msrs.0xc0000080: 0x500 -> (absent)",
        "kvm.vcpus[0].msrs.0x1b: (absent) -> 0x1",
        "devices.uart0.fifo: 2 bytes -> 0 bytes",
        "devices.uart0.dlab: False -> 0x1",
        "devices.uart0.peer: None -> (absent)",
        "machine.kernel: 'hello' -> (absent)",
        "memory: 0 pages differ, in 0 ranges",
    ):
        assert line in lines
    (line,) = [line for line in lines if ".lapic" in line]
    assert line.startswith("kvm.vcpus[0].lapic: 2 of 1024 bytes, from 0x20 on: 00 00")
    value = json.loads(hv("diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    rows = {row["path"]: (row["before"], row["after"]) for row in value["state"]}
    assert rows["kvm.vcpus[0].registers.rax"] == (1, 2)
    assert rows["devices.uart0.fifo"] == ("00ff", "")


def test_pages_that_differ_by_range(tmp_path, hv):
    before = ram(8, dense=(1, 3))
    after = bytearray(before)
    for page in (16, 17, 18, 31, 32, 100):
        after[page * PAGE + 5] ^= 1
    save(tmp_path / "a", before)
    with Snapshot.open(tmp_path / "a") as base:
        save(tmp_path / "b", after, base=base, compress=True)
    status, out, _ = hv("diff", tmp_path / "a", tmp_path / "b")
    assert status == 0
    assert "memory: 6 pages differ, in 3 ranges" in out
    value = json.loads(hv("diff", tmp_path / "a", tmp_path / "b", "--json")[1])
    assert value["changed_pages"] == 6
    assert [(row["gpa"], row["pages"]) for row in value["ranges"]] == [
        (16 * PAGE, 3),
        (31 * PAGE, 2),
        (100 * PAGE, 1),
    ]
    out = hv("diff", tmp_path / "a", tmp_path / "b", "--top", "1")[1]
    assert "and 2 ranges more" in out
    assert hv("diff", tmp_path / "a", tmp_path / "b", "--top", "-1")[0] == 2


def test_ram_of_another_size(tmp_path, hv):
    save(tmp_path / "a", ram(2))
    save(tmp_path / "b", ram(3))
    out = hv("diff", tmp_path / "a", tmp_path / "b")[1]
    assert "RAM: 128 KiB -> 192 KiB" in out
    assert "0 pages differ" in out


def test_damaged_memory_is_not_compared(tmp_path, hv):
    save(tmp_path / "a")
    save(tmp_path / "b")
    with open(tmp_path / "b" / "memory", "r+b") as file:
        file.write(b"!")
    status, out, err = hv("diff", tmp_path / "a", tmp_path / "b")
    assert (status, out) == (2, "")
    assert "chunk 0" in err


NAMES = [
    (0, "T_text"),
    (0x100, "Tstart_kernel"),
    (0x10_1000, "Tsys_read"),
    (0x10_1800, "tsys_write"),
    (0x10_3000, "dflag"),
]
PHYSICAL, VIRTUAL = 16 * MIB, 0xFFFF_FFFF_8100_0000


@pytest.fixture
def kernels(tmp_path):
    """Snapshots before and after a kernel that KASLR moved has changed some of its pages."""
    memory = GuestMemory(40 * MIB)
    put_kernel(memory, LAYOUTS["6.4"], NAMES, physical=PHYSICAL, virtual=VIRTUAL + 32 * MIB)

    def put(name):
        with Writer(tmp_path / name) as writer:
            writer.write_memory(memory.view(0, memory.size), memory.ranges)
            writer.commit({})

    put("a")
    for offset in (0x10_1000, 0x10_2000, 0x10_3FF0):
        memory.write(PHYSICAL + offset, b"!")
    memory.write(MIB, b"user")
    put("b")
    memory.close()
    return tmp_path


def test_pages_are_named_by_the_kernels_own_table(kernels, hv):
    out = hv("diff", kernels / "a", kernels / "b")[1]
    assert "memory: 4 pages differ, in 2 ranges" in out
    assert "0x1101000       3 pages  sys_read, sys_write, flag" in out
    assert "0x100000       1 page" in out
    rows = json.loads(hv("diff", kernels / "a", kernels / "b", "--json")[1])["ranges"]
    assert [row["symbols"] for row in rows] == [[], ["sys_read", "sys_write", "flag"]]


def test_pages_are_named_by_a_file_wherever_the_kernel_lies(tmp_path, hv):
    """A kernel without a table of its own: System.map, and the banner tells where it is."""
    memory = bytearray(24 * MIB)
    banner = PHYSICAL + 0x20_0040
    memory[banner : banner + 20] = b"Linux version 6.1.0 "
    memory[banner + 100 : banner + 114] = b"Linux version "  # of no use: it lies elsewhere in its 2 MiB
    save(tmp_path / "a", memory)
    memory[PHYSICAL + 0x1234] = 1
    save(tmp_path / "b", memory)
    text = "".join(
        f"{VIRTUAL + 6 * MIB + at:016x} {kind} {name}\n"
        for at, kind, name in [
            (0, "T", "_text"),
            (0x1200, "t", "handler"),
            (0x1F00, "t", "other"),
            (0x20_0040, "D", "linux_banner"),
            (0x30_0000, "B", "_end"),
        ]
    )
    (tmp_path / "System.map").write_text(text)
    rows = json.loads(hv("diff", tmp_path / "a", tmp_path / "b", "--json", "--symbols", tmp_path / "System.map")[1])
    assert rows["ranges"] == [{"gpa": PHYSICAL + 0x1000, "pages": 1, "symbols": ["_text", "handler", "other"]}]
    status, _, err = hv("diff", tmp_path / "a", tmp_path / "b", "--symbols", tmp_path / "nowhere")
    assert status == 2
    assert "No such file" in err
    (tmp_path / "other.map").write_text("ffffffff81000000 T _text\nffffffff81000008 D linux_banner\n")
    status, out, err = hv("diff", tmp_path / "a", tmp_path / "b", "--symbols", tmp_path / "other.map")
    assert status == 0
    assert "no kernel with these symbols" in err
    assert "1 pages differ" in out


def test_saved_memory_in_two_ranges_reads_as_the_guests(tmp_path):
    memory = ram(4, dense=(0, 1, 2, 3))
    ranges = [RamRange(0, 2 * CHUNK, 0), RamRange(1 << 32, 2 * CHUNK, 2 * CHUNK)]
    with Writer(tmp_path / "s") as writer:
        writer.write_memory(memoryview(memory), ranges)
        writer.commit({})
    with Snapshot.open(tmp_path / "s") as snapshot, compare.SavedMemory(snapshot) as saved:
        assert saved.read((1 << 32) + 5, 10) == memory[2 * CHUNK + 5 : 2 * CHUNK + 15]
        for gpa, size in ((2 * CHUNK - 1, 2), (1 << 31, 1), (0, -1), ((1 << 32) + 2 * CHUNK, 1), (-1, 1)):
            with pytest.raises(GuestFault):
                saved.read(gpa, size)


def test_a_rewritten_state_is_shown_as_it_is(tmp_path, hv):
    save(tmp_path / "a")
    save(tmp_path / "b")
    rewrite(tmp_path / "b", lambda value: value["state"].update(x={"$base64": "!"}))
    status, out, err = hv("diff", tmp_path / "a", tmp_path / "b")
    assert (status, out) == (2, "")
    assert "state" in err
