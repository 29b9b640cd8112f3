"""What is recorded of guests that are known to the last exit, on any KVM."""

import struct
import time

import pytest

from hypervisor import ConfigError, HostError, Machine, MachineConfig, kernels
from hypervisor.host import Kind, quick_kind
from hypervisor.kvm.recorder import tick
from hypervisor.profile.file import load

pytestmark = pytest.mark.kvm

TIMEOUT = 120
TEST_PORT = 0x5658
TEST_MMIO = 0xD000_0000
SOFTWARE = quick_kind() is Kind.SOFTWARE
# mov edx,0x5658; mov ecx,N; l: out dx,al; loop l; mov al,0; out 0xf4,al; hlt (32-bit)
LOOP = "ba58560000 b9{} ee e2fd b000 e6f4 f4"


class Probe:
    """A device that remembers what it was asked and answers by counting; a moment can pass in every access."""

    def __init__(self, seconds=0.0):
        self.log = []
        self._seconds = seconds
        self._answer = 0

    def read(self, offset, size):
        self._answer += 0x1234567
        self.log.append(("read", offset, size))
        time.sleep(self._seconds)
        return self._answer & (1 << 8 * size) - 1

    def write(self, offset, size, value):
        self.log.append(("write", offset, size, value))
        time.sleep(self._seconds)


def code(text, **values):
    return bytes.fromhex(text.format(**values).replace(" ", ""))


def loop_of(count):
    return bytes.fromhex(LOOP.format(count.to_bytes(4, "little").hex()).replace(" ", ""))


@pytest.fixture
def run(tmp_path):
    """Return a runner of guests: it gives the closed machine, the profile's path and the two probes."""

    def go(kernel, *, record=None, prepare=None, seconds=0.0, **settings):
        if isinstance(kernel, bytes):
            settings = {"flat": 32} | settings
        config = MachineConfig(kernel, **({"ram_mib": 16, "debug_exit": "raw"} | settings))
        ports, page = Probe(seconds), Probe()
        path = str(tmp_path / "run.hvprof")
        with Machine(config) as machine:
            machine.bus_pio.claim(TEST_PORT, 4, ports, "probe")
            machine.bus_mmio.claim(TEST_MMIO, 4096, page, "page")
            if record is not None:
                machine.record(path, **record)
            if prepare is not None:
                prepare(machine)
            outcome = machine.run(timeout=TIMEOUT)
        assert outcome.status == 0, outcome
        assert machine.profile_trouble == ""
        return machine, path, ports.log, page.log

    return go


def exact(exits):
    """Return (exits, operations) by kind, without the kicks by which a machine ends."""
    return {
        (row.vcpu, row.reason, row.device, row.address, row.direction, row.size): (row.count, row.operations)
        for row in exits.layer("user")
        if row.reason != "intr"
    }


# --- counts -----------------------------------------------------------------------------------------------------------


def test_every_way_out_of_the_guest_is_counted_exactly(run):
    """guest-kernels/exits.S: eighteen letters, accesses of every size, `rep outsb` of 6 and 4, `rep insb` of 4."""
    machine, path, _, _ = run("exits", record={})
    operations = {
        (0xE9, "out", 1, "debugcon"): 18,
        (TEST_PORT, "out", 1, "probe"): 1 + 1 + 6 + 4,
        (TEST_PORT, "out", 2, "probe"): 2,
        (TEST_PORT, "out", 4, "probe"): 2,
        (TEST_PORT, "in", 1, "probe"): 1 + 4,
        (TEST_PORT, "in", 2, "probe"): 1,
        (TEST_PORT, "in", 4, "probe"): 1,
        (0xF4, "out", 1, "debug-exit"): 1,
    }
    memory = {
        (TEST_MMIO + offset, direction, size, "page"): 1
        for offset, size in ((0, 1), (0x10, 2), (0x20, 4), (0x40, 8))
        for offset, direction in ((offset, "out"), (offset, "in"), (0x100 + offset, "out"))
    }
    for exits in (machine.exits, load(path).exits):
        found = {(r.address, r.direction, r.size, r.device): r for r in exits if r.reason == "io"}
        assert {key: row.operations for key, row in found.items()} == operations
        strings = {(TEST_PORT, "out", 1, "probe"), (TEST_PORT, "in", 1, "probe")}
        assert all(row.count == row.operations for key, row in found.items() if key not in strings)
        assert found[TEST_PORT, "in", 1, "probe"].count == 2  # one for the whole `rep insb`
        assert found[TEST_PORT, "out", 1, "probe"].count in {4, 12}  # `rep outsb`: once for all, or for each element
        found = {(r.address, r.direction, r.size, r.device): r.count for r in exits if r.reason == "mmio"}
        assert found == memory
        assert {r.reason for r in exits.layer("user")} <= {"io", "mmio", "intr"}
        for row in exits.layer("user"):
            assert row.handler.count == row.guest.count == row.count


