"""What `hv top` shows, and what it makes of keys; the live program is in tests/guest/test_hv_top.py."""

import dataclasses

import pytest
from rich.cells import cell_len

from hypervisor.cli.columns import sparkline
from hypervisor.cli.keyboard import KeyReader
from hypervisor.cli.topscreen import EXITS, MACHINES, MachineState, View, draw, percent, rate, uptime
from hypervisor.profile.rates import ExitRate, MachineRates


def machine(name, *, per_s=0.0, vmm=0.0, halted=None, kernel="debian", **more):
    facts = {"pid": 7, "cpus": 2, "ram_mib": 256, "uptime_ns": 61 * 10**9, "interval_ns": 10**9, "exits": 1} | more
    guest = 100 - vmm - (halted or 0)
    rates = MachineRates(
        name=name,
        kernel=kernel,
        exits_per_s=per_s,
        vmm_percent=vmm,
        halted_percent=halted,
        guest_percent=guest,
        **facts,
    )
    return MachineState(rates=rates)


LSR = ExitRate("io", "uart0", "LSR", 0x3FD, "in", 1, 5000, 120.0, 1500.0, 9000.0, 80.0)
OPEN = ExitRate("mmio", None, None, 0xE0000040, "out", 4, 3, 1.0, 100.0, 100.0, 15.0)
HLT = ExitRate("hlt", None, None, None, None, None, 9, 0.0, None, None, 0.0)
LONG = ExitRate("io", "virtio-net12", "common.queue_notify_offset", 0xC000, "out", 2, 10**9, 2.0, 1e9, 1e9, 5.0)


def screen(view, states, width=80, height=24):
    return [line.plain.rstrip() for line in draw(view, states, width, height)]


def with_exits(*exits):
    state = machine("web")
    state.exits = list(exits)
    return {"web": state}


def test_most_exits_come_first_and_the_foot_says_so():
    states = {"a": machine("a", per_s=5), "b": machine("b", per_s=70_000), "c": machine("c", per_s=6)}
    lines = screen(View(), states)
    assert [line.split()[0] for line in lines[2:5]] == [">", "c", "a"]
    assert "3 machines   70011 exits/s" in lines[0]
    assert lines[-1].startswith(" s sort: exits/s ▼  r reverse  Enter exits  ? help  q quit")
    assert lines[-1].endswith("every 1 s")


def test_at_80_columns_a_machine_has_all_its_figures():
    state = machine("web", per_s=1234.4, vmm=12.34, halted=50.0, kernel="vmlinuz")
    lines = screen(View(), {"web": state})
    assert " ".join(lines[1].split()) == "MACHINE KERNEL PID UPTIME CPUS EXITS/S GUEST VMM HALT LAST MINUTE"
    assert " ".join(lines[2].split()) == "> web vmlinuz 7 1:01 2 1234 38% 12% 50%"


def test_what_sorts_texts_sorts_by_the_alphabet_and_backwards_when_reversed():
    states = {name: machine(name, per_s=per_s) for name, per_s in (("b", 9), ("c", 1), ("a", 5))}
    view = View()
    view.machines.sort = "name"
    assert [line[2] for line in screen(view, states)[2:5]] == ["a", "b", "c"]
    view.machines.is_reversed = True
    assert [line[2] for line in screen(view, states)[2:5]] == ["c", "b", "a"]
    assert "name ▼" in screen(view, states)[-1]


@pytest.mark.parametrize("column", [column.name for column in MACHINES if column.sort_name])
def test_every_column_of_machines_sorts_with_what_is_not_known_last(column):
    states = {"new": MachineState(), "a": machine("a"), "b": machine("b", halted=1.0)}
    view = View()
    view.machines.sort = column
    for view.machines.is_reversed in (False, True):
        lines = screen(view, states)
        assert len([line for line in lines[2:5] if line]) == 3
        if column == "halted":
            assert " b " in lines[2]
        elif column != "name":
            assert "new" in lines[4]


@pytest.mark.parametrize("column", [column.name for column in EXITS if column.sort_name])
def test_every_column_of_exits_sorts(column):
    view = View(machine="web")
    view.exits.sort = column
    for view.exits.is_reversed in (False, True):
        assert len([line for line in screen(view, with_exits(LSR, OPEN, HLT))[3:] if line]) == 4


def test_exits_are_told_by_reason_device_register_and_direction():
    lines = screen(View(machine="web"), with_exits(LSR, OPEN, HLT))
    assert " ".join(lines[2].split()) == "REASON DEVICE REGISTER DIR EXITS/S P50 P99 % VMM TOTAL MINUTE"
    assert " ".join(lines[3].split()) == "> io uart0 LSR in 1 120 1.50 us 9.00 us 80% 5000"
    assert " ".join(lines[4].split()) == "mmio 0xe0000040 out 4 1 100 ns 100 ns 15% 3"
    assert " ".join(lines[5].split()) == "hlt 0 - - 0% 9"


def test_a_machine_that_ended_keeps_its_last_figures_and_says_so():
    states = with_exits(LSR)
    states["web"].trouble = "has ended"
    lines = screen(View(machine="web"), states)
    assert lines[0].endswith("has ended")
    assert "uart0" in lines[3]
    assert screen(View(machine="gone"), {})[0].endswith("has ended")


def test_a_machine_without_exits_and_one_that_has_not_said_yet():
    assert "No exit yet." in screen(View(machine="web"), with_exits())[3]
    assert "..." in screen(View(machine="web"), {"web": machine("web")})[3]


