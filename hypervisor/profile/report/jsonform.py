"""A profile as JSON: the stable form that programs read."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hypervisor.profile.model import Profile

__all__ = ["render"]


def render(profile: Profile) -> str:
    """Return `Profile.as_json`, in ASCII."""
    return json.dumps(profile.as_json(), indent=2) + "\n"
