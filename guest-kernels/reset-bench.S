# summary: writes to a hundred pages from ring 3, again and again: what setting a machine back costs
# build: multiboot
#
# Ring 3 says by a write to TEST_PORT that a checkpoint may be taken, adds one to a byte in each of the pages, and says by
# a write of that byte to TEST_PORT + 1 that it has: the byte is 1 as long as the machine is set back to the checkpoint.
.include "multiboot.inc"
.include "tables.inc"
.include "long_mode.inc"
.include "ring3.inc"

.equ PAGES, 100
.equ FIRST_PAGE, 16 << 20
.equ STRIDE, 61 << 12           # they lie apart, over 24 MiB
.equ RFLAGS_IOPL3, 3 << 12     # beside the bitmap: see checksum.S

START
    call load_tables
    and byte ptr [io_bitmap + TEST_PORT / 8], 0xf0
    DESCRIBE_TSS
    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED | RFLAGS_IOPL3
    iretq

program:
    mov edx, TEST_PORT
    out dx, al
    mov ebx, FIRST_PAGE
    mov ecx, PAGES
1:  inc byte ptr [rbx]
    mov al, [rbx]
    add rbx, STRIDE
    dec ecx
    jnz 1b
    mov edx, TEST_PORT + 1
    out dx, al
    jmp program
