"""What a loader hands to the machine, and the one place that decides what lies where in guest RAM."""

# Annotations are not postponed here: typing compiles each one of a NamedTuple that is, at every start.

from bisect import bisect_right, insort
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

from hypervisor import layout
from hypervisor.errors import ConfigError, ImageError

if TYPE_CHECKING:
    from hypervisor.boot.entry import EntryState

__all__ = ["PAGE", "BootPlan", "BootRequest", "Buffer", "Module", "Placement", "Segment", "encode", "page_up"]

PAGE: Final = 4096
TABLES_END: Final = layout.HIGH_MEMORY - PAGE
"""The last page below 1 MiB stays free: `ld -Ttext 0x100000` puts the ELF headers of a kernel there."""

Buffer = bytes | bytearray | memoryview


class Segment(NamedTuple):
    """A range of guest RAM and what its first bytes are.

    Attributes:
        gpa: guest-physical address of the first byte.
        data: what to copy there; a view of the file, not a copy.
        size: bytes that the range has in all, at least len(data); the rest is to be zero, as fresh RAM is.
        label: what it is, for messages.
    """

    gpa: int
    data: Buffer
    size: int
    label: str


class Module(NamedTuple):
    """One multiboot module.

    Attributes:
        name: its path, for messages.
        data: its bytes.
        string: what the guest gets with it (Multiboot 0.6.96, 3.3, the `string` of a module).
    """

    name: str
    data: memoryview
    string: bytes


class BootRequest(NamedTuple):
    """What the user asked to boot, checked and in one form for every loader.

    Attributes:
        name: the kernel's path, for messages.
        ram_bytes: RAM of the machine in all.
        command_line: encoded, without its terminator.
        initrd: the initial RAM disk, or None.
        initrd_name: its path, for messages.
        modules: multiboot modules, in order.
        protocol: "auto", "linux64" or "pvh".
        rsdp: guest-physical address of the ACPI RSDP, or None when there are no ACPI tables.
    """

    name: str
    ram_bytes: int
    command_line: bytes = b""
    initrd: memoryview | None = None
    initrd_name: str = "initrd"
    modules: tuple[Module, ...] = ()
    protocol: str = "auto"
    rsdp: int | None = None


class BootPlan(NamedTuple):
    """Everything that the machine must do to start a guest.

    Attributes:
        segments: what to put into RAM, by rising address; no two overlap and all lie in RAM.
        entry: the state that the first CPU starts in; None: a machine goes on, and nothing is booted.
        kind: what is booted and how, such as "bzImage 6.1.0-49-cloud-amd64, 64-bit entry".
        is_linux: whether it is certain that this is a Linux kernel (from its setup header or its ELF notes).
        release: the kernel release that a bzImage names, to look for its System.map; else None.
        symbols: an ELF file that may have a symbol table, or None.
    """

    segments: tuple[Segment, ...]
    entry: "EntryState | None"
    kind: str
    is_linux: bool
    release: str | None
    symbols: Buffer | None


def encode(text: str, what: str) -> bytes:
    """Return `text` as the bytes that it had on the command line (PEP 383).

    Raises:
        ConfigError: if it has a character that no text has, or a zero byte; `what` says in the message what it is.
    """
    try:
        encoded = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what} has a character that is no text") from error
    if b"\0" in encoded:
        raise ConfigError(f"{what} has a zero byte in it")
    return encoded


def page_up(value: int) -> int:
    """Round `value` up to a multiple of 4 KiB."""
    return (value + PAGE - 1) & -PAGE


def _span(start: int, end: int) -> str:
    return f"{start:#x}-{end:#x}"


