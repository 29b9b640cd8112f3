# summary: a checksum over all that a CPU holds, under a timer: the same however often the machine is carried elsewhere
# build: multiboot
#
# Three numbers may be given: rounds (3000000), 1 for the TSC deadline instead of the periodic timer, and rounds of
# nothing while an interrupt is pending (30000).
#
# Ring 3 mixes general, SSE and x87 registers, memory and a port in rounds. Ring 0 then adds the debug registers, sleeps
# for five ticks of the timer, and leaves an interrupt pending for a while. The sum is printed in hexadecimal. Status 1:
# the pending interrupt came too soon, 2: it never came.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "legacy_irq.inc"
.include "apic.inc"
.include "long_mode.inc"
.include "ring3.inc"

.equ BREAKPOINT, 3
.equ TIMER_VECTOR, 0x30
.equ LATE_VECTOR, 0x31
.equ PERIODIC, 1 << 17
.equ TSC_DEADLINE, 2 << 17
.equ MSR_TSC_DEADLINE, 0x6e0
.equ DIVIDE_BY_1, 0xb
.equ PERIOD, 5000000            # 5 ms: under KVM the timer counts nanoseconds
.equ DEADLINE, 10000000         # ticks of the TSC
.equ CR4_OSFXSR, 1 << 9
.equ CR4_OSXMMEXCPT, 1 << 10
.equ ICR_SELF, 1 << 18          # destination shorthand
.equ RFLAGS_IOPL3, 3 << 12     # QEMU's SVM forgets the bitmap once KVM has set TR, busy as it must be
.equ SLEEP_TICKS, 5

.data
rounds: .long 3000000
by_deadline: .long 0
spins: .long 30000
ticks: .long 0
late: .long 0
    .balign 16
seeds: .quad 0x0123456789abcdef, 0xfedcba9876543210
factors: .double 0.75, 0.5
terms: .double 1.25, 3.5
half: .double 0.5
sum_text: .ascii "0123456789abcdef\n"
hex: .ascii "0123456789abcdef"

.bss
    .balign 16
buffer: .skip 4096
fpu_sum: .skip 16

START
    mov eax, [rounds]
    call next_number
    mov [rounds], eax
    xor eax, eax
    call next_number
    mov [by_deadline], eax
    mov eax, [spins]
    call next_number
    mov [spins], eax

    call load_tables
    call start_pic              # masks whatever firmware may have left running
    call start_apic
    GATE64 BREAKPOINT, system_call, USER_GATE
    GATE64 TIMER_VECTOR, tick
    GATE64 LATE_VECTOR, late_interrupt
    GATE64 SPURIOUS_VECTOR, spurious64
    and byte ptr [io_bitmap + TEST_PORT / 8], 0xf0
    DESCRIBE_TSS
    mov eax, cr4
    or eax, CR4_OSFXSR | CR4_OSXMMEXCPT
    mov cr4, eax

    ENTER_LONG_MODE
    LOAD_TSS
    mov eax, 0x1000
    mov dr0, rax
    mov eax, 0x2222
    mov dr1, rax
    mov eax, 0x3300
    mov dr2, rax
    mov eax, 0x44444444
    mov dr3, rax
    call start_timer
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED | RFLAGS_IF | RFLAGS_IOPL3
    iretq

# --- ring 3 -----------------------------------------------------------------------------------------------------------
program:
    finit
    movdqa xmm0, [rip + seeds]
    movdqa xmm1, xmm0
    movapd xmm2, [rip + terms]
    movapd xmm15, [rip + factors]
    fldpi
    fld1
    mov eax, 1
    .irp register, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r13, r14, r15
    lea \register, [rax + 2 * rax + 7]
    mov rax, \register
    .endr
    mov r12d, [rip + rounds]

