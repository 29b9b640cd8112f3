"""Machine code that several guest tests use."""

EXIT_WITH = {code: bytes([0xB0, code, 0xE6, 0xF4, 0xF4]) for code in range(256)}
"""mov al, CODE; out 0xf4, al; hlt"""


def outs(count):
    """Real mode, count + 1 port accesses: mov cx,count; mov dx,0x80; l: out dx,al; loop l; mov al,0; out 0xf4,al."""
    return bytes.fromhex(f"b9{count.to_bytes(2, 'little').hex()}ba8000eee2fdb000e6f4f4")


def loads(count):
    """32 bits, count reads of no memory: mov ecx,count; l: mov eax,[0xd0000000]; loop l; mov al,0; out 0xf4,al."""
    return bytes.fromhex(f"b9{count.to_bytes(4, 'little').hex()}a1000000d0e2f9b000e6f4f4")
