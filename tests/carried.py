"""Guests that are stopped, carried into another machine and go on there. As a program: go on with one from a file.

Only the kernel's state and memory are carried, no device model: for guests that write to the serial port at most.
"""

import pickle
import random
import sys
import time
from pathlib import Path

from hypervisor import Machine, MachineConfig
from hypervisor.kvm import Kvm
from hypervisor.kvm.state import from_plain, load, save, to_plain

TIMEOUT = 120
"""Seconds: far more than any guest takes, in the emulated host too."""

with Kvm() as kvm:
    MSRS = kvm.msr_indices()


def machine_of(settings):
    return Machine(MachineConfig(**({"ram_mib": 4, "debug_exit": "raw"} | settings)))


def take(machine):
    """Return state and memory of a machine that stands still, as plain values."""
    return to_plain(save(machine._vm, MSRS)), machine.memory.read(0, machine.memory.size)


def put(machine, plain, ram, **how):
    """Set them in a machine that has not started."""
    machine.memory.write(0, ram)
    return load(machine._vm, from_plain(plain), **how)


def stop_at_random(machine, chance, longest):
    """Let a machine run for a random time; return whether its guest still has something to do."""
    time.sleep(chance.random() * longest)
    machine.pause()
    return machine.outcome is None and all(vcpu._parked for vcpu in machine.vcpus)


def carry(settings, *, seed, longest, most):
    """Run a guest, moved into a new machine at random moments at most `most` times; return status, output, moves."""
    chance = random.Random(seed)
    output, moves, taken = b"", 0, None
    while True:
        with machine_of(settings) as machine:
            if taken is not None:
                put(machine, *taken)
            machine.start()
            if moves >= most or not stop_at_random(machine, chance, longest):
                machine.resume()
                status = machine.wait(TIMEOUT).status
                taken = None
            else:
                taken = take(machine)
                moves += 1
        output += machine.console.output
        if taken is None:
            return status, output, moves


def main(path):
    settings, plain, ram = pickle.loads(Path(path).read_bytes())  # noqa: S301 - written by the test
    with machine_of(settings) as machine:
        put(machine, plain, ram)
        status = machine.run(TIMEOUT).status
    sys.stdout.buffer.write(machine.console.output)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
