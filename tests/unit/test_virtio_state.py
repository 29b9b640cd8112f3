"""Virtio devices carried into others at random moments: driver and host see what they would have seen anyway."""

from copy import deepcopy
from struct import pack, unpack_from

import pytest
from virtio_worlds import WORLDS

STEPS = 60
SEEDS = range(25)
ELSEWHERE = 1000


def both(kind, seed, moment, *, change=lambda _state: None):
    """Return what is seen after a moment without and with a new device that goes on, and one that was elsewhere."""
    world = WORLDS[kind](seed).run(0, moment)
    frozen = world.freeze()
    expected = deepcopy(world.run(moment, STEPS).seen())
    change(frozen["state"])
    fresh = WORLDS[kind](seed)
    used = WORLDS[kind](seed).run(ELSEWHERE, ELSEWHERE + seed)
    return expected, [other.thaw(frozen).run(moment, STEPS).seen() for other in (fresh, used)]


def leaves(state, path=()):
    """Return the path of every value in a state; of lists of states the first and the last."""
    found = []
    entries = state.items() if isinstance(state, dict) else enumerate(state)
    for key, value in entries:
        found.append((*path, key))
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            found += leaves(value, (*path, key))
    return found


def at(state, path):
    for key in path[:-1]:
        state = state[key]
    return state, path[-1]


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_device_goes_on_where_it_was(kind, seed):
    for moment in (1, 7 + seed % 5, 25 + seed):
        expected, seen = both(kind, seed, moment)
        for other in seen:
            assert other == expected


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_state_of_a_loaded_device_is_what_was_loaded(kind, seed):
    frozen = WORLDS[kind](seed).run(0, 20 + seed).freeze()
    state = deepcopy(frozen["state"])
    other = WORLDS[kind](seed).run(ELSEWHERE, ELSEWHERE + seed)
    other.driver.runner.stop()
    other.ram.write(0, frozen["ram"][0])
    other.driver.transport.load(frozen["state"])
    assert other.driver.transport.state() == state
    assert frozen["state"] == state


def check_plain(value):
    if isinstance(value, dict):
        assert all(type(key) is str for key in value)
        value = list(value.values())
    if type(value) is list:
        for item in value:
            check_plain(item)
    else:
        assert type(value) in (int, bool, bytes, str, type(None))


@pytest.mark.parametrize("kind", WORLDS)
def test_a_state_is_plain_and_a_copy(kind):
    world = WORLDS[kind](3).run(0, 30)
    state = world.freeze()["state"]
    check_plain(state)
    before = deepcopy(state)
    world.run(30, 60)
    assert state == before


UNSEEN = {"is_broken", "host_open"}
"""Fields that no step looks at by themselves: `needs_reset` says the same as one; the other has a test below."""
UNCHANGING = {"Disk": {"config_generation", "config_is_new"}, "Entropy": {"config_generation", "config_is_new"}}


def fields(state):
    """Return the names of the values in a state that a device could forget."""
    names = {path[-1] for path in leaves(state) if isinstance(path[-1], str) and path[-2:-1] != ("statistics",)}
    return names - UNSEEN - {"device", "queues"}


def is_missed(kind, seed, moment, path, value):
    """Whether anybody notices that a device has `value` there instead of what was saved."""

    def forget(state):
        holder, key = at(state, path)
        holder[key] = value

    try:
        expected, seen = both(kind, seed, moment, change=forget)
    except (ValueError, AssertionError, KeyError, IndexError):
        return True
    return any(other != expected for other in seen)


@pytest.mark.parametrize("kind", WORLDS)
def test_every_field_matters(kind):
    """Each one, had it been forgotten, is missed by somebody: what another device has is not what this one had."""
    unproved = fields(WORLDS[kind](0).run(0, 30).freeze()["state"]) - UNCHANGING.get(kind, set())
    for seed in range(120):
        moment = 10 + seed % 45
        fresh = WORLDS[kind](seed).freeze()["state"]
        mine = WORLDS[kind](seed).run(0, moment).freeze()["state"]
        for path in leaves(mine):
            holder, key = at(mine, path)
            other, _ = at(fresh, path)
            if key in unproved and key in other and holder[key] != other[key]:
                unproved -= {key} if is_missed(kind, seed, moment, path, other[key]) else set()
        if not unproved:
            return
    assert unproved == set()


# --- what is no state -------------------------------------------------------------------------------------------------

WRONG = [None, "text", 1.5, -1, 1 << 70, [], {}, b"x" * 9, True, [None] * 3]


@pytest.mark.parametrize("kind", WORLDS)
def test_what_is_no_state_is_refused(kind):
    for seed in (1, 2, 3):
        frozen = WORLDS[kind](seed).run(0, 40).freeze()
        for path in leaves(frozen["state"]):
            for value in [*([] if path[-2:-1] == ("statistics",) else [KeyError]), *WRONG]:
                state = deepcopy(frozen["state"])
                holder, key = at(state, path)
                if value is KeyError:
                    del holder[key]
                elif (type(value) is type(holder[key]) and value not in (-1, 1 << 70)) or (key, value) == (
                    "held",
                    None,
                ):
                    continue
                else:
                    holder[key] = value
                world = WORLDS[kind](seed)
                world.ram.write(0, frozen["ram"][0])
                with pytest.raises((KeyError, TypeError, ValueError)):
                    world.driver.transport.load(state)
                world.driver.runner.start()
                for index in range(len(world.device.queues)):
                    world.device.serve(index)


