"""BTF as Documentation/bpf/btf.rst describes it, written for tests."""

from __future__ import annotations

import struct

__all__ = ["BtfWriter"]

INT, PTR, ARRAY, STRUCT, UNION, ENUM, TYPEDEF, CONST, FUNC_PROTO, ENUM64 = 1, 2, 3, 4, 5, 6, 8, 10, 13, 19


class BtfWriter:
    """Type information that grows; each method returns the number of the type it adds."""

    def __init__(self) -> None:
        self.types = b""
        self.strings = b"\0"
        self.count = 0

    def _string(self, text: str) -> int:
        if not text:
            return 0
        at = len(self.strings)
        self.strings += text.encode() + b"\0"
        return at

    def add(  # noqa: PLR0917 - the fields of a type, in their order
        self, kind: int, name: str, last: int, extra: bytes = b"", count: int = 0, flag: int = 0
    ) -> int:
        self.types += struct.pack("<III", self._string(name), flag << 31 | kind << 24 | count, last) + extra
        self.count += 1
        return self.count

    def int(self, name: str, size: int) -> int:
        return self.add(INT, name, size, struct.pack("<I", 8 * size))

    def pointer(self, target: int) -> int:
        return self.add(PTR, "", target)

    def array(self, element: int, number: int) -> int:
        return self.add(ARRAY, "", 0, struct.pack("<III", element, 0, number))

    def structure(self, name: str, size: int, members: list[tuple[str, int, int]], kind: int = STRUCT) -> int:
        """Add a structure of (name, type, offset in bytes)."""
        extra = b"".join(struct.pack("<III", self._string(member), number, 8 * at) for member, number, at in members)
        return self.add(kind, name, size, extra, len(members))

    def data(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + self.types + self.strings
