"""What a test gets, and who watches it, over a machine and an agent that are none."""

import threading
from types import SimpleNamespace

import pytest

from hypervisor import ConfigError, HostError, Outcome, Stop
from hypervisor.testing import watch as watch_module
from hypervisor.testing.failures import GuestEnded, GuestFailed
from hypervisor.testing.guest import GuestMachine
from hypervisor.testing.spec import GuestSpec


class FakeAgent:
    """Answers as it is told."""

    def __init__(self):
        self.received = 0
        self.calls = []
        self.aborted = []
        self.answer = lambda: "answer"
        self.lives = True
        self.asked = threading.Event()

    def run(self, command, **how):
        self.calls.append((command, how))
        return self.answer()

    def get(self, path):
        self.asked.set()
        if self.lives:
            self.received += 1
        return b""

    def abort(self, why):
        self.aborted.append(why)


@pytest.fixture
def clock(monkeypatch):
    """The watch's time."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(watch_module.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def machine():
    console = SimpleNamespace(listeners=[], panic=None, pump=lambda: None)

    def wait(timeout):
        return made.outcome

    made = SimpleNamespace(console=console, outcome=None, vcpus=[], wait=wait)
    return made


@pytest.fixture
def guest(machine):
    return GuestMachine(GuestSpec("tiny", hang_seconds=30), machine, FakeAgent())


def failing(error):
    def answer():
        raise error

    return answer


# --- asking -----------------------------------------------------------------------------------------------------------


def test_a_command_goes_to_the_agent_with_a_limit_of_time(guest):
    assert guest.run("nproc", input="x", check=True) == "answer"
    assert guest.run("nproc", timeout=None) == "answer"
    assert guest.agent.calls == [
        ("nproc", {"timeout": 60.0, "input": "x", "check": True}),
        ("nproc", {"timeout": None}),
    ]


def test_what_the_agent_says_of_a_living_guest_is_passed_on(guest):
    guest.agent.answer = failing(HostError("status 1"))
    with pytest.raises(HostError, match="status 1"):
        guest.run("false")


def test_a_guest_that_failed_is_blamed_and_not_the_line_to_it(guest, machine):
    def dies():
        machine.outcome = Outcome(Stop.TRIPLE_FAULT, message="triple fault at 0x1000")
        raise HostError("the line has ended")

    guest.agent.answer = dies
    with pytest.raises(GuestFailed, match="triple fault at 0x1000") as caught:
        guest.run("true")
    assert "the line has ended" in str(caught.value.__cause__)
    with pytest.raises(GuestFailed, match="triple fault at 0x1000"):  # whatever is asked of it later
        guest.get("/etc/passwd")


def test_a_guest_that_powered_off_has_ended_and_not_failed(guest, machine):
    def powers_off():
        machine.outcome = Outcome(Stop.POWER_OFF)
        raise HostError("the line has ended")

    guest.agent.answer = powers_off
    with pytest.raises(GuestEnded, match="the guest is over: the guest powered off"):
        guest.run("poweroff -f")
    assert guest.failure is None


def test_the_first_failure_counts_and_the_test_learns_of_it_before_the_agent_does(guest):
    told = []
    guest.on_failure = lambda _guest, failure: told.append((str(failure), list(guest.agent.aborted)))
    guest.fail(GuestFailed("oops", "first"))
    guest.fail(GuestFailed("hang", "second"))
    assert told == [("first", [])]
    assert guest.agent.aborted == ["first"]
    assert str(guest.failure) == "first"


def test_a_guest_without_an_agent_says_so(machine):
    guest = GuestMachine(GuestSpec("halt"), machine, None)
    with pytest.raises(ConfigError, match="no agent"):
        guest.run("true")


# --- no progress ------------------------------------------------------------------------------------------------------


def pass_time(guest, clock, seconds, step=0.5):
    for _ in range(int(seconds / step)):
        clock.seconds += step
        guest.look()
        if guest.agent.asked.wait(0.0 if guest.agent.lives else 0.001):
            guest.agent.asked.clear()
            guest.watch._beating.join()


def test_a_guest_whose_agent_does_not_answer_hangs(guest, clock):
    guest.agent.lives = False
    guest.begin(anew=True)
    pass_time(guest, clock, 29)
    assert guest.failure is None
    pass_time(guest, clock, 2)
    assert guest.failure.kind == "hang"
    assert "its agent does not answer" in str(guest.failure)


def test_a_guest_whose_agent_answers_is_idle(guest, clock):
    guest.begin(anew=True)
    for _ in range(200):
        clock.seconds += 0.9
        guest.look()
        if guest.watch._beating is not None:
            guest.watch._beating.join()
    assert guest.failure is None
    assert 10 < guest.agent.received < 25  # it is asked after ten seconds of silence, not more often


@pytest.mark.parametrize("sign", ["output", "traffic"])
def test_a_sign_of_life_begins_the_time_anew(guest, machine, clock, sign):
    guest.agent.lives = False
    guest.begin(anew=True)
    pass_time(guest, clock, 25)
    if sign == "output":
        machine.console.listeners[0](b"x")
    else:
        guest.agent.received += 1
    pass_time(guest, clock, 25)
    assert guest.failure is None
    pass_time(guest, clock, 10)
    assert guest.failure is not None


def test_time_in_which_nobody_looked_is_not_the_guests(guest, clock):
    """A debugger, or a host that was suspended."""
    guest.agent.lives = False
    guest.begin(anew=True)
    for _ in range(5):
        clock.seconds += 100
        guest.look()
        pass_time(guest, clock, 20)
    assert guest.failure is None
