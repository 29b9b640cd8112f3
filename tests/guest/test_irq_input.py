"""An interrupt input and the interrupt controllers behind it, when a device's state and then theirs are loaded."""

import pytest
from hypervisor.kvm._kvm import lib

from hypervisor.kvm import Kvm
from hypervisor.kvm.ioctls import control
from hypervisor.kvm.state import CHIPS, _read_chip, chip_argument

pytestmark = pytest.mark.kvm

GSI = 4
LAST_IRR, IRR = 0, 1  # bytes of struct kvm_pic_state: the inputs' levels, and the edges that came


class Inputs:
    def __init__(self, vm):
        self.vm = vm
        self.line = vm.irq_input(GSI)

    def chips(self):
        return {name: _read_chip(self.vm, *chip) for name, chip in CHIPS.items()}

    def put(self, chips):
        for name, registers in chips.items():
            control(self.vm.fileno(), lib.KVM_SET_IRQCHIP, chip_argument(*CHIPS[name], registers))

    def load(self, level, chips):
        """Do what a restored machine does: the device drives its line, then the controllers are set."""
        self.line.forget()
        self.line.set(level)
        self.put(chips)
        assert self.chips() == chips

    def pic(self, field):
        return self.chips()["pic_master"][field] >> GSI & 1

    def ioapic(self):
        return int.from_bytes(self.chips()["ioapic"][16:20], "little") >> GSI & 1  # struct kvm_ioapic_state's irr


@pytest.fixture
def inputs():
    with Kvm() as kvm:
        vm = kvm.create_vm()
    vm.create_irqchip()
    yield Inputs(vm)
    vm.close()


@pytest.mark.parametrize("now", [False, True])
def test_a_line_that_was_high_can_be_lowered(inputs, now):
    inputs.line.set(True)
    high = inputs.chips()
    inputs.line.set(now)
    inputs.load(True, high)
    assert inputs.pic(LAST_IRR)
    inputs.line.set(False)
    assert not inputs.pic(LAST_IRR)
    assert not inputs.ioapic()


@pytest.mark.parametrize("now", [False, True])
def test_a_line_that_was_low_can_be_raised_and_nothing_came_before(inputs, now):
    low = inputs.chips()
    inputs.line.set(now)
    inputs.load(False, low)
    assert not inputs.pic(IRR)
    inputs.line.set(True)
    assert inputs.pic(IRR)
    assert inputs.pic(LAST_IRR)
    assert inputs.ioapic()


def test_an_interrupt_that_was_served_does_not_come_again(inputs):
    """The line is still high, and the PIC has forgotten the edge: as after the guest's acknowledgement."""
    inputs.line.set(True)
    served = inputs.chips()
    master = bytearray(served["pic_master"])
    master[IRR] &= ~(1 << GSI)
    inputs.load(True, served | {"pic_master": bytes(master)})
    assert not inputs.pic(IRR)
    inputs.line.set(False)
    inputs.line.set(True)
    assert inputs.pic(IRR), "the next edge does"


def test_only_a_forgotten_level_is_driven_again(inputs):
    inputs.line.set(True)
    other = inputs.vm.irq_input(GSI)
    other.forget()
    other.set(False)
    inputs.line.set(True)
    assert not inputs.pic(LAST_IRR), "its level is said to be high: nothing is to be done"
    inputs.line.forget()
    inputs.line.set(True)
    assert inputs.pic(LAST_IRR)
