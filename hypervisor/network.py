"""Networks between machines of this process, with faults.

`MachineConfig(nets=[network.port("one")])` puts a machine on one; `with network.drop(0.2, src="one"): ...` lets it lose
frames; `network.partition(["one"], ["two", "three"])` parts it until `network.heal()`.
"""

from __future__ import annotations

from devices.backends.switch import Network

__all__ = ["Network"]