class Placement:
    """Guest-physical ranges that are taken. Refuses what overlaps and what is not RAM.

    Only RAM below the hole at 3 GiB is given out: every entry state reaches it, and so do 32-bit guests.
    """

    def __init__(self, name: str, ram_bytes: int, later: int = 0) -> None:
        """Start with the areas that the machine fills itself.

        Args:
            name: the kernel's path, for messages.
            ram_bytes: RAM of the machine in all.
            later: bytes in whole pages that the initrd or modules will take on top, for the figure in "needs at least".
        """
        self._name = name
        self._later = later
        self._taken: list[tuple[int, int, str]] = []
        self._segments: list[Segment] = []
        self._top = layout.HIGH_MEMORY
        self.ram_end = min(ram_bytes, layout.RAM_LOW_END)
        self.reserve("the MP floating pointer", layout.EBDA, layout.EBDA_SIZE)
        legacy = layout.EBDA + layout.EBDA_SIZE
        self.reserve("the legacy video and ROM area", legacy, layout.ACPI_TABLES - legacy)
        self.reserve("the ACPI and MP tables", layout.ACPI_TABLES, TABLES_END - layout.ACPI_TABLES)

    @property
    def segments(self) -> tuple[Segment, ...]:
        """What was put so far, by rising address."""
        return tuple(sorted(self._segments, key=lambda segment: segment.gpa))

    def reserve(self, label: str, gpa: int, size: int) -> None:
        """Take a range without giving it bytes.

        Raises:
            ImageError: if it overlaps a range that is taken.
        """
        if not size:
            return
        end = gpa + size
        index = bisect_right(self._taken, (gpa, end, label))
        for start, stop, other in self._taken[max(index - 1, 0) : index + 1]:
            if gpa < stop and start < end:
                hint = "link the image above 1 MiB" if max(gpa, start) < layout.HIGH_MEMORY else None
                message = f"{label} ({_span(gpa, end)}) overlaps {other} ({_span(start, stop)})"
                raise ImageError(f"{self._name}: {message}", hint=hint)
        insort(self._taken, (gpa, end, label))
        self._top = max(self._top, end)

    def require(self, label: str, end: int) -> None:
        """Check that RAM reaches to `end`.

        Raises:
            ImageError: if no machine's RAM does, because the devices' hole comes first.
            ConfigError: if more RAM would help.
        """
        if end > layout.RAM_LOW_END:
            raise ImageError(
                f"{self._name}: {label} reaches {end:#x}; a kernel must lie below {layout.RAM_LOW_END:#x}",
                hint="link it lower; only RAM below 3 GiB is used for loading",
            )
        if end > self.ram_end:
            need = page_up(end) + self._later
            # What comes later may still find room below.
            self._too_small(need if need <= layout.RAM_LOW_END else page_up(end))

    def put(self, label: str, gpa: int, data: Buffer, size: int | None = None) -> None:
        """Take a range and give it bytes.

        Args:
            label: what it is, for messages.
            gpa: where it starts.
            data: its first bytes; may be changed until the machine copies them.
            size: bytes of the range, by default len(data).

        Raises:
            ImageError: if it overlaps, or lies where no machine has RAM.
            ConfigError: if this machine has too little RAM.
        """
        size = len(data) if size is None else size
        self.require(label, gpa + size)
        self.reserve(label, gpa, size)
        if size:
            self._segments.append(Segment(gpa, data, size, label))

    def put_high(self, label: str, data: Buffer, below: int) -> int:
        """Put `data` page-aligned as high as it fits in RAM above 1 MiB, under `below`; return its address.

        Raises:
            ImageError: if it does not fit under `below` whatever RAM there is.
            ConfigError: if it would fit with more RAM.
        """
        size = len(data)
        gpa = (min(below, self.ram_end) - size) & -PAGE
        for start, stop, _ in reversed(self._taken):
            if gpa < stop and start < gpa + size:
                gpa = (start - size) & -PAGE
        if gpa < layout.HIGH_MEMORY:
            need = page_up(self._top) + page_up(size)
            if need > min(below, layout.RAM_LOW_END):
                raise ImageError(
                    f"{self._name}: {label} has {size >> 20} MiB and does not fit beside the kernel "
                    f"below {min(below, layout.RAM_LOW_END):#x}",
                    hint="use a smaller one",
                )
            self._too_small(need)
        self.put(label, gpa, data)
        return gpa

    def put_next(self, label: str, data: Buffer) -> int:
        """Put `data`, which `later` counts, on the first page above everything that is taken; return its address.

        Raises:
            ImageError: if the hole at 3 GiB comes first.
            ConfigError: if more RAM would help.
        """
        gpa = page_up(self._top)
        self._later -= page_up(len(data))
        self.put(label, gpa, data)
        return gpa

    def _too_small(self, need: int) -> NoReturn:
        mib = -(-need // layout.MIB)
        raise ConfigError(
            f"{self._name}: needs at least {mib} MiB of RAM, this machine has {self.ram_end / layout.MIB:g} MiB",
            hint=f"--ram {mib} or more",
        )
