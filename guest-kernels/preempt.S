# summary: two threads in ring 3 that never yield, switched by a timer (number: N switches = 20)
# build: multiboot
#
# A scheduler in its smallest form. The timer's interrupt enters ring 0 on the kernel stack of the thread that ran; its
# registers are pushed there, the other thread's popped from its own. Status 0 when both have made progress, 1 if not.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "legacy_irq.inc"
.include "apic.inc"
.include "long_mode.inc"
.include "ring3.inc"

.equ TIMER_VECTOR, 0x30
.equ PERIODIC, 1 << 17
.equ DIVIDE_BY_1, 0xb

.data
switches: .long 20              # to go
    .balign 8
counters: .quad 0, 0            # how far each thread has come
frames: .quad 0, 0              # where the registers of each sleeping thread lie on its kernel stack
stack_tops: .quad 0, 0
running: .quad 0

.bss
    .balign 16
    .skip 4096
second_stack_top:

# All that a thread has besides what the CPU itself pushes.
.macro PUSH_REGISTERS
    .irp register, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
    push \register
    .endr
.endm

.macro POP_REGISTERS
    .irp register, r15, r14, r13, r12, r11, r10, r9, r8, rbp, rdi, rsi, rdx, rcx, rbx, rax
    pop \register
    .endr
.endm

START
    mov eax, [switches]
    call next_number
    mov [switches], eax

    call load_tables
    call start_pic              # masks whatever firmware may have left running
    call start_apic
    GATE64 TIMER_VECTOR, switch
    GATE64 SPURIOUS_VECTOR, spurious64
    mov dword ptr [APIC_TIMER_DIVIDE], DIVIDE_BY_1
    mov dword ptr [APIC_LVT_TIMER], PERIODIC | TIMER_VECTOR
    mov dword ptr [stack_tops], offset kernel_stack_top
    mov dword ptr [stack_tops + 8], offset second_stack_top
    DESCRIBE_TSS

    ENTER_LONG_MODE
    LOAD_TSS
    mov esp, offset second_stack_top            # the second thread sleeps before its first instruction
    PUSH_USER_FRAME second_thread, user_stack_top, RFLAGS_RESERVED | RFLAGS_IF
    PUSH_REGISTERS
    mov [rip + frames + 8], rsp
    mov ebx, APIC_TIMER_INITIAL
    mov dword ptr [rbx], 5000000                # 5 ms: under KVM the timer counts nanoseconds
    mov esp, offset kernel_stack_top            # the first one starts
    PUSH_USER_FRAME first_thread, user_stack_top, RFLAGS_RESERVED | RFLAGS_IF
    iretq

# --- ring 3; neither uses its stack -----------------------------------------------------------------------------------
first_thread:
    inc qword ptr [rip + counters]
    jmp first_thread

second_thread:
    inc qword ptr [rip + counters + 8]
    jmp second_thread

# --- ring 0 -----------------------------------------------------------------------------------------------------------
switch:
    PUSH_REGISTERS
    mov ebx, APIC_EOI
    mov dword ptr [rbx], 0
    dec dword ptr [rip + switches]
    jz finish
    mov edi, offset frames
    mov esi, offset stack_tops
    mov rax, [rip + running]
    mov [rdi + 8 * rax], rsp
    xor eax, 1                  # the other one
    mov [rip + running], rax
    mov rsp, [rdi + 8 * rax]
    mov rax, [rsi + 8 * rax]
    mov [rip + tss_rsp0], rax   # where the next interrupt is to find an empty stack
    POP_REGISTERS
    iretq

spurious64:
    iretq

finish:
    mov al, 1
    cmp qword ptr [rip + counters], 0
    je exit
    cmp qword ptr [rip + counters + 8], 0
    je exit
    PRINT64 "both threads ran\n"
    EXIT 0
