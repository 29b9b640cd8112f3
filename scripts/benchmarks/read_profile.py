"""Reads a profile as a report does: everything in it, once. Runs in a process of its own.

Arguments: the checkout's FOLDER, the profile's PATH, how many EXITS it has.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Load it, and pass over its exits."""
    folder, path, exits = sys.argv[1:]
    sys.path.insert(0, folder)
    from hypervisor.profile.file import load  # noqa: PLC0415 - found only now

    profile = load(path)
    profile.as_json()
    seen, busy = 0, 0.0
    for chunk in profile.trace():
        seen += len(chunk.row)
        busy += float(chunk.handler_ns.sum())
    if not seen == profile.exits.count == int(exits) or not busy:
        sys.exit(f"{path}: {profile.exits.count} exits were counted, {seen} are single")


if __name__ == "__main__":
    main()
