# summary: talks over a virtio network from ring 3: asks COUNT times and checks the answers, or answers COUNT times
# build: multiboot
# append: 8 0
#
# The command line: COUNT ROLE. Role 0 asks: it broadcasts frames of the local experimental EtherType, each longer than
# the last, and waits for each one's answer. Role 1 answers: such a frame goes back to its sender with every byte of the
# payload inverted. Other frames are let pass. The interface's address is printed first. The device may be on virtio-mmio
# or PCI; used buffers are polled for.
#
# Status 0 when all went well; 1 no device, 2 features refused, 3 an answer is of another length, 4 it has other bytes.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"
.include "ring3.inc"
.include "virtio.inc"

.equ BREAKPOINT, 3
.equ F_MAC, 1 << 5              # 5.1.3
.equ RX, 0
.equ TX, 1
.equ QUEUE_SIZE, 16
.equ HEADER, 12                 # struct virtio_net_hdr, 5.1.6; all zeroes: a whole frame, nothing to do for the device
.equ BUFFER_SIZE, 2048
.equ ETHERNET, 14               # destination, source, EtherType
.equ ETHERTYPE, 0xb588          # 0x88b5, big-endian
.equ SHORTEST, 46               # payload
.equ STEP, 180                  # by so much each question is longer, until
.equ LONGEST, 1500

.data
count: .long 8
role: .long 0

RINGS rx, QUEUE_SIZE
RINGS tx, QUEUE_SIZE
    .balign 4096
buffers: .skip BUFFER_SIZE * QUEUE_SIZE
question: .skip HEADER + ETHERNET + LONGEST
    .balign 8
mac: .skip 8

START
    mov eax, [count]
    call next_number
    mov [count], eax
    mov eax, [role]
    call next_number
    mov [role], eax
    mov eax, NET_DEVICE
    mov ecx, F_MAC
    call virtio_begin
    mov word ptr [rx_available], NO_INTERRUPT
    mov word ptr [tx_available], NO_INTERRUPT
    QUEUE RX, rx, QUEUE_SIZE
    QUEUE TX, tx, QUEUE_SIZE
    call virtio_start

    PRINT "mac"
    xor ebx, ebx
1:  mov edi, [virtio_config]
    mov al, [edi + ebx]
    mov [mac + ebx], al
    PRINT ":"
    mov cl, al
    movzx eax, al
    shr eax, 4
    call print_hex
    movzx eax, cl
    and eax, 15
    call print_hex
    inc ebx
    cmp ebx, 6
    jb 1b
    PRINT "\n"

    call load_tables
    GATE64 BREAKPOINT, done, USER_GATE
    DESCRIBE_TSS
    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED
    iretq

# --- ring 3 ---------------------------------------------------------------------------------------------------------
# R12: frames done; R13: used index of the receive queue; R14: available index of the transmit queue; R15: payload's size
program:
    xor r12d, r12d
    xor r13d, r13d
    xor r14d, r14d
    mov r15d, SHORTEST
    xor ecx, ecx                # the receive buffers, each a descriptor
1:  mov edx, ecx
    shl edx, 11
    add edx, offset buffers
    mov eax, ecx
    shl eax, 4
    add eax, offset rx_descriptors
    mov [rax], rdx
    mov dword ptr [rax + 8], BUFFER_SIZE
    mov dword ptr [rax + 12], DESC_WRITE
    mov eax, offset rx_available
    mov [rax + 4 + 2 * rcx], cx
    inc ecx
    cmp ecx, QUEUE_SIZE
    jb 1b
    mov [rax + 2], cx
    KICK64 RX
    cmp dword ptr [rip + role], 0
    jne answer

ask:
    mov ebx, offset question
    mov dword ptr [rbx + HEADER], 0xffffffff
    mov word ptr [rbx + HEADER + 4], 0xffff
    call set_source
    xor ecx, ecx                # the payload: byte i of frame n is i + n + 1
