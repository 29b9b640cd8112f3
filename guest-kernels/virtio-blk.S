# summary: drives a virtio disk by virtio-mmio: writes a sector, flushes, reads it back, asks for the serial number
# build: multiboot
#
# A driver in its smallest form (Virtio 1.2, 3.1.1, 4.2 and 5.2): one queue, one request at a time, its end found by
# polling. What it kicks by is a doorbell that KVM turns into an eventfd; no interrupt is asked for.
#
# Status 0 when all went well; 1 no device, 2 features refused, 3 a request failed, 4 other data came back.
.include "multiboot.inc"
.include "console.inc"

.equ FIRST_SLOT, 0xfeb00000
.equ SLOT_SIZE, 0x200
.equ SLOTS, 24
.equ MAGIC, 0x74726976          # "virt"

# --- registers (4.2.2)
.equ VERSION, 0x04
.equ DEVICE_ID, 0x08
.equ DRIVER_FEATURES, 0x20
.equ DRIVER_FEATURES_SEL, 0x24
.equ QUEUE_SEL, 0x30
.equ QUEUE_NUM, 0x38
.equ QUEUE_READY, 0x44
.equ QUEUE_NOTIFY, 0x50
.equ STATUS, 0x70
.equ QUEUE_DESC, 0x80           # each a low and a high half
.equ QUEUE_DRIVER, 0x90
.equ QUEUE_DEVICE, 0xa0
.equ CONFIG, 0x100              # the disk's capacity, in sectors

.equ ACKNOWLEDGE, 1
.equ DRIVER, 2
.equ DRIVER_OK, 4
.equ FEATURES_OK, 8

.equ BLOCK_DEVICE, 2
.equ F_FLUSH, 1 << 9
.equ F_VERSION_1, 1 << 0        # of the upper 32
.equ T_IN, 0
.equ T_OUT, 1
.equ T_FLUSH, 4
.equ T_GET_ID, 8

.equ DESC_NEXT, 1
.equ DESC_WRITE, 2
.equ NO_INTERRUPT, 1
.equ QUEUE_SIZE, 16
.equ SECTOR, 512
.equ WRITTEN_SECTOR, 5

.bss
    .balign 4096
descriptors: .skip 16 * QUEUE_SIZE
available: .skip 6 + 2 * QUEUE_SIZE
    .balign 4
used: .skip 6 + 8 * QUEUE_SIZE
    .balign 16
header: .skip 16                # type, reserved, sector
status: .skip 1
    .balign 16
data: .skip SECTOR
device: .skip 4                 # its registers

START
    mov edi, FIRST_SLOT
    mov ecx, SLOTS
1:  cmp dword ptr [edi], MAGIC
    jne 2f
    cmp dword ptr [edi + VERSION], 2
    jne 2f
    cmp dword ptr [edi + DEVICE_ID], BLOCK_DEVICE
    je found
2:  add edi, SLOT_SIZE
    loop 1b
    EXIT 1

found:
    mov [device], edi
    mov dword ptr [edi + STATUS], 0
    mov dword ptr [edi + STATUS], ACKNOWLEDGE
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER
    mov dword ptr [edi + DRIVER_FEATURES_SEL], 0
    mov dword ptr [edi + DRIVER_FEATURES], F_FLUSH
    mov dword ptr [edi + DRIVER_FEATURES_SEL], 1
    mov dword ptr [edi + DRIVER_FEATURES], F_VERSION_1
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER | FEATURES_OK
    mov eax, [edi + STATUS]
    test eax, FEATURES_OK
    mov al, 2
    jz exit
    mov word ptr [available], NO_INTERRUPT
    mov dword ptr [edi + QUEUE_SEL], 0
    mov dword ptr [edi + QUEUE_NUM], QUEUE_SIZE
    mov dword ptr [edi + QUEUE_DESC], offset descriptors
    mov dword ptr [edi + QUEUE_DESC + 4], 0
    mov dword ptr [edi + QUEUE_DRIVER], offset available
    mov dword ptr [edi + QUEUE_DRIVER + 4], 0
    mov dword ptr [edi + QUEUE_DEVICE], offset used
    mov dword ptr [edi + QUEUE_DEVICE + 4], 0
    mov dword ptr [edi + QUEUE_READY], 1
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

    PRINT "sectors: "
    mov eax, [edi + CONFIG]
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
    mov dword ptr [descriptors], offset header
    mov dword ptr [descriptors + 8], 16
    mov dword ptr [descriptors + 12], DESC_NEXT | 2 << 16
    mov dword ptr [descriptors + 32], offset status
    mov dword ptr [descriptors + 40], 1
    mov dword ptr [descriptors + 44], DESC_WRITE
    jecxz 1f
    mov dword ptr [descriptors + 12], DESC_NEXT | 1 << 16
    mov dword ptr [descriptors + 16], offset data
    mov [descriptors + 24], ecx
    or ebx, 2 << 16
    mov [descriptors + 28], ebx
1:  movzx eax, word ptr [available + 2]
    mov edi, eax
    and edi, QUEUE_SIZE - 1
    mov word ptr [available + 4 + 2 * edi], 0
    inc eax
    mov [available + 2], ax     # x86 keeps stores in order: the entry is there before the index
    mov edi, [device]
    mov dword ptr [edi + QUEUE_NOTIFY], 0
2:  pause
    cmp [used + 2], ax
    jne 2b
    cmp byte ptr [status], 0
    mov al, 3
    jne exit
    ret
