# summary: runs a program in ring 3: computing, port I/O by the TSS's permission bitmap, faults (number: N = 10000000)
# build: multiboot
#
# The kernel half sets up long mode, a TSS and its gates, and leaves to ring 3 by iretq. The program returns to the
# kernel by exceptions only: int3 is its system call, and what is forbidden to it comes back as a general protection
# fault. (A software KVM runs ring 3 on the bare CPU, where `int n` and `syscall` belong to the host.)
#
# Status 0 when all went as told here; 1 wrong sum, 2 something forbidden was allowed, 3 an unknown system call.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"

.equ BREAKPOINT, 3
.equ GENERAL_PROTECTION, 13

.equ SYS_CHECK_SUM, 1           # RAX: the sum
.equ SYS_EXIT, 2
.equ FORBIDDEN_THINGS, 4

.equ TSS_RSP0, 4                # the stack on which ring 0 is entered (Intel SDM volume 3, 8.7)
.equ TSS_IO_BITMAP_BASE, 0x66
.equ TSS_SIZE, 0x68
.equ IO_BITMAP_SIZE, (TEST_PORT + 4) / 8 + 1    # a bit a port, 1 forbids; ports beyond the end are forbidden too

.data
    .balign 16
tss:
    .long 0
    .long kernel_stack_top, 0   # RSP0
    .skip TSS_IO_BITMAP_BASE - 12
    .word TSS_SIZE
io_bitmap:
    .fill IO_BITMAP_SIZE, 1, 0xff
    .byte 0xff                  # the CPU may look one byte further than the last port's
tss_end:
.equ TSS_AVAILABLE, 0x89        # descriptor type: 64-bit TSS, present

rounds: .quad 10000000
forbidden: .long 0              # how many forbidden things were stopped

.bss
    .balign 16
    .skip 4096
kernel_stack_top:
    .skip 4096
user_stack_top:

START
    mov eax, [rounds]
    call next_number
    mov [rounds], eax

    call load_tables
    GATE64 BREAKPOINT, system_call, USER_GATE
    GATE64 GENERAL_PROTECTION, general_protection
    mov byte ptr [io_bitmap + COM1 / 8], 0                              # its eight ports make up one byte
    and byte ptr [io_bitmap + DEBUG_CONSOLE / 8], ~(1 << (DEBUG_CONSOLE % 8)) & 0xff
    and byte ptr [io_bitmap + TEST_PORT / 8], 0xf0                      # four ports
    mov eax, offset tss
    mov word ptr [gdt_tss], offset tss_end - tss - 1                    # limit
    mov word ptr [gdt_tss + 2], ax                                      # base, in three pieces
    shr eax, 16
    mov byte ptr [gdt_tss + 4], al
    mov byte ptr [gdt_tss + 5], TSS_AVAILABLE
    mov byte ptr [gdt_tss + 7], ah

    ENTER_LONG_MODE
    mov eax, TSS_SELECTOR
    ltr ax
    push USER_DATA              # what iretq takes off: SS, RSP, RFLAGS, CS, RIP
    mov eax, offset user_stack_top
    push rax
    push 0x2                    # RFLAGS: interrupts off, IOPL 0, so that the bitmap decides
    push USER_CODE64
    mov eax, offset program
    push rax
    iretq

# --- ring 3 ---------------------------------------------------------------------------------------------------------
program:
    xor eax, eax                # the sum of 1 to N
    mov rcx, [rip + rounds]
1:  add rax, rcx
    dec rcx
    jnz 1b
    mov edi, SYS_CHECK_SUM
    int3

    PRINT64 "hello from ring 3\n"
    MARK '3'
    mov dx, TEST_PORT
    in al, dx
    out dx, al
    mov ebx, TEST_MMIO
    mov rax, [rbx]
    mov [rbx + 8], rax

    lea rbx, [rip + 2f]         # where the fault handler lets us go on
    out PIC1_DATA, al           # a port that the bitmap forbids
2:  lea rbx, [rip + 3f]
    mov dx, TEST_PORT + 2
    in eax, dx                  # two ports allowed, two not
3:  lea rbx, [rip + 4f]
    cli                         # needs IOPL
4:  lea rbx, [rip + 5f]
    hlt                         # needs ring 0
5:  mov edi, SYS_EXIT
    int3
    jmp 5b

# --- ring 0 again -----------------------------------------------------------------------------------------------------
system_call:                    # int3 leaves RIP behind itself, so iretq goes on after it
    cmp edi, SYS_CHECK_SUM
    jne 1f
    mov rcx, [rip + rounds]     # N * (N + 1) / 2
    lea rdx, [rcx + 1]
    imul rcx, rdx
    shr rcx, 1
    cmp rcx, rax
    mov al, 1
    jne exit
    iretq
1:  cmp edi, SYS_EXIT
    mov al, 3
    jne exit
    cmp dword ptr [rip + forbidden], FORBIDDEN_THINGS
    mov al, 2
    jne exit
    PRINT64 "ring 3 is done\n"
    EXIT 0

general_protection:
    inc dword ptr [rip + forbidden]
    add rsp, 8                  # the error code
    mov [rsp], rbx
    iretq
