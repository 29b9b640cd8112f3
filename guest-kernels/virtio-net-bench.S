# summary: measures a virtio network from ring 3: COUNT frames of SIZE bytes out, in, or out and back, DEPTH at a time
# build: multiboot
# append: 10000 64 64 0 0
#
# The command line: COUNT DEPTH SIZE MODE HOLD; depth 1 to 64. Mode 0 sends frames to nobody; 1 receives what somebody else
# sends; 2 pings 169.254.77.1 at 02:00:00:00:00:01, as 169.254.77.2 at 52:54:00:12:34:56, and waits for the answers. A SIZE
# beyond 1514 is a TCP segment, up to 65549 bytes with its headers, that the host is to cut (host and guest TSO). HOLD is
# what bench.inc says: with it a receiver has no buffers out before it is told.
#
# The device may be on virtio-mmio or PCI. It is driven as Linux does: mergeable receive buffers, given back 32 at a time,
# and kicks when the event index asks for them; but used buffers are polled for and no interrupt is asked for. At the end:
#     packets N bytes B ticks T rx-kicks R tx-kicks S
# with T in TSC ticks. Status 0; 1 no device, 2 features refused or missing.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"
.include "ring3.inc"
.include "virtio.inc"
.include "bench.inc"

.equ BREAKPOINT, 3
.equ F_CSUM, 1 << 0             # 5.1.3
.equ F_GUEST_CSUM, 1 << 1
.equ F_GUEST_TSO4, 1 << 7
.equ F_HOST_TSO4, 1 << 11
.equ F_MRG_RXBUF, 1 << 15
.equ SEND_SEGMENTS, F_CSUM | F_HOST_TSO4
.equ RECEIVE_SEGMENTS, F_GUEST_CSUM | F_GUEST_TSO4
.equ RX, 0
.equ TX, 1
.equ QUEUE_SIZE, 256          # what a device offers, and the only size that kvmtool takes
.equ MAX_DEPTH, 64              # four descriptors a slot
.equ USED_EVENT, 4 + 2 * QUEUE_SIZE     # in the available ring, 2.7.6
.equ AVAIL_EVENT, 4 + 8 * QUEUE_SIZE    # in the used ring, 2.7.8
.equ REFILL, 32

.equ RECEIVE, 1
.equ RETURN, 2

.equ HEADER, 12                 # struct virtio_net_hdr, 5.1.6
.equ NUM_BUFFERS, 10            # in it
.equ PLAIN, 1514                # bytes of the longest frame that no offload is needed for
.equ SEGMENT_HEADERS, 54        # Ethernet, IPv4, TCP
.equ PIECE, 32768               # what a segment's payload is in pieces of, as Linux's is
.equ BUFFERS, 16 << 20          # for what is received: one of 4096 bytes for each descriptor
.equ SMALL_BUFFER, 2048
.equ LARGE_BUFFER, 4096
.equ PAYLOAD, 24 << 20          # what is sent, but for its headers

.data
count: .quad 10000
depth: .quad 64
size: .quad 64
mode: .quad 0
hold: .quad 0
    .balign 16
plain:                          # struct virtio_net_hdr, and a frame to nobody, of the local experimental EtherType
    .fill HEADER, 1, 0
    .byte 2, 0, 0, 0, 0, 2,  2, 0, 0, 0, 0, 1,  0x88, 0xb5
    .fill PLAIN - 14, 1, 0x5a
ping:                           # the same with an ICMP echo request, its checksums made by hand
    .fill HEADER, 1, 0
    .byte 2, 0, 0, 0, 0, 1,  0x52, 0x54, 0, 0x12, 0x34, 0x56,  0x08, 0x00
    .byte 0x45, 0, 0, 50,  0, 0, 0x40, 0,  64, 1, 0x4c, 0xcb,  169, 254, 77, 2,  169, 254, 77, 1
    .byte 8, 0, 0xf7, 0xff,  0, 0, 0, 0
    .fill PLAIN - 42, 1, 0
segment:                        # NEEDS_CSUM, TCPV4, header length, segment size, start and offset of the checksum
    .byte 1, 1
    .short SEGMENT_HEADERS, 1448, 34, 16, 0
    .byte 2, 0, 0, 0, 0, 2,  2, 0, 0, 0, 0, 1,  0x08, 0x00
segment_ip:                     # a length to be filled in; nobody is asked to route it, so its checksum stays out
    .byte 0x45, 0, 0, 0,  0, 1, 0x40, 0,  64, 6, 0, 0,  10, 0, 0, 1,  10, 0, 0, 2
    .byte 0x10, 0, 0x20, 0,  0, 0, 0, 1,  0, 0, 0, 1,  0x50, 0x10, 0xff, 0xff,  0, 0, 0, 0

RINGS rx, QUEUE_SIZE
    .skip 2                     # room for the event indices