def test_strings_of_every_width(run):
    """guest-kernels/string-io.S: six elements of 1, 2 and 4 bytes in and out, and six bytes backwards."""
    machine, _, log, _ = run("string-io")
    for direction in ("in", "out"):
        sizes = {row.size: row.operations for row in machine.exits.pio("probe", direction=direction)}
        assert sizes == {1: 12, 2: 6, 4: 6}
    assert machine.exits.pio("probe").operations == len(log) == 48
    assert machine.exits.pio("uart0", "THR", "out").operations == len(machine.console.output)


def test_four_processors_at_once(run):
    machine, path, log, _ = run("smp-exits", cpus=4, append="500", record={})
    assert len(log) == 2000
    profile = load(path)
    for exits in (machine.exits, profile.exits):
        ports = set()
        for vcpu in range(4):
            (row,) = exits.vcpu(vcpu).pio("probe")
            assert (row.count, row.operations, row.direction, row.size) == (500, 500, "out", 1)
            ports.add(row.address)
        assert ports == {TEST_PORT + index for index in range(4)}
        assert exits.merged().pio("probe").count == 2000
        assert exits.vcpu(1).pio("fw_cfg").count == 0
    traced = dict.fromkeys(range(4), 0)
    for chunk in profile.trace():
        traced[chunk.vcpu] += sum(profile.trace_rows[row].device == "probe" for row in chunk.row.tolist())
        assert (chunk.at_ns[1:] >= chunk.at_ns[:-1]).all()
    assert traced == dict.fromkeys(range(4), 500)


def test_a_guest_that_touches_every_port_loses_no_count(run):
    # mov dx,0x1000; l: in al,dx; inc dx; cmp dx,0x5000; jb l; out 0xf4: 16384 ports where nobody is
    walk = code("66ba0010 ec 6642 6681fa0050 72f6 b000 e6f4 f4")
    machine, path, _, _ = run(walk, record={"every": 0})
    for exits in (machine.exits, load(path).exits):
        reads = exits.pio(direction="in")
        assert reads.count == 0x4000
        assert len(reads) < 1024
        (elsewhere,) = [row for row in reads if row.address is None]
        assert elsewhere.name == "io elsewhere in"
        assert elsewhere.count == 0x4000 - (len(reads) - 1)


def test_a_running_machine_and_a_closed_one_can_be_asked(machine_of):
    machine = machine_of(bytes.fromhex("baf803 b06f ee ebfe".replace(" ", "")))
    for ask in (lambda: machine.exits, machine.profile, lambda: machine.mark("early")):
        with pytest.raises(ConfigError, match="not been started"):
            ask()
    machine.start()
    deadline = time.monotonic() + TIMEOUT
    while not machine.exits.pio("uart0").count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert machine.exits.pio("uart0", "THR").count == 1
    machine.kill()
    wall_ns = machine.profile().wall_ns
    machine.close()
    assert machine.exits.pio("uart0", "THR").count == 1
    time.sleep(0.02)
    assert machine.profile().wall_ns == wall_ns