def test_without_machines_it_says_how_to_start_one():
    lines = screen(View(), {})
    assert any("No machine runs" in line for line in lines)
    assert any("hv run KERNEL" in line for line in lines)


def test_the_selected_row_is_always_on_the_screen():
    states = {f"m{number:03}": machine(f"m{number:03}", per_s=1000 - number) for number in range(100)}
    view = View()
    for selected in ("m000", "m050", "m099"):
        view.machines.selected = selected
        lines = screen(view, states)
        assert len(lines) == 24
        assert [line.split()[1] for line in lines if line.startswith(">")] == [selected]


def test_help_fits_80_by_24_and_says_what_every_column_means():
    lines = screen(View(shows_help=True), {})
    for word in ("EXITS/S", "VMM", "HALT", "GUEST", "P50, P99", "% VMM", "LAST MINUTE", "quit"):
        assert any(word in line for line in lines), word
    assert "any key" in lines[-1]


@pytest.mark.parametrize("view", [View(), View(machine="web"), View(shows_help=True), View(machine="gone")])
def test_every_size_is_filled_and_never_exceeded(view):
    name = "web"
    states = {name: machine(name, per_s=1e12, vmm=99.99, halted=0.0, pid=4194304, cpus=254, uptime_ns=10**18)}
    states[name].exits = [LSR, OPEN, HLT, LONG]
    states["an-extremely-long-name-of-a-machine-of-48-letters"] = machine("x", kernel="k" * 200)
    states["new"] = MachineState()
    for width in (1, 2, 3, 5, 10, 20, 39, 40, 60, 79, 80, 81, 100, 120, 200, 500):
        for height in (1, 2, 3, 4, 24, 40):
            lines = draw(view, states, width, height)
            assert len(lines) == height, (width, height)
            assert all(cell_len(line.plain) <= width for line in lines), (width, height)


@pytest.mark.parametrize(
    "hostile", ["\x1b[2J\x1b]0;x\x07", "a\nb", "\r", "\u202e", "漢字" * 30, "é\u0301", "\udcff", "[bold]x[/]"]
)
def test_names_are_shown_as_text_whatever_is_in_them(hostile):
    view = View(machine="web")
    one = dataclasses.replace(LSR, device=hostile, register=hostile, reason=hostile)
    state = machine("web", kernel=hostile)
    state.exits = [one]
    for view.machine in ("web", None):
        lines = draw(view, {"web": state}, 80, 24)
        text = "\n".join(line.plain for line in lines)
        assert text.count("\n") == 23
        assert all(char.isprintable() for char in text.replace("\n", ""))
        assert all(cell_len(line.plain) <= 80 for line in lines)
        text.encode()


def test_a_terminal_that_knows_no_blocks_gets_ascii():
    state = machine("web", vmm=30.0)
    state.history.add(0, 10, 5.0)
    state.exits = [LSR]
    view = View(ascii_only=True)
    for view.machine in (None, "web"):
        for line in draw(view, {"web": state}, 120, 24):
            line.plain.encode("ascii")


def test_a_sparkline_is_full_at_its_largest_and_blank_where_nothing_is_known():
    assert sparkline([None, 0.0, 1.0, 4.0, 7.0]) == " ▁▂▅█"
    assert sparkline([0.0, 0.0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1.0, 2.0], ascii_only=True) == "=#"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "-"), (0, "0%"), (0.01, "<.1%"), (0.06, "0.1%"), (9.94, "9.9%"), (9.96, "10%"), (99.6, "100%")],
)
def test_shares_take_four_cells(value, text):
    assert percent(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (67, "1:07"), (3600, "1:00:00"), (172_799, "47:59:59"), (172_800, "2d00h"), (10**8, "1157d09h")],
)
def test_uptimes(seconds, text):
    assert uptime(seconds * 10**9) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (0.04, "0"), (0.25, "0.20"), (12.34, "12.3"), (1234.5, "1234"), (1e7, "10.0M")]
)
def test_rates(value, text):
    assert rate(value) == text


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "keys"),
    [
        (b"sq", ["s", "q"]),
        (b"\x1b[A\x1bOB", ["up", "down"]),
        (b"\x1b[5~\x1b[6~\x1b[H\x1b[F", ["page up", "page down", "home", "end"]),
        (b"\r\n\x03\x04", ["enter", "enter", "interrupt", "end of file"]),
        (b"\x1bq", ["esc", "q"]),
        (b"\x1b\x1b[A", ["esc", "up"]),
        (b"\x1b[1;5A\x1b[<0;1;1Mq", ["q"]),
        (b"\x1b[" + b"1" * 100 + b"q", ["1"] * 86 + ["q"]),
        ("é".encode(), ["\ufffd", "\ufffd"]),
        (b"\x00\xff", ["\x00", "\ufffd"]),
    ],
)
def test_bytes_are_keys(data, keys):
    reader = KeyReader()
    assert reader.feed(data) == keys
    assert not reader.is_waiting


def test_a_sequence_may_come_byte_by_byte():
    reader = KeyReader()
    assert [reader.feed(bytes([byte])) for byte in b"\x1b[5~"] == [[], [], [], ["page up"]]


def test_an_escape_byte_alone_is_the_key_once_nothing_follows():
    reader = KeyReader()
    assert reader.feed(b"\x1b") == []
    assert reader.is_waiting
    assert reader.flush() == ["esc"]
    assert not reader.is_waiting
    assert reader.flush() == []
