"""Profiles that tests make: small, known to the last exit."""

import random

from hypervisor.profile.exits import ExitRow, Exits, Mark
from hypervisor.profile.histogram import Histogram
from hypervisor.profile.model import Profile, TraceChunk, VcpuTimes

NS_PER_TICK = 0.5
KINDS = (
    # reason, device, register, address, direction, size, symbols, exits of vCPU 0 and 1, typical handler ticks
    ("io", "uart0", "LSR", 0x3FD, "in", 1, ("serial8250_console_putchar", "wait_for_xmitr"), (400, 20), 3000),
    ("io", "uart0", "THR", 0x3F8, "out", 1, ("serial8250_console_putchar",), (390, 20), 5000),
    ("io", "pci", "CONFIG_DATA", 0xCFC, "in", 4, ("pci_conf1_read",), (120, 0), 40000),
    ("io", None, None, 0x2F9, "in", 1, ("autoconfig",), (3, 0), 1500),
    ("mmio", "virtio-blk0", "common.device_status", 0xE0000014, "out", 1, ("vp_modern_set_status",), (6, 2), 90000),
    ("hlt", None, None, None, None, None, ("native_safe_halt", "[user] sh & <co>"), (10, 10), 200),
)


def sample(*, seed=1, slower=1.0, trace=True, kernel_layer=True):
    """A run of two vCPUs, 10 ms long; `slower` scales its handler times."""
    rng = random.Random(seed)
    rows, trace_rows = [], []
    events = {0: [], 1: []}
    places = []
    for reason, device, register, address, direction, size, symbols, counts, ticks in KINDS:
        for vcpu, count in enumerate(counts):
            if not count:
                continue
            handler = [max(1, int(rng.lognormvariate(0, 0.4) * ticks * slower)) for _ in range(count)]
            guest = [rng.randrange(500, 5000) for _ in range(count)]
            sampled = {}
            for time in handler:
                name = rng.choice(symbols)
                sampled[name] = sampled.get(name, 0) + 1
                if name not in places:
                    places.append(name)
                events[vcpu].append((rng.uniform(0, 9.9e6), time * NS_PER_TICK, len(rows), places.index(name)))
            rows.append(
                ExitRow(
                    *("user", reason, device, register, address, direction, size, vcpu, count, count),
                    Histogram.of(handler, ns_per_tick=NS_PER_TICK),
                    Histogram.of(guest, ns_per_tick=NS_PER_TICK),
                    sampled,
                )
            )
    trace_rows = list(rows)
    if kernel_layer:
        time = Histogram.of([2000] * 700, ns_per_tick=1.0)
        rows.append(ExitRow("kernel", "npf", None, None, None, None, None, None, 700, 700, time, Histogram(), {}))

    def chunks():
        import numpy as np  # noqa: PLC0415 - only tests of reports need it

        for vcpu, happened in events.items():
            table = np.array(sorted(happened)).reshape(-1, 4)
            yield TraceChunk(vcpu, table[:, 0], table[:, 1], table[:, 2].astype("i8"), table[:, 3].astype("i8"))

    marks = [("kernel", 2_000_000), ("init </script>", 7_000_000)]
    return Profile(
        info={
            "kernel": "debian <6.1>",
            "cpus": 2,
            "ram_mib": 256,
            "hv": "0.1.0",
            "created": "2026-01-01T00:00:00+00:00",
        },
        wall_ns=10_000_000,
        vcpus=[VcpuTimes(0, 929, 6_000_000, 1_000_000, 3_000_000), VcpuTimes(1, 52, 1_000_000, None, 200_000)],
        exits=Exits(rows, marks=[Mark(name, at, lambda: ()) for name, at in marks]),
        kvm={"vm": {"remote_tlb_flush": 7}, "vcpu0": {"exits": 2000, "io_exits": 913, "halt_wait_ns": 1_000_000}},
        marks=marks,
        notes=["in-kernel exits are not joined in: tracefs is not there"],
        trace=chunks if trace else None,
        trace_rows=trace_rows,
        places=places,
    )
