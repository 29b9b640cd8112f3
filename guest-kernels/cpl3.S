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
.include "ring3.inc"

.equ BREAKPOINT, 3
.equ GENERAL_PROTECTION, 13

.equ SYS_CHECK_SUM, 1           # RAX: the sum
.equ SYS_EXIT, 2
.equ FORBIDDEN_THINGS, 4

.data
rounds: .quad 10000000
forbidden: .long 0              # how many forbidden things were stopped

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
    DESCRIBE_TSS

    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED    # IOPL stays 0, so that the bitmap decides
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
