"""Devices that are saved in the middle of anything, and have to go on as if they had not been.

A bench is a device with what it is wired to:

* `device` and its interrupt line `irq`;
* `do(operation)` returns what the guest can tell of it, `seen()` all else that follows from the state;
* `forget()` drops what has been recorded;
* `meet(other)` lets it live in the same host time as another one;
* `spoil(chance)` leaves in alarm, short cuts and interrupt line what may be there before a load.

An operation is a tuple that an `operation(chance)` makes; both benches of a comparison do the same ones.
"""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

WRONG = (None, True, -1, 1 << 70, 1.5, "1", b"", b"\0", [], [None], {}, {"a": 1})


def walk(bench, chance, operation, most):
    for _ in range(chance.randrange(most)):
        bench.do(operation(chance))


def check_walk(make, operation, seed, *, most=60):
    """Walk a device, save it, load that into a new one and into one that was walked elsewhere; let all go on alike.

    Args:
        make: returns a bench; called with the time of its clock.
        operation: makes one operation.
        seed: of all that is random.
        most: operations before and after.
    """
    chance = random.Random(seed)
    for was_walked in (False, True):
        original = make(chance.randrange(1 << 50))
        copy = make(chance.randrange(1 << 50))
        walk(original, chance, operation, most)
        if was_walked:
            walk(copy, chance, operation, most)
        state = original.device.state()
        kept = deepcopy(state)
        original.forget()
        copy.forget()
        copy.meet(original)
        copy.spoil(chance)
        copy.device.load(state)
        copy.irq.history.clear()
        assert copy.device.state() == state
        assert copy.seen() == original.seen()
        for count in range(most):
            one = operation(chance)
            assert (count, one, copy.do(one)) == (count, one, original.do(one))
            assert (count, one, copy.seen()) == (count, one, original.seen())
        assert copy.device.state() == original.device.state()
        assert state == kept, "a state is a copy"


def check_refusals(bench, out_of_range, nothing=()):
    """Try what is no state; the device is as it was.

    Args:
        bench: of a device in any state.
        out_of_range: values that a field cannot have, by its name; further ones are those of another type.
        nothing: fields that may be None.
    """
    state = bench.device.state()
    seen = bench.seen()
    for field in state:
        for value in (*WRONG, *out_of_range.get(field, ())):
            if type(value) is type(state[field]) and value not in out_of_range.get(field, ()):
                continue  # may be right
            if value is None and field in nothing:
                continue
            with pytest.raises((KeyError, TypeError, ValueError)):
                bench.device.load(state | {field: value})
        with pytest.raises(KeyError):
            bench.device.load({name: value for name, value in state.items() if name != field})
    with pytest.raises(ValueError, match="more"):
        bench.device.load(state | {"more": 0})
    for value in (None, 0, [], b"", list(state)):
        with pytest.raises(TypeError):
            bench.device.load(value)
    assert bench.device.state() == state
    assert bench.seen() == seen


def check_mutations(make, operation, seed, *, most=60):
    """Change a state at random: what is taken all the same must not fail later, whatever the guest does."""
    chance = random.Random(seed)
    bench = make(chance.randrange(1 << 50))
    taken = 0
    for _ in range(20):
        walk(bench, chance, operation, most)
        state = bench.device.state()
        for field in chance.sample(sorted(state), chance.randrange(1, 4) if len(state) > 3 else 1):
            state[field] = mutated(state[field], chance)
        try:
            bench.device.load(state)
        except (KeyError, TypeError, ValueError):
            continue
        taken += 1
        walk(bench, chance, operation, most)
    return taken


def mutated(value, chance):
    """Return another value, most often of the same type."""
    if type(value) is int and chance.random() < 0.9:
        return chance.choice((value ^ 1 << chance.randrange(8), chance.getrandbits(chance.randrange(1, 80)), -value))
    if type(value) is bool and chance.random() < 0.9:
        return not value
    if type(value) is bytes and chance.random() < 0.9:
        return chance.randbytes(chance.choice((len(value), len(value), len(value) + 1)))
    if type(value) is list and chance.random() < 0.9:
        return [chance.randrange(0x102) for _ in range(chance.randrange(18))]
    return chance.choice((None, 0, True, b"", [], "", {}))
