"""A PC's devices, carried along with a guest that uses them: into another machine, and back in the same one."""

import threading

import pytest
from carried import machine_of, put, take

pytestmark = pytest.mark.kvm

TIMEOUT = 120
ECHO = bytes.fromhex(
    "ba fc03 b0 0b ee"  # mov dx,0x3fc; mov al,0x0b; out dx,al         MCR: OUT2
    "ba fa03 b0 81 ee"  # mov dx,0x3fa; mov al,0x81; out dx,al         FCR: FIFOs
    "ba f803 b0 3e ee"  # mov dx,0x3f8; mov al,'>'; out dx,al          THR
    "ba fd03 ec a8 01 74 f8"  # next: mov dx,0x3fd; in al,dx; test al,1; jz next
    "ba f803 ec ee"  # mov dx,0x3f8; in al,dx; out dx,al               echo
    "eb f1"  # jmp next
)
TYPED = "".join(f"{count:02}" for count in range(60))
"""Far more than a FIFO takes."""


def on_loop(machine, function):
    """Do it on the loop's thread, so that nothing is typed at the guest meanwhile."""
    result, done = [], threading.Event()
    machine.loop.call_soon(lambda: (result.append(function()), done.set()))
    assert done.wait(TIMEOUT)
    return result[0]


@pytest.fixture
def echo():
    """Return an echo that stands still with a full receiver, input that waits, and what it was printing."""
    with machine_of({"kernel": ECHO, "flat": 16}) as machine:
        machine.start()
        machine.console.expect(">", timeout=TIMEOUT)
        machine.console.write("#")
        machine.console.expect("#", timeout=TIMEOUT)
        machine.pause()
        machine.console.write(TYPED)
        on_loop(machine, machine.console.deliver)
        assert machine.console.input_room < 1 << 16
        yield machine


def test_an_echo_goes_on_in_another_machine(echo):
    devices = on_loop(echo, echo._pc.state)
    assert len(devices["uart0"]["RBR"]) == 16
    assert devices["console"]["input"].decode() == TYPED[16:]
    taken = take(echo)
    with machine_of({"kernel": ECHO, "flat": 16}) as machine:
        machine._pc.load(devices)
        put(machine, *taken)
        machine.start()
        machine.console.expect(f"^{TYPED}$", timeout=TIMEOUT)
        machine.kill()


def test_an_echo_is_put_back_again_and_again(echo):
    devices, taken = on_loop(echo, echo._pc.state), take(echo)
    for count in range(5):
        echo.resume()
        echo.console.expect(f"^{TYPED}" if count else TYPED, timeout=TIMEOUT)
        echo.console.write("typed just before" * count)
        echo.pause()
        assert on_loop(echo, lambda: (echo._pc.load(devices), put(echo, *taken), echo._pc.state()))[2] == devices
    assert echo.console.output == b""
