"""Guests that reach each other over a network that the test can break."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypervisor import Network
    from hypervisor.testing.guest import GuestMachine

__all__ = ["GuestNetwork"]

PREFIX: Final = "10.77.0"


class GuestNetwork:
    """The fixture `guest_network`: a switch, and guests at its ports.

    What is not here is the switch's own: `drop`, `delay`, `duplicate`, `corrupt`, `reorder`, `partition`, `heal`,
    `counters`; see `hypervisor.Network`. A guest's port has the guest's name.

    Attributes:
        switch: the network itself.
        guests: the guests, by name.
    """

    def __init__(self, switch: Network, start: Callable[[str, dict[str, Any]], GuestMachine]) -> None:
        """Begin a test: without faults, and without frames that are under way."""
        self.switch = switch
        self.guests: dict[str, GuestMachine] = {}
        self._start = start
        switch.heal()
        switch.flush()

    def machine(self, name: str | None = None, **settings: Any) -> GuestMachine:
        """Return a guest that is ready, with an address on this network.

        Args:
            name: of the guest and its port; None takes "a", "b" and so on.
            settings: what the `guest` mark takes; they win over the test's marks.
        """
        __tracebackhide__ = True
        number = len(self.guests) + 1
        name = chr(ord("a") + number - 1) if name is None else name
        if name in self.guests:
            raise ValueError(f"there is a guest {name!r} on this network already")
        setup = settings.pop("setup", ())
        commands = [setup] if isinstance(setup, str) else list(setup)
        address = f"ip link set eth0 up && ip addr add {PREFIX}.{number}/24 dev eth0"
        nets = [self.switch.port(name), *settings.pop("nets", ())]
        guest = self._start(name, {**settings, "nets": nets, "setup": [address, *commands]})
        guest.address = f"{PREFIX}.{number}"
        self.guests[name] = guest
        return guest

    def __getattr__(self, name: str) -> Any:
        return getattr(self.switch, name)
