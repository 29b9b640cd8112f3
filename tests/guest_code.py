"""Machine code that several guest tests use."""

EXIT_WITH = {code: bytes([0xB0, code, 0xE6, 0xF4, 0xF4]) for code in range(256)}
"""mov al, CODE; out 0xf4, al; hlt"""