# --- times ------------------------------------------------------------------------------------------------------------


def test_a_handler_that_sleeps_is_seen_to(run):
    seconds, times = 0.02, 6
    least = seconds * 1e9 * 0.999  # two clocks, and one of them is measured by the other
    for _attempt in range(10):
        machine, path, log, _ = run(loop_of(times), seconds=seconds, record={})
        assert len(log) == times
        both = machine.exits, load(path).exits
        for exits in both:
            latency = exits.pio("probe").latency
            assert latency.count == times
            assert latency.total >= times * least
            assert latency.max >= least
            assert latency.percentile(1) >= least * 15 / 16
        if all(exits.pio("debug-exit").latency.total < exits.pio("probe").latency.total for exits in both):
            return  # else the host has let that one wait
    raise AssertionError("the time is another handler's")


def test_guest_time_and_handler_time_are_the_vcpus_time(run):
    """Between two moments that a handler sees lies nothing but guest and handler time, and none is counted twice."""
    moments = []

    class Stopwatch(Probe):
        def write(self, offset, size, value):
            moments.append(tick())
            time.sleep(0.005)

    def prepare(machine):
        machine.bus_pio.claim(0x6000, 1, Stopwatch(), "stopwatch")
        moments.append(tick())

    # mov edx,0x6000; mov ecx,8; l: out dx,al; mov ebx,20000; m: dec ebx; jnz m; loop l; out 0xf4
    busy = code("ba00600000 b908000000 ee bb204e0000 4b 75fd e2f5 b000 e6f4 f4")
    machine, _, _, _ = run(busy, prepare=prepare)
    ended = tick()
    exits = machine.exits
    assert exits.pio("stopwatch").count == 8
    counted = sum(row.guest.total_ticks + row.handler.total_ticks for row in exits)
    assert moments[-1] - moments[1] <= counted <= ended - moments[0]
    assert exits.pio("stopwatch").guest.count == 8


def test_the_wait_of_a_processor_for_its_start_is_its_guest_time(run):
    def prepare(machine):
        moments.append(machine.profile_trouble)

    moments = []
    machine, _, _, _ = run("smp-exits", cpus=2, append="1", seconds=0.1, prepare=prepare)
    (row,) = machine.exits.vcpu(1).pio("probe")
    assert row.guest.count == 1
    times = machine.profile().vcpus[1]
    assert times.guest_ns + times.handler_ns <= machine.profile().wall_ns
    assert times.handler_ns >= 0.0999e9


# --- places -----------------------------------------------------------------------------------------------------------

PLACES = (  # at 0x100000: each instruction, its offset, what it is, and whether RIP already points behind it
    ("ba58560000", None),  # mov edx, TEST_PORT
    ("ee", ("io", "out", SOFTWARE)),  # out dx, al
    ("ec", ("io", "in", False)),  # in al, dx
    ("bb000000d0", None),  # mov ebx, TEST_MMIO
    ("8803", ("mmio", "out", True)),  # mov [ebx], al
    ("8a03", ("mmio", "in", False)),  # mov al, [ebx]
    ("be00001000", None),  # mov esi, 0x100000
    ("6642", None),  # inc dx: another port
    ("b903000000", None),  # mov ecx, 3
    ("f36e", ("io", "string", False)),  # rep outsb
    ("b000", None),
    ("e6f4", None),
    ("f4", None),
)


