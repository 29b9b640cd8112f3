# summary: drives a virtio disk: writes a sector, flushes, reads it back, asks for the serial number
# build: multiboot
#
# A driver in its smallest form (Virtio 1.2, 3.1.1 and 5.2), on virtio-mmio or PCI: one queue, one request at a time, its
# end found by polling. What it kicks by is a doorbell that KVM turns into an eventfd; no interrupt is asked for.
#
# Status 0 when all went well; 1 no device, 2 features refused, 3 a request failed, 4 other data came back.
.include "multiboot.inc"
.include "console.inc"
.include "virtio.inc"

.equ F_FLUSH, 1 << 9
.equ T_IN, 0
.equ T_OUT, 1
.equ T_FLUSH, 4
.equ T_GET_ID, 8

.equ QUEUE_SIZE, 16
.equ SECTOR, 512
.equ WRITTEN_SECTOR, 5

RINGS request, QUEUE_SIZE
    .balign 16
header: .skip 16                # type, reserved, sector
status: .skip 1
    .balign 16
data: .skip SECTOR

START
    mov eax, BLOCK_DEVICE
    mov ecx, F_FLUSH
    call virtio_begin
    mov word ptr [request_available], NO_INTERRUPT
    QUEUE 0, request, QUEUE_SIZE
    call virtio_start

    PRINT "sectors: "
    mov eax, [virtio_config]
    mov eax, [eax]              # the capacity, in sectors
    call print_decimal
    PRINT "\n"

    mov edi, offset data        # a pattern: the low byte of each offset, plus one
    mov ecx, SECTOR
    mov al, 1
1:  stosb
    inc al
    loop 1b
    mov eax, T_OUT
    mov edx, WRITTEN_SECTOR
    mov ebx, DESC_NEXT          # the disk reads it
    mov ecx, SECTOR
    call request
    mov eax, T_FLUSH
    xor edx, edx
    xor ecx, ecx
    call request

    mov edi, offset data
    mov ecx, SECTOR / 4
    xor eax, eax
    rep stosd
    mov eax, T_IN
    mov edx, WRITTEN_SECTOR
    mov ebx, DESC_NEXT | DESC_WRITE
    mov ecx, SECTOR
    call request
    mov esi, offset data
    mov ecx, SECTOR
    mov ah, 1
1:  lodsb
    cmp al, ah
    mov al, 4
    jne exit
    inc ah
    loop 1b

    mov eax, T_GET_ID
    xor edx, edx
    mov ebx, DESC_NEXT | DESC_WRITE
    mov ecx, 20
    call request
    PRINT "serial: "
    mov esi, offset data
1:  lodsb                       # at most 20 bytes, then zeroes, as the buffer is longer
    test al, al
    jz 2f
    mov dx, COM1
    out dx, al
    jmp 1b
2:  PRINT "\n"
    EXIT 0

# request: do a request of type EAX at sector EDX with ECX bytes of data, whose descriptor has the flags EBX; end the run
# with status 3 when it fails. Changes EAX, EBX, ECX, EDX, EDI.
request:
    mov [header], eax
    mov [header + 8], edx
    mov byte ptr [status], 0xff
    mov dword ptr [request_descriptors], offset header
    mov dword ptr [request_descriptors + 8], 16
    mov dword ptr [request_descriptors + 12], DESC_NEXT | 2 << 16
    mov dword ptr [request_descriptors + 32], offset status
    mov dword ptr [request_descriptors + 40], 1
    mov dword ptr [request_descriptors + 44], DESC_WRITE
    jecxz 1f
    mov dword ptr [request_descriptors + 12], DESC_NEXT | 1 << 16
    mov dword ptr [request_descriptors + 16], offset data
    mov [request_descriptors + 24], ecx
    or ebx, 2 << 16
    mov [request_descriptors + 28], ebx
1:  movzx eax, word ptr [request_available + 2]
    mov edi, eax
    and edi, QUEUE_SIZE - 1
    mov word ptr [request_available + 4 + 2 * edi], 0
    inc eax
    mov [request_available + 2], ax     # x86 keeps stores in order: the entry is there before the index
    KICK 0
2:  pause
    cmp [request_used + 2], ax
    jne 2b
    cmp byte ptr [status], 0
    mov al, 3
    jne exit
    ret