1:  lea eax, [rcx + r12 + 1]
    mov [rbx + HEADER + ETHERNET + rcx], al
    inc ecx
    cmp ecx, r15d
    jb 1b
    lea ecx, [r15 + HEADER + ETHERNET]
    call send
    call receive
    mov edi, 3
    lea eax, [r15 + HEADER + ETHERNET]
    cmp ecx, eax
    jne stop
    mov edi, 4
    xor ecx, ecx
2:  lea eax, [rcx + r12 + 1]
    not eax
    cmp [rbx + HEADER + ETHERNET + rcx], al
    jne stop
    inc ecx
    cmp ecx, r15d
    jb 2b
    call give_back
    add r15d, STEP
    cmp r15d, LONGEST
    jbe 3f
    mov r15d, LONGEST
3:  inc r12d
    cmp r12d, [rip + count]
    jb ask
    xor edi, edi
stop:
    int3

answer:
    call receive
    mov rax, [rbx + HEADER + 6] # to where it came from; two bytes too many, which are the sender's next
    mov [rbx + HEADER], eax
    shr rax, 32
    mov [rbx + HEADER + 4], ax
    call set_source
    mov edx, HEADER + ETHERNET
1:  not byte ptr [rbx + rdx]
    inc edx
    cmp edx, ecx
    jb 1b
    mov qword ptr [rbx], 0      # the header: num_buffers goes, too
    mov dword ptr [rbx + 8], 0
    call send
    call give_back
    inc r12d
    cmp r12d, [rip + count]
    jb answer
    xor edi, edi
    int3

# set_source: make the frame at RBX, behind its header, one of ours. Changes EAX.
set_source:
    mov eax, [rip + mac]
    mov [rbx + HEADER + 6], eax
    mov ax, [rip + mac + 4]
    mov [rbx + HEADER + 10], ax
    mov word ptr [rbx + HEADER + 12], ETHERTYPE
    ret

# send: send ECX bytes at RBX, and wait until they have been taken. Changes RAX, RDI.
send:
    mov eax, offset tx_descriptors
    mov [rax], rbx
    mov [rax + 8], ecx
    mov dword ptr [rax + 12], 0
    mov eax, offset tx_available
    mov edi, r14d
    and edi, QUEUE_SIZE - 1
    mov word ptr [rax + 4 + 2 * rdi], 0
    inc r14d
    mov [rax + 2], r14w         # x86 keeps stores in order: the entry is there before the index
    mfence
    mov eax, offset tx_used
    test byte ptr [rax], NO_NOTIFY
    jnz 1f
    KICK64 TX
1:  mov eax, offset tx_used
2:  pause
    cmp [rax + 2], r14w
    jne 2b
    ret

# receive: wait for a frame of ours: ECX bytes at RBX. Its buffer is kept until `give_back`. Changes RAX, RDX, RDI.
receive:
    mov eax, offset rx_used
1:  pause
    cmp [rax + 2], r13w
    je 1b
    mov edx, r13d
    and edx, QUEUE_SIZE - 1
    mov ebx, [rax + 4 + 8 * rdx]
    mov ecx, [rax + 8 + 8 * rdx]
    shl ebx, 11
    add ebx, offset buffers
    cmp word ptr [rbx + HEADER + 12], ETHERTYPE
    jne 2f
    ret
2:  call give_back
    jmp receive

# give_back: the buffer of the frame last received is free again. Changes RAX, RDX, RDI.
give_back:
    mov eax, offset rx_used
    mov edx, r13d
    and edx, QUEUE_SIZE - 1
    mov eax, [rax + 4 + 8 * rdx]
    mov edi, offset rx_available
    mov [rdi + 4 + 2 * rdx], ax # the queue is full but for this one: both rings are at the same place
    inc r13d
    lea edx, [r13 + QUEUE_SIZE]
    mov [rdi + 2], dx
    mfence
    mov eax, offset rx_used
    test byte ptr [rax], NO_NOTIFY
    jnz 1f
    KICK64 RX
1:  ret

# --- ring 0 again: EDI is the status ----------------------------------------------------------------------------------
done:
    mov eax, edi
    jmp exit