def test_places_are_at_the_instruction_or_right_behind_it(run):
    """Which of both it is depends on KVM, as `Machine.record` says: behind writes that it has done itself by then."""
    expected, at = {}, 0x100000
    for text, what in PLACES:
        length = len(text) // 2
        if what is not None:
            reason, direction, behind = what
            expected[reason, direction] = f"{at + length if behind else at:#x}"
        at += length
    _, path, _, _ = run(code(" ".join(text for text, _ in PLACES)), record={})
    exits = load(path).exits
    for (reason, direction), place in expected.items():
        if direction == "string":
            some = exits.pio(TEST_PORT + 1, direction="out")
        else:
            some = exits.where(lambda r, of=(reason, direction): (r.reason, r.direction) == of).device(
                "probe" if reason == "io" else "page"
            )
            some = some.where(lambda r: r.address in {TEST_PORT, TEST_MMIO})
        assert set(some.symbols) == {place}, (reason, direction)


def functions_of(name):
    """Return (address, name) of the labels in a guest's code, ascending: what `nm` says of an ELF32 file."""
    data = kernels.ensure(name).read_bytes()
    table, each, count = (
        struct.unpack_from(layout, data, at)[0] for layout, at in (("<I", 32), ("<H", 46), ("<H", 48))
    )
    sections = [struct.unpack_from("<10I", data, table + each * index) for index in range(count)]
    labels = []
    for _, kind, _, _, at, size, link, _, _, _ in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for word, value, _, _, _, where in struct.iter_unpack("<IIIBBH", data[at : at + size]):
            if where < count and sections[where][2] & 4:  # SHF_EXECINSTR
                start = names + word
                labels.append((value, data[start : data.index(0, start)].decode()))
    return sorted(label for label in labels if label[1])


def places_of(path):
    """Return (port, RIP) of every exit in a file, read byte by byte: one vCPU, ports only."""
    ports, places = [], []
    with open(path, "rb") as file:
        assert file.read(8) == b"hvprof\r\n"
        while head := file.read(16):
            kind, _, size = struct.unpack("<4sIQ", head)
            data = file.read(size)
            if kind == b"ROWS":
                ports += [(address, reason) for address, _, reason, _, _ in struct.iter_unpack("<QIBBBx", data)]
            elif kind == b"TRAC":
                records = [(ports[row], rip) for _, rip, _, row, _ in struct.iter_unpack("<QQIHH", data)]
                places += [(port, rip) for (port, reason), rip in records if reason == 2]  # KVM_EXIT_IO
    return places


def test_sampled_places_lie_in_the_functions_that_do_it(run):
    _, path, _, _ = run("string-io", record={})
    labels = functions_of("string-io")
    found = {}
    for port, rip in places_of(path):
        inside = [label for address, label in labels if address <= rip][-1]
        found.setdefault(port, {}).setdefault(inside, 0)
        found[port][inside] += 1
    exits = load(path).exits
    assert {port: set(functions) for port, functions in found.items()} == {
        0x3F8: {"_start", "print"},
        0x510: {"_start"},
        0x511: {"_start"},
        TEST_PORT: {"_start"},
        0xF4: {"exit"},
    }
    for port, functions in found.items():
        assert exits.pio(port).symbols == functions
    assert sum(exits.pio().symbols.values()) == exits.pio().count


