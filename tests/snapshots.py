"""Snapshots for tests: RAM with something in it, a state as KVM gives one, and the manifest's own words rewritten."""

import json
import os
import random

import xxhash

from hypervisor.memory import RamRange
from hypervisor.snapshot.store import Snapshot, Writer

CHUNK = 65536
PAGE = 4096
MANIFEST = "manifest.json"


def ram(chunks=4, pages=0, seed=1, dense=(1,)):
    """RAM of so many chunks of 64 KiB and pages of 4 KiB, random in the chunks of `dense` and zero elsewhere."""
    data = bytearray(chunks * CHUNK + pages * PAGE)
    for chunk in dense:
        part = random.Random(seed * 1000 + chunk).randbytes(min(CHUNK, len(data) - chunk * CHUNK))
        data[chunk * CHUNK : chunk * CHUNK + len(part)] = part
    return data


def kvm(vcpus=1, **changes):
    """What `hypervisor.kvm.state.to_plain` returns, of a vCPU with little in it."""
    one = {
        "mp_state": 0,
        "registers": {"rax": 1, "rip": 0x1000},
        "special": {"cr0": 0x11, "cs": [0, 0, 0xFFFF]},
        "xsave": bytes(4096),
        "xcrs": [[0, 1]],
        "debug": {"dr6": 0},
        "lapic": bytes(1024),
        "cpuid": [[0, 0, 0, 1, 0x68747541, 0x444D4163, 0x69746E65], [1, 0, 0, 0, 0, 1, 1]],
        "msrs": [[0x10, 5], [0xC0000080, 0x500]],
        "unreadable": [],
        "events": bytes(64),
        "nested": b"",
        "tsc_khz": 1000,
        "tsc_offset": None,
    } | changes
    clock = {"guest_ns": 1, "realtime_ns": 2, "host_tsc": 0}
    return {
        "vm": {"clock": clock, "chips": {"ioapic": bytes(216)}, "pit": bytes(112)},
        "vcpus": [{"index": index} | one for index in range(vcpus)],
    }


STATE = {"kvm": kvm(), "devices": {"uart0": {"ier": 1, "fifo": b"\x00\xff", "dlab": False, "peer": None}}}
MACHINE = {"kernel": "hello", "ram_mib": 1, "cpus": 1}


def save(path, memory=None, *, state=STATE, config=MACHINE, host=None, layers=None, changed=None, **keywords):
    """Save a snapshot of this RAM; returns its id."""
    memory = ram() if memory is None else memory
    with Writer(path, **keywords) as writer:
        writer.write_memory(memoryview(memory), [RamRange(0, len(memory), 0)], changed=changed)
        for name, content in (layers or {}).items():
            with open(writer.add_file(name), "wb") as file:
                file.write(content)
        return writer.commit(state, config=config, host=host)


def content(path, *, verify=True):
    """The RAM of a snapshot as its reader would map it."""
    with Snapshot.open(path) as snapshot:
        fd, offset, size = snapshot.map_memory(verify=verify)
        try:
            return os.pread(fd, size, offset)
        finally:
            os.close(fd)


def rewrite(path, change):
    """Change a manifest as somebody would who knows how its digest is made."""
    file = path / MANIFEST
    value = json.loads(file.read_bytes())
    del value["digest"]
    value = change(value) or value
    body = value if isinstance(value, bytes) else json.dumps(value, separators=(",", ":")).encode()[:-1]
    file.write_bytes(sealed(body))


def sealed(body):
    """A manifest's bytes up to the last brace, with a digest that fits."""
    return body + b',"digest":"%s"}\n' % xxhash.xxh3_128_hexdigest(body).encode()


def reindex(path, change):
    """Change the memory's index and what the manifest says of it."""
    file = path / "memory.index"
    data = bytearray(file.read_bytes())
    change(data)
    file.write_bytes(data)

    def fit(value):
        value["memory"]["index"] = xxhash.xxh3_128_hexdigest(bytes(data))

    rewrite(path, fit)