1:  .irp register, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r13, r14, r15
    add rax, \register
    rol \register, 7
    xor \register, rax
    .endr
    paddq xmm0, xmm1
    pshufd xmm1, xmm0, 0x39
    movq xmm3, rax
    pxor xmm1, xmm3
    mulpd xmm2, xmm15           # converges, and so stays finite
    addpd xmm2, [rip + terms]
    fmul qword ptr [rip + half]
    fadd qword ptr [rip + terms + 8]
    fxch st(1)
    mov [rsp - 8], rax
    and eax, 4096 - 8
    mov [rsp - 16], rbx
    mov ebx, offset buffer
    add rbx, rax
    mov rax, [rsp - 8]
    xor [rbx], rax
    movq rax, xmm1
    add [rbx], rax
    mov rax, [rbx]
    mov rbx, [rsp - 16]
    test r12d, 0x3fff
    jnz 2f
    push rdx
    mov edx, TEST_PORT
    in al, dx
    out dx, al
    pop rdx
2:  dec r12d
    jnz 1b

    .irp register, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r13, r14, r15
    rol rax, 3
    add rax, \register
    .endr
    .irp register, xmm0, xmm1, xmm2
    movq rbx, \register
    add rax, rbx
    psrldq \register, 8
    movq rbx, \register
    rol rax, 5
    xor rax, rbx
    .endr
    fstp qword ptr [rip + fpu_sum]
    fstp qword ptr [rip + fpu_sum + 8]
    add rax, [rip + fpu_sum]
    xor rax, [rip + fpu_sum + 8]
    mov ebx, offset buffer
    mov ecx, 4096 / 8
3:  rol rax, 1
    add rax, [rbx]
    add rbx, 8
    dec ecx
    jnz 3b
    int3
    jmp 3b

# --- ring 0 again: the sum is in RAX ------------------------------------------------------------------------------------
system_call:
    .irp register, dr0, dr1, dr2, dr3, dr7
    mov rbx, \register
    rol rax, 9
    add rax, rbx
    .endr
    mov r8, rax

    mov ebx, [rip + ticks]
    add ebx, SLEEP_TICKS
1:  sti
    hlt
    cli
    cmp [rip + ticks], ebx
    jb 1b

    mov ebx, APIC_ICR_LOW
    mov dword ptr [rbx], ICR_SELF | ICR_FIXED | LATE_VECTOR
    mov ecx, [rip + spins]
2:  dec ecx
    jnz 2b
    mov al, 1
    cmp dword ptr [rip + late], 0
    jne exit
    sti
    mov ecx, 1000000            # a software KVM takes its time
4:  cmp dword ptr [rip + late], 1
    je 5f
    dec ecx
    jnz 4b
    mov al, 2
    jmp exit
5:  cli

    mov edi, offset sum_text
    mov esi, offset hex
    mov ecx, 16
3:  rol r8, 4
    mov eax, r8d
    and eax, 15
    mov al, [rsi + rax]
    mov [rdi], al
    inc rdi
    dec ecx
    jnz 3b
    mov esi, offset sum_text
    mov ecx, 17
    mov edx, COM1
    rep outsb
    EXIT 0

# start_timer: the periodic timer, or the first deadline. Changes RAX, RBX, RCX, RDX.
start_timer:
    mov ebx, APIC_TIMER_DIVIDE
    mov dword ptr [rbx], DIVIDE_BY_1
    mov ebx, APIC_LVT_TIMER
    cmp dword ptr [rip + by_deadline], 0
    jne 1f
    mov dword ptr [rbx], PERIODIC | TIMER_VECTOR
    mov ebx, APIC_TIMER_INITIAL
    mov dword ptr [rbx], PERIOD
    ret
1:  mov dword ptr [rbx], TSC_DEADLINE | TIMER_VECTOR
next_deadline:                  # Changes RAX, RCX, RDX.
    rdtsc
    add eax, DEADLINE
    adc edx, 0
    mov ecx, MSR_TSC_DEADLINE
    wrmsr
    ret

tick:
    push rax
    push rbx
    push rcx
    push rdx
    inc dword ptr [rip + ticks]
    mov ebx, APIC_EOI
    mov dword ptr [rbx], 0
    cmp dword ptr [rip + by_deadline], 0
    je 1f
    call next_deadline
1:  pop rdx
    pop rcx
    pop rbx
    pop rax
    iretq

late_interrupt:
    push rbx
    inc dword ptr [rip + late]
    mov ebx, APIC_EOI
    mov dword ptr [rbx], 0
    pop rbx
spurious64:
    iretq
