# summary: measures a virtio disk from ring 3: COUNT requests of SIZE bytes, DEPTH at a time, random or in sequence
# build: multiboot
# append: 1000 1 4096 0 1 0
#
# The command line: COUNT DEPTH SIZE WRITE RANDOM HOLD; depth 1 to 32, size a multiple of 512 up to 1 MiB, the others 0 or
# 1. HOLD is what bench.inc says.
# The disk may be on virtio-mmio or PCI. All requests are made in ring 3, where a software KVM runs at full speed too. Used
# buffers are polled for and no interrupt is asked for; the device is kicked when its flags say so. When all went well:
#     requests N ticks T kicks K
# with T in TSC ticks. Status 0; 1 no device, 2 features refused, 3 a request failed.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"
.include "ring3.inc"
.include "virtio.inc"
.include "bench.inc"

.equ BREAKPOINT, 3
.equ BUFFERS, 16 << 20          # MAX_DEPTH of them, 1 MiB each
.equ QUEUE_SIZE, 256          # what a device offers, and the only size that kvmtool takes
.equ MAX_DEPTH, 32
.equ F_FLUSH, 1 << 9          # so that writes may stay in the host's cache

.data
count: .quad 1000
depth: .quad 1
size: .quad 4096
write: .quad 0
random: .quad 1
hold: .quad 0

RINGS request, QUEUE_SIZE
    .balign 16
headers: .skip 16 * MAX_DEPTH
statuses: .skip MAX_DEPTH
    .balign 8
submitted: .skip 8
kicks: .skip 8
ticks: .skip 8
places: .skip 8                 # how many sectors, then how many requests, the disk has room for
seed: .skip 8

START
    .irp name, count, depth, size, write, random, hold
    mov eax, [\name]
    call next_number
    mov [\name], eax
    .endr
    mov eax, BLOCK_DEVICE
    mov ecx, F_FLUSH
    call virtio_begin
    mov word ptr [request_available], NO_INTERRUPT
    QUEUE 0, request, QUEUE_SIZE
    call virtio_start
    mov eax, [virtio_config]
    mov eax, [eax]              # the capacity, in sectors
    mov [places], eax
    READY hold
    call load_tables
    GATE64 BREAKPOINT, done, USER_GATE
    DESCRIBE_TSS
    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED
    iretq

# --- ring 3 ---------------------------------------------------------------------------------------------------------
# R12: requests done; R13: used index seen; R14: available index
program:
    mov rax, [rip + places]
    shl rax, 9
    xor edx, edx
    div qword ptr [rip + size]
    mov [rip + places], rax
    mov eax, 88172645
    mov [rip + seed], rax
    xor r12d, r12d
    xor r13d, r13d
    xor r14d, r14d

    TICKS
    mov [rip + ticks], rax
    xor esi, esi                        # the first requests
5:  call submit
    inc esi
    cmp rsi, [rip + depth]
    jb 5b
6:  call publish
7:  mov eax, offset request_used
    movzx ecx, word ptr [rax + 2]
    cmp cx, r13w
    jne 8f
    pause
    jmp 7b
8:  movzx edx, r13w                     # a used entry: its head is three times the slot
    and edx, QUEUE_SIZE - 1
    mov eax, offset request_used
    mov eax, [rax + 4 + 8 * rdx]
    mov ecx, 3
    xor edx, edx
    div ecx
    mov esi, eax
    mov eax, offset statuses
    mov edi, 3
    cmp byte ptr [rax + rsi], 0
    je 9f
    int3
9:  inc r13d
    inc r12
    cmp r12, [rip + count]
    je 11f
    mov rax, [rip + submitted]
    cmp rax, [rip + count]
    jae 10f
    call submit
10: mov eax, offset request_used
    movzx ecx, word ptr [rax + 2]
    cmp cx, r13w
    jne 8b
    jmp 6b
11: TICKS
    sub rax, [rip + ticks]
    mov [rip + ticks], rax
    xor edi, edi
    int3

# submit: fill slot ESI with the next request and put it into the available ring, not shown yet. Changes RAX, RCX, RDX,
# RDI, R8, R9.
submit:
    mov rax, [rip + submitted]
    inc qword ptr [rip + submitted]
    cmp qword ptr [rip + random], 0
    je 1f
    mov rax, [rip + seed]               # xorshift
    mov rcx, rax
    shl rcx, 13
    xor rax, rcx
    mov rcx, rax
    shr rcx, 7
    xor rax, rcx
    mov rcx, rax
    shl rcx, 17
    xor rax, rcx
    mov [rip + seed], rax
1:  xor edx, edx
    div qword ptr [rip + places]
    imul rdx, [rip + size]
    shr rdx, 9                          # the sector
    mov edi, offset headers
    mov ecx, esi
    shl ecx, 4
    add edi, ecx
    mov eax, [rip + write]
    mov [rdi], rax
    mov [rdi + 8], rdx
    mov r8d, offset statuses
    add r8d, esi
    mov byte ptr [r8], 0xff
    lea r9d, [rsi + 2 * rsi]            # the slot's first descriptor
    mov ecx, r9d
    shl ecx, 4
    add ecx, offset request_descriptors
    mov [rcx], rdi                      # header
    mov dword ptr [rcx + 8], 16
    lea edx, [r9 + 1]
    shl edx, 16
    or edx, 1
    mov [rcx + 12], edx
    mov eax, esi                        # data
    shl eax, 20
    add eax, BUFFERS
    mov [rcx + 16], rax
    mov eax, [rip + size]
    mov [rcx + 24], eax
    lea edx, [r9 + 2]
    shl edx, 16
    or edx, 3                           # the device writes it
    mov eax, [rip + write]
    add eax, eax
    xor edx, eax                        # or reads it
    mov [rcx + 28], edx
    mov [rcx + 32], r8                  # status
    mov dword ptr [rcx + 40], 1
    mov dword ptr [rcx + 44], 2
    mov edx, r14d
    and edx, QUEUE_SIZE - 1
    mov eax, offset request_available
    mov [rax + 4 + 2 * rdx], r9w
    inc r14d
    ret

# publish: show the device what was submitted, and kick it if it wants that. Changes RAX, RDI.
publish:
    mov eax, offset request_available
    cmp [rax + 2], r14w
    je 1f
    mov [rax + 2], r14w
    mfence
    mov eax, offset request_used
    test byte ptr [rax], NO_NOTIFY
    jnz 1f
    KICK64 0
    inc qword ptr [rip + kicks]
1:  ret

# --- ring 0 again: EDI is the status ----------------------------------------------------------------------------------
done:
    mov eax, edi
    test eax, eax
    jnz exit
    REPORT "requests ", count
    REPORT " ticks ", ticks
    REPORT " kicks ", kicks
    PRINT64 "\n"
    cmp dword ptr [rip + hold], 0
    je 1f
    call wait_for_byte
1:  EXIT 0