def active(kind, seed=1):
    for moment in range(10, 60):
        world = WORLDS[kind](seed).run(0, moment)
        if world.device.is_active:
            return world.freeze()
    raise AssertionError("never active")


@pytest.mark.parametrize(
    "change",
    [
        {"descriptors": 1 << 30},
        {"descriptors": (1 << 20) - 16},
        {"descriptors": 8},
        {"available": (1 << 64) - 2},
        {"available": 3},
        {"used": 1 << 31},
        {"used": 2},
        {"size": 0},
        {"size": 3},
        {"size": 1 << 16},
        {"size": 1 << 14},
        {"next_used": 1 << 16},
        {"next_available": -1},
        {"next_available": 40000, "next_used": 0},
        {"features": 1 << 64},
    ],
    ids=str,
)
def test_no_queue_can_be_like_that(change):
    frozen = active("Disk")
    frozen["state"]["device"]["queues"][0].update(change)
    other, used = WORLDS["Disk"](1), WORLDS["Disk"](1)
    used.driver.start()
    for world in (other, used):
        world.ram.write(0, frozen["ram"][0])
        with pytest.raises(ValueError, match=r".+"):
            world.driver.transport.load(frozen["state"])
        assert not world.device.is_active


@pytest.mark.parametrize(
    "change",
    [
        {"device_status": 3},
        {"device_status": 0x4F},
        {"needs_reset": True},
        {"driver_feature": 1 << 32 | 1},
        {"isr_status": 4},
        {"device": None},
    ],
    ids=str,
)
def test_no_transport_can_be_like_that(change):
    frozen = active("Disk")
    frozen["state"].update(change)
    other = WORLDS["Disk"](1)
    with pytest.raises((ValueError, TypeError)):
        other.driver.transport.load(frozen["state"])
    assert not other.device.is_active


@pytest.mark.parametrize("kind", WORLDS)
@pytest.mark.parametrize("path", [(), ("device",), ("device", "queues", 0)])
def test_what_nobody_knows_is_refused(kind, path):
    frozen = active(kind)
    holder = frozen["state"]
    for key in path:
        holder = holder[key]
    holder["surprise"] = None
    with pytest.raises(ValueError, match="surprise"):
        WORLDS[kind](1).driver.transport.load(frozen["state"])


def test_features_that_are_not_offered_are_refused():
    frozen = active("Disk")
    bad = frozen["state"]["device"]["features"] | 1 << 50
    frozen["state"]["device"]["features"] = frozen["state"]["driver_feature"] = bad
    with pytest.raises(ValueError, match="features"):
        WORLDS["Disk"](1).driver.transport.load(frozen["state"])


# --- the console's host -----------------------------------------------------------------------------------------------


def console():
    """A console that has introduced its second port, whose host is there."""
    world = WORLDS["Ports"](0)
    world.driver.wanted |= 3
    world.driver.size = 8
    world.driver.start()
    world.driver.send(3, pack("<IHH", 1, 3, 1), 0)
    for _ in range(4):
        world.driver.send(2, b"", 32)
    assert [control(world, *one)[:3] for one in world.driver.queues[2].collect()] == [(1, 7, 1), (1, 6, 1)]
    return world


def control(world, head, written):
    table = world.driver.queues[2].table + 16 * head
    return unpack_from("<IHH", world.ram.read(unpack_from("<Q", world.ram.read(table, 8))[0], written))


@pytest.mark.parametrize(("before", "after"), [(True, True), (True, False), (False, True), (False, False)])
def test_the_guest_is_told_that_the_host_is_not_where_it_was(before, after):
    """VIRTIO_CONSOLE_PORT_OPEN (5.3.6.2) to a restored guest that believes something else."""
    world = console()
    if not before:
        world.ends[1].mine["open"] = False
        world.ends[1].on_open()
        assert [control(world, *one) for one in world.driver.queues[2].collect()] == [(1, 6, 0)]
    frozen = world.freeze()
    frozen["host"]["ends"][1]["open"] = after
    other = WORLDS["Ports"](0)
    other.thaw(frozen)
    told = [control(other, *one) for one in other.driver.queues[2].collect()]
    assert told == ([] if before == after else [(1, 6, int(after))])
    assert other.freeze()["state"]["device"]["host_open"] == [-1, int(after), -1]


def test_a_port_that_was_not_introduced_is_told_nothing():
    frozen = console().freeze()
    frozen["host"]["ends"][2]["open"] = False
    other = WORLDS["Ports"](0)
    other.thaw(frozen)
    assert other.driver.queues[2].collect() == []