@pytest.mark.parametrize("every", [0, 1, 7, 1000])
def test_one_exit_in_so_many_is_sampled(run, every):
    machine, path, _, _ = run(loop_of(700), record={"every": every})
    profile = load(path)
    exits, sampled = 0, 0
    for chunk in profile.trace():
        exits += len(chunk.place)
        sampled += int((chunk.place >= 0).sum())
    assert exits == machine.exits.count == profile.exits.layer("user").count >= 701
    assert sampled == (-(-exits // every) if every else 0)
    assert sum(profile.exits.symbols.values()) == sampled


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [{}, {"every": 0}, {"trace": False}])
def test_the_file_says_what_the_machine_says(run, record):
    machine, path, _, _ = run("exits", record=record, prepare=lambda machine: machine.mark_by_port(0x80))
    profile = load(path)
    assert exact(profile.exits) == exact(machine.exits)
    theirs = {(row.key, row.vcpu): row for row in profile.exits}
    for row in machine.exits:
        same = theirs[row.key, row.vcpu]
        assert (same.handler, same.guest, same.register) == (row.handler, row.guest, row.register)
    assert not any("end in order" in note or "lacks" in note for note in profile.notes)
    assert any("names" in note for note in profile.notes) is (record == {})
    assert profile.has_trace is record.get("trace", True)
    assert profile.info["outcome"] == "GUEST_EXIT"
    assert profile.wall_ns == pytest.approx(machine.profile().wall_ns, rel=0.01)


def test_what_is_recorded_changes_nothing_that_the_guest_sees(run):
    def seen(record):
        machine, _, ports, page = run("exits", record=record)
        return ports, page, machine.debug_console.output, machine.console.output

    plain = seen(None)
    assert len(plain[0]) == 3 + 6 + 6 + 4 + 4
    assert seen({"every": 1}) == seen({"every": 3}) == seen({"trace": False}) == plain


def test_a_machine_is_recorded_once_and_before_it_starts(machine_of, tmp_path):
    machine = machine_of(bytes.fromhex("b000e6f4f4"))
    with pytest.raises(HostError, match="cannot write"):
        machine.record(str(tmp_path))
    for every in (-1, 1 << 32):
        with pytest.raises(ConfigError, match="every"):
            machine.record(str(tmp_path / "a"), every=every)
    machine.record(str(tmp_path / "a"))
    with pytest.raises(ConfigError):
        machine.record(str(tmp_path / "b"))
    machine.run(timeout=TIMEOUT)
    with pytest.raises(ConfigError):
        machine.record(str(tmp_path / "c"))
    assert machine.mark("after the end")
    assert load(str(tmp_path / "a")).marks == ()
    assert not (tmp_path / "b").exists()


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marks_by_port_divide_a_run(run):
    # mov edx,0x5658; then three times: mov al,N; out 0x80,al; mov ecx,10*N; l: out dx,al; loop l
    phases = "".join(f"b0{n:02x} e680 b9{(10 * n).to_bytes(4, 'little').hex()} ee e2fd" for n in (1, 2, 3))
    guest = code("ba58560000" + phases + "b004 e680 b000 e6f4 f4")
    machine, path, _, _ = run(guest, record={}, prepare=lambda machine: machine.mark_by_port(0x80))
    profile = load(path)
    assert [name for name, _ in profile.marks] == ["1", "2", "3", "4"]
    times = [at_ns for _, at_ns in profile.marks]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < profile.wall_ns
    for exits in (machine.exits, profile.exits):
        assert exits.marks == ("1", "2", "3", "4")
        for first, last, count in ((None, "1", 0), ("1", "2", 10), ("2", "3", 20), ("3", "4", 30), ("1", None, 60)):
            assert exits.between(first, last).pio("probe").count == count
        assert exits.between("1", "4").pio("marks", "MARK", "out").count == 3  # each writes, then is marked
        with pytest.raises(KeyError, match="there are: 1, 2, 3, 4"):
            exits.between("4", "1")


def test_marks_by_what_the_console_prints(run):
    text = b"Booting\nRun /init as init process\nlogin: "
    say = "".join(f"b0{byte:02x} ee" for byte in text)
    machine, path, _, _ = run(
        code("baf8030000" + say + "b000 e6f4 f4"),
        record={},
        prepare=lambda machine: (machine.mark_by_text(r"Run (\S+)"), machine.mark_by_text("login: ")),
    )
    assert load(path).exits.marks == machine.exits.marks == ("/init", "login: ")


def test_a_guest_makes_only_so_many_marks(run):
    # mov ecx,5000; l: out 0x80,al; loop l
    machine, path, _, _ = run(
        code("b988130000 e680 e2fc b000 e6f4 f4"), record={}, prepare=lambda machine: machine.mark_by_port(0x80)
    )
    assert machine.exits.pio("marks").count == 5000
    assert len(machine.exits.marks) == len(load(path).marks) == 1024
