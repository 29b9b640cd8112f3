"""A guest that is stopped in the middle of an access goes on behind it, in another VM and another process."""

import multiprocessing

import pytest
from bare_vm import bare, finish

from hypervisor.kvm.vcpu import EXIT, INTERRUPTED, MMIO_READ, MMIO_WRITE, PIO_IN, PIO_OUT

pytestmark = pytest.mark.kvm

# mov di,0x2000; mov cx,20; mov dx,0x5658; cld; rep insb; mov si,0x2000; mov cx,20; rep outsb; in al,dx; mov bl,al; hlt
STRINGS = bytes.fromhex("bf0020 b91400 ba5856 fc f36c be0020 b91400 f36e ec 88c3 f4")
# mov ax,0xa000; mov es,ax; mov eax,es:[8]; inc eax; mov es:[12],eax; mov es:[16],ecx; mov ecx,es:[32]; hlt
WORDS = bytes.fromhex("b800a0 8ec0 2666a10800 6640 2666a30c00 266689 0e1000 26668b0e2000 f4")
# mov ax,0xa000; mov ds,ax; xor si,si; mov es,cx; mov di,0x3000; mov cx,9; cld; rep movsw; hlt
COPY = bytes.fromhex("b800a0 8ed8 31f6 31c9 8ec1 bf0030 b90900 fc f3a5 f4")
# mov dx,0x5658; in al,dx; mov bl,al; in al,dx; add al,bl; out dx,al; inc ax; out dx,al; hlt
SINGLE = bytes.fromhex("ba5856 ec 88c3 ec 00d8 ee 40 ee f4")

PROGRAMS = {"strings": STRINGS, "words": WORDS, "copy": COPY, "single": SINGLE}


@pytest.mark.parametrize("name", PROGRAMS)
def test_stopped_before_every_access(name):
    """The access that is wanted, and what is left of its instruction, are finished where they began."""
    with bare(PROGRAMS[name]) as vm:
        undisturbed = vm.ends_with()
    count = len(undisturbed[0])
    assert count >= 4
    last = None
    for accesses in range(count):
        with bare(PROGRAMS[name]) as vm:
            wanted = vm.advance(accesses)
            assert wanted & 0xFF in (PIO_IN, PIO_OUT, MMIO_READ, MMIO_WRITE)
            assert not vm.vcpu.is_settled
            assert vm.vcpu.settle(wanted, vm.answer) == INTERRUPTED
            assert vm.vcpu.is_settled
            assert len(vm.log) > accesses
            last = vm.take()
        assert finish(last) == undisturbed, f"stopped at access {accesses}"
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        assert pool.apply(finish, (last,)) == undisturbed


def test_an_access_that_is_half_done_is_not_saved():
    with bare(SINGLE) as vm:
        vm.advance(0)
        with pytest.raises(ValueError, match="vCPU 0 is in the middle of an access"):
            vm.take()


def test_nothing_is_loaded_over_an_access_that_is_half_done():
    with bare(SINGLE) as vm:
        taken = vm.take()
        vm.advance(0)
        with pytest.raises(ValueError, match="vCPU 0 is in the middle of an access"):
            vm.put(*taken)


def test_settling_runs_no_instruction_of_the_guest():
    with bare(SINGLE) as vm:
        assert vm.vcpu.settle(0, vm.answer) == INTERRUPTED
        assert vm.vcpu.registers()["rip"] == 0
        wanted = vm.advance(0)
        assert vm.vcpu.registers()["rip"] == 3, "KVM leaves RIP at the access until it is completed"
        vm.vcpu.settle(wanted, vm.answer)
        assert vm.vcpu.registers()["rip"] == 4
        assert vm.log == [(PIO_IN, 1, 0)]


def test_after_the_last_exit_there_is_nothing_to_settle():
    with bare(b"\xf4") as vm:  # hlt
        assert vm.advance() & 0xFF == EXIT
        assert vm.vcpu.is_settled
        assert vm.vcpu.settle(0, vm.answer) == INTERRUPTED
        assert vm.vcpu.registers()["rip"] == 1