RINGS tx, QUEUE_SIZE
    .skip 2
    .balign 8
ticks: .skip 8
bytes: .skip 8
packets: .skip 8
rx_kicks: .skip 8
tx_kicks: .skip 8

START
    .irp name, count, depth, size, mode, hold
    mov eax, [\name]
    call next_number
    mov [\name], eax
    .endr
    mov ecx, F_MRG_RXBUF        # what cannot be done without
    cmp dword ptr [size], PLAIN
    jbe 2f
    mov ecx, F_MRG_RXBUF | SEND_SEGMENTS
    cmp dword ptr [mode], RECEIVE
    jne 2f
    mov ecx, F_MRG_RXBUF | RECEIVE_SEGMENTS
2:  push ecx
    or ecx, F_EVENT_IDX
    mov eax, NET_DEVICE
    call virtio_begin
    pop ecx
    mov eax, [virtio_features]
    and eax, ecx
    cmp eax, ecx
    mov al, 2
    jne exit
    mov word ptr [rx_available], NO_INTERRUPT
    mov word ptr [tx_available], NO_INTERRUPT
    mov word ptr [rx_available + USED_EVENT], -1
    mov word ptr [tx_available + USED_EVENT], -1
    QUEUE RX, rx, QUEUE_SIZE
    QUEUE TX, tx, QUEUE_SIZE
    call virtio_start
    READY hold
    call load_tables
    GATE64 BREAKPOINT, done, USER_GATE
    DESCRIBE_TSS
    ENTER_LONG_MODE
    LOAD_TSS
    PUSH_USER_FRAME program, user_stack_top, RFLAGS_RESERVED
    iretq

# Kick queue `name` if the device wants to know that its available index went from \old to \new, two 16-bit registers;
# \old changes, and RAX, RCX, RDI.
.macro KICK_IF_WANTED name, index, old, new
    mfence                      # the index is out before we look
    mov eax, offset \name\()_used
    test dword ptr [rip + virtio_features], F_EVENT_IDX
    jz flags\@
    mov ecx, \new
    sub ecx, \old               # 2.7.10: whether the event index is among those that are new
    movzx edi, word ptr [rax + AVAIL_EVENT]
    mov eax, \new
    sub eax, edi
    dec eax
    cmp ax, cx
    jb kick\@
    jmp no_kick\@
flags\@:
    test byte ptr [rax], NO_NOTIFY
    jnz no_kick\@
kick\@:
    KICK64 \index
    inc qword ptr [rip + \name\()_kicks]
no_kick\@:
.endm

# --- ring 3 ---------------------------------------------------------------------------------------------------------
# RBX: receive buffers given; RBP: buffers still to come of the frame that is being received; R12: frames sent; R13: of
# those taken; R14: frames received; R15: receive buffers seen. What indices they are is in their lower 16 bits.
program:
    xor ebx, ebx
    xor ebp, ebp
    xor r12d, r12d
    xor r13d, r13d
    xor r14d, r14d
    xor r15d, r15d
    call describe_slots
    TICKS
    mov [rip + ticks], rax
    cmp qword ptr [rip + mode], 0
    je 1f
    call give_all

1:  mov eax, offset tx_used
    movzx eax, word ptr [rax + 2]
    sub ax, r13w
    add r13, rax
    mov ecx, offset tx_available
    lea eax, [r13 - 1]
    mov [rcx + USED_EVENT], ax  # long past: no interrupt
    mov rax, r13
    cmp qword ptr [rip + mode], 0
    je 2f
    call take
    mov rax, r14
    cmp qword ptr [rip + mode], RECEIVE
    jne 2f
    cmp rax, [rip + count]
    jae 9f
    pause
    jmp 1b
2:  cmp rax, [rip + count]
    jae 9f
    call submit
    pause
    jmp 1b

9:  mov [rip + packets], rax
    TICKS
    sub rax, [rip + ticks]
    mov [rip + ticks], rax
    cmp qword ptr [rip + mode], 0
    jne 1f
    mov rax, [rip + count]
    imul rax, [rip + size]
    mov [rip + bytes], rax
1:  int3

# describe_slots: describe what every slot of the transmit queue sends: it is the same. Changes RAX, RCX, RDX, RSI, RDI.
describe_slots:
    mov eax, offset tx_descriptors
    mov edx, offset plain
    mov ecx, offset ping
    cmp qword ptr [rip + mode], RETURN
    cmove edx, ecx
    mov ecx, [rip + size]
    add ecx, HEADER
    xor esi, esi                # the slot's first descriptor
    cmp ecx, PLAIN + HEADER
    jbe 2f
    mov edx, [rip + size]       # the packet's length, big-endian
    sub edx, 14
    xchg dl, dh
    mov edi, offset segment_ip
    mov [rdi + 2], dx
    mov edx, offset segment
