# summary: writes to memory at a steady pace in ring 3, then checks every page (numbers: slices, pages, ticks, MiB)
# build: multiboot
#
# Four numbers may be given: slices (1000; 0: until something is typed at the console), pages that are written in each
# (13), TSC ticks that one takes at least (1000000), MiB of memory from 64 MiB on that the pages lie in (384). A page's
# first word counts its writes, the second adds its own number each time. Status 0: all pages are as they were written;
# 1: one is not; 2: one write is missing.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"
.include "ring3.inc"

.equ BREAKPOINT, 3
.equ BASE, 64 << 20
.equ PAGES_OF_MIB, 256
.equ RFLAGS_IOPL3, 3 << 12     # beside the bitmap: see checksum.S
.equ LCG_FACTOR, 1664525
.equ LCG_TERM, 1013904223

.data
slices: .long 1000
pages: .long 13
ticks: .long 1000000
room: .long 384

START
    .irp number, slices, pages, ticks, room
    mov eax, [\number]
    call next_number
    mov [\number], eax
    .endr
    imul eax, eax, PAGES_OF_MIB
    mov [room], eax
    call load_tables
    GATE64 BREAKPOINT, system_call, USER_GATE
    DESCRIBE_TSS
    and byte ptr [io_bitmap + COM1_LSR / 8], ~(1 << (COM1_LSR % 8)) & 0xff
    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED | RFLAGS_IOPL3
    iretq

# --- ring 3 -----------------------------------------------------------------------------------------------------------
program:
    mov r15d, [rip + slices]
    xor r12d, r12d              # writes
    mov ebx, 1                  # random numbers
    call now
    mov r14, rax
1:  mov ecx, [rip + pages]
2:  imul ebx, ebx, LCG_FACTOR
    add ebx, LCG_TERM
    mov eax, ebx
    shr eax, 4
    xor edx, edx
    div dword ptr [rip + room]  # EDX: the page
    mov eax, edx
    shl rax, 12
    inc qword ptr [rax + BASE]
    add [rax + BASE + 8], rdx
    inc r12
    dec ecx
    jnz 2b
    mov eax, [rip + ticks]
    add r14, rax
3:  call now
    cmp rax, r14
    jb 3b
    mov r14, rax
    test r15d, r15d
    jz 4f
    dec r15d
    jnz 1b
    jmp 5f
4:  mov dx, COM1_LSR
    in al, dx
    test al, LSR_DATA_READY
    jz 1b

5:  xor edi, edi
    xor ecx, ecx                # a page
    xor r13d, r13d              # writes that are found
6:  mov rax, rcx
    shl rax, 12
    mov rdx, [rax + BASE]
    add r13, rdx
    imul rdx, rcx
    cmp rdx, [rax + BASE + 8]
    je 7f
    mov edi, 1
7:  inc ecx
    cmp ecx, [rip + room]
    jne 6b
    test edi, edi
    jnz 8f
    cmp r13, r12
    je 8f
    mov edi, 2
8:  int3
    jmp 8b

now:                            # RAX: the TSC. Changes RDX.
    rdtsc
    shl rdx, 32
    or rax, rdx
    ret

# --- ring 0 again: the status is in EDI ---------------------------------------------------------------------------------
system_call:
    mov eax, edi
    jmp exit
