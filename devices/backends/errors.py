"""What the user of a backend has to mend."""

from __future__ import annotations


class BackendError(Exception):
    """A file, interface or helper program cannot be used as asked.

    Attributes:
        hint: what to do about it; may be empty.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        """Say what is wrong."""
        super().__init__(message)
        self.hint = hint
