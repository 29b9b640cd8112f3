"""Memory that is fetched when it is touched, between a thread that touches it and a source written here."""

import mmap
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from hypervisor.kvm._kvm import ffi, lib

from hypervisor.kvm.pager import PAGE, Pager, open_userfaultfd
from hypervisor.pageserver import RUN

PAGES = 4096


def test_nobody_waits_for_ever_for_memory_whose_last_page_has_come():
    """Whoever comes to pages that nobody has written, at the very moment that the pager ends."""
    for number in range(150):
        ram, own = mmap.mmap(-1, PAGES * PAGE), mmap.mmap(-1, PAGES * PAGE)
        base = int(ffi.cast("uintptr_t", ffi.from_buffer(ram)))
        here, there = socket.socketpair()
        pager = Pager(open_userfaultfd(), here, SimpleNamespace(base=base, size=PAGES * PAGE), seconds=None)
        pager.begin([(0, 1)], pytest.fail)
        assert pager.take_over()

        def touch_the_others(base=base, own=own):
            lib.hv_copy_base(ffi.from_buffer(own), ffi.cast("void *", base + PAGE), PAGES - 1)

        thread = threading.Thread(target=touch_the_others, daemon=True)
        thread.start()
        with there:
            time.sleep(number % 10 * 2e-4)
            there.sendall(RUN.pack(0, 1) + b"\1" * PAGE)
            thread.join(60)
            assert not thread.is_alive(), f"round {number}"
            pager.wait()
        assert ram[:PAGE] == b"\1" * PAGE
        assert own.find(b"\1") < 0
        pager.close()