1:  mov edi, [rip + size]
    sub edi, SEGMENT_HEADERS + PIECE
    mov [rax], rdx
    mov dword ptr [rax + 8], HEADER + SEGMENT_HEADERS
    lea ecx, [rsi + 1]
    shl ecx, 16
    or ecx, DESC_NEXT
    mov [rax + 12], ecx
    mov ecx, PAYLOAD
    mov [rax + 16], rcx
    mov dword ptr [rax + 24], PIECE
    lea ecx, [rsi + 2]
    shl ecx, 16
    or ecx, DESC_NEXT
    mov [rax + 28], ecx
    mov ecx, PAYLOAD + PIECE
    mov [rax + 32], rcx
    mov [rax + 40], edi
    add eax, 64
    add esi, 4
    cmp esi, QUEUE_SIZE
    jb 1b
    ret
2:  mov [rax], rdx
    mov [rax + 8], ecx
    add eax, 64
    add esi, 4
    cmp esi, QUEUE_SIZE
    jb 2b
    ret

# submit: send as many frames as may be under way. Changes RAX, RCX, RDX, RSI, RDI, R8.
submit:
    mov r8, r12
    mov rcx, r13                # what is under way are those not taken
    cmp qword ptr [rip + mode], RETURN
    jne 1f
    cmp r14, r13                # or those not back, if that is more
    cmovb rcx, r14
1:  cmp r12, [rip + count]
    jae 3f
    mov rax, r12
    sub rax, rcx
    cmp rax, [rip + depth]
    jae 3f
    mov eax, r12d               # the slot: one that was never used, or what the device has given back
    sub rax, [rip + depth]
    js 2f
    movzx eax, al
    mov edx, offset tx_used
    mov edx, [rdx + 4 + 8 * rax]
    jmp 4f
2:  lea edx, [4 * r12]
4:  movzx eax, r12b
    mov esi, offset tx_available
    mov [rsi + 4 + 2 * rax], dx
    inc r12
    jmp 1b
3:  cmp r8, r12
    je 5f
    mov esi, offset tx_available
    mov [rsi + 2], r12w
    KICK_IF_WANTED tx, TX, r8d, r12d
5:  ret

# give_all: give the device every receive buffer. Changes RAX, RCX, RDX, RDI, R8.
give_all:
    mov r8d, SMALL_BUFFER
    cmp qword ptr [rip + size], PLAIN
    jbe 1f
    mov r8d, LARGE_BUFFER
1:  mov eax, offset rx_descriptors
    mov edx, ebx
    shl edx, 4
    add eax, edx
    mov edx, ebx
    shl edx, 12
    add edx, BUFFERS
    mov [rax], rdx
    mov [rax + 8], r8d
    mov dword ptr [rax + 12], DESC_WRITE
    mov eax, offset rx_available
    mov [rax + 4 + 2 * rbx], bx
    inc ebx
    cmp ebx, QUEUE_SIZE
    jb 1b
    jmp show

# take: take what has come in, and give buffers back once there are enough of them. Changes RAX, RCX, RDX, RSI, RDI, R8.
take:
    mov esi, offset rx_used
    mov r8d, offset rx_available
1:  cmp [rsi + 2], r15w
    je 3f
    movzx edx, r15b
    mov eax, [rsi + 4 + 8 * rdx]        # which buffer
    mov ecx, [rsi + 8 + 8 * rdx]        # how much is in it
    add [rip + bytes], rcx
    test ebp, ebp
    jnz 2f
    mov edx, eax
    shl edx, 12
    movzx ebp, word ptr [rdx + BUFFERS + NUM_BUFFERS]
    sub qword ptr [rip + bytes], HEADER
    inc r14
2:  dec ebp
    movzx edx, bl
    mov [r8 + 4 + 2 * rdx], ax
    inc rbx
    inc r15
    jmp 1b
3:  lea eax, [r15 - 1]
    mov [r8 + USED_EVENT], ax   # long past: no interrupt
    mov eax, ebx
    sub ax, [r8 + 2]
    cmp ax, REFILL
    jae show
    ret

# show: let the device see the receive buffers that were given. Changes RAX, RCX, RDI, R8.
show:
    mov eax, offset rx_available
    movzx r8d, word ptr [rax + 2]
    mov [rax + 2], bx
    KICK_IF_WANTED rx, RX, r8d, ebx
    ret

# --- ring 0 again -----------------------------------------------------------------------------------------------------
done:
    REPORT "packets ", packets
    REPORT " bytes ", bytes
    REPORT " ticks ", ticks
    REPORT " rx-kicks ", rx_kicks
    REPORT " tx-kicks ", tx_kicks
    PRINT64 "\n"
    cmp dword ptr [rip + hold], 0
    je 1f
    call wait_for_byte
1:  EXIT 0
