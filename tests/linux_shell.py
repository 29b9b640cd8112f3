"""The shell on a Linux guest's console."""

from hypervisor.console import ConsoleTimeout

PROMPT = r"/ # \Z|/ # (\x1b\[6n)?\Z"
QUIET = "console=ttyS0 quiet panic=-1 cryptomgr.notests nohz=off"
"""QEMU's TCG forgets the interrupt shadow when it enters a nested guest, so an idle CPU's `sti; hlt` can lose a wake-up
in the emulated host; a tick that goes on then finds the work."""
BOOT_SECONDS = 300
COMMAND_SECONDS = 240


class Shell:
    """The shell on a guest's console."""

    def __init__(self, machine):
        self.machine = machine
        machine.console.expect(PROMPT, timeout=BOOT_SECONDS)

    def run(self, command, timeout=COMMAND_SECONDS):
        """Type a command and return what it printed."""
        # the marks are written so that the echo of the command line does not match them
        self.machine.console.write(f"echo BE''GIN; {command}; echo EN''D\n")
        try:
            found = self.machine.console.expect(rb"(?s)BEGIN\r\n(.*?)END\r\n", timeout=timeout)
        except ConsoleTimeout as error:
            if self.machine.outcome is not None:  # it ended: that explains more
                raise AssertionError(self.machine.wait()) from error
            where = [f"{vcpu.registers['rip']:#x}" for vcpu in self.machine.vcpus for _ in range(3)]
            raise AssertionError(f"the guest is stuck or slow; its vCPUs are at {', '.join(where)}") from error
        return found[1].decode().replace("\r\n", "\n").strip()
