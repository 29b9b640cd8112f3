"""Linux guests on a hardware KVM: here where the host has one, else inside the emulated host."""

import pytest

from hypervisor import Machine, MachineConfig
from hypervisor.host import Kind, quick_kind

PROMPT = r"/ # \Z|/ # (\x1b\[6n)?\Z"
QUIET = "console=ttyS0 quiet panic=-1 cryptomgr.notests"
BOOT_SECONDS = 300
COMMAND_SECONDS = 60


@pytest.fixture(autouse=True, scope="session")
def hardware_kvm_is_there():
    assert quick_kind() in {Kind.AMD_V, Kind.VT_X}, "no hardware KVM: run scripts/emulated-host -- pytest tests/linux"


class Shell:
    """The shell on a guest's console."""

    def __init__(self, machine):
        self.machine = machine
        machine.console.expect(PROMPT, timeout=BOOT_SECONDS)

    def run(self, command, timeout=COMMAND_SECONDS):
        """Type a command and return what it printed."""
        # the marks are written so that the echo of the command line does not match them
        self.machine.console.write(f"echo BE''GIN; {command}; echo EN''D\n")
        found = self.machine.console.expect(rb"(?s)BEGIN\r\n(.*?)END\r\n", timeout=timeout)
        return found[1].decode().replace("\r\n", "\n").strip()


@pytest.fixture
def boot():
    """Return a function that boots a kernel to its shell."""
    machines = []

    def start(kernel="debian", **settings):
        settings = {"append": QUIET, "decompress": "host"} | settings
        machine = Machine(MachineConfig(kernel, **settings))
        machines.append(machine)
        machine.start()
        return Shell(machine)

    yield start
    for machine in machines:
        machine.close()
