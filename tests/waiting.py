"""Waiting for what another thread, another process or a guest does."""

import time


def until(condition, seconds=120, what=lambda: ""):
    """Wait until `condition` gives something true, and return that; `what` tells of what there is instead."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited in vain: {what()}"
        time.sleep(0.01)
    return value
