# summary: keeps a write-ahead log on a virtio disk (virtio-mmio) and redoes it at the start (number: transactions)
# build: multiboot
# append: 8
#
# A transaction replaces several blocks of the disk, all of them or none, whenever the power goes. At the start every
# transaction that the log holds whole is redone, and one without its end is erased. Then COUNT new ones are made, each:
#
#     begin record and blocks into the log; FLUSH; end record; FLUSH; "DONE n"; blocks to their places; FLUSH
#
# The layout, in sectors; all fields are 32 bits, little-endian:
#     0        the log's tail: magic, number of the oldest transaction that may not be in its places yet
#     8..71    the log: transaction n has the 8 sectors from 8 + 8 * (n mod 8)
#                begin: magic, n, count, then the place of each block
#                count blocks
#                end: magic, n, checksum of all before: for each 32 bits, sum = (sum xor bits) * 16777619
#     80..140  the places of the blocks, 61
# Transaction n has 3 + n mod 4 blocks; block i belongs to place (5 n + 3 i) mod 61, and each of its 32 bits are
# n << 16 | place. The tail is moved on after every fourth transaction, so up to four have to be redone.
#
# It prints "REDONE r NEXT n" after the start, and "DONE n" for each transaction that no power cut can undo. Status 0;
# 1 no device, 2 features refused, 3 a request failed.
.equ QUEUE_SIZE, 32
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "virtio_mmio.inc"

.equ TAIL_MAGIC, 0x4c494154     # "TAIL"
.equ BEGIN_MAGIC, 0x4e474542    # "BEGN"
.equ END_MAGIC, 0x53444e45      # "ENDS"
.equ LOG, 8
.equ LOG_SLOTS, 8
.equ SLOT_SECTORS, 8
.equ PLACES, 80
.equ PLACE_COUNT, 61
.equ MOST_BLOCKS, 6
.equ TAIL_EVERY, 4

.equ RECORD_NUMBER, 4
.equ BEGIN_COUNT, 8
.equ BEGIN_PLACES, 12
.equ END_CHECKSUM, 8

.equ MOST_REQUESTS, 8           # on their way at one time, three descriptors each

.data
left: .long 8                   # transactions still to be made

.bss
    .balign 4096
slot: .skip SLOT_SECTORS * SECTOR       # a transaction as it is in the log: begin, blocks, end
tail: .skip SECTOR
number: .skip 4                 # of the transaction in `slot`
first: .skip 4                  # the tail at the start
requests: .skip 4               # on their way
headers: .skip 16 * MOST_REQUESTS
statuses: .skip MOST_REQUESTS

START
    mov eax, [left]
    call next_number
    mov [left], eax
    mov eax, BLOCK_DEVICE
    call find_device
    mov eax, F_FLUSH
    mov edx, F_VERSION_1
    call negotiate
    mov al, 2
    jz exit
    call empty_rings
    mov esi, offset queue_registers
    call write_registers
    mov dword ptr [edi + QUEUE_READY], 1
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK

# --- redo -------------------------------------------------------------------------------------------------------------
    mov eax, T_IN
    xor edx, edx
    mov ebx, offset tail
    mov ecx, 1
    call request
    call complete
    cmp dword ptr [tail], TAIL_MAGIC
    je 1f
    mov dword ptr [tail], TAIL_MAGIC    # a new disk
    mov dword ptr [tail + RECORD_NUMBER], 1
1:  mov eax, [tail + RECORD_NUMBER]
    mov [number], eax
    mov [first], eax
2:  call log_place
    mov eax, T_IN
    mov ebx, offset slot
    mov ecx, SLOT_SECTORS
    call request
    call complete
    call is_whole
    jne 3f
    call blocks_to_places
    call complete               # the next one may have the same places: one after the other
    inc dword ptr [number]
    jmp 2b
3:  call flush
    mov eax, [number]
    mov [tail + RECORD_NUMBER], eax
    call write_tail
    call log_place              # what began and has no end: never again
    mov edi, offset slot
    mov ecx, SECTOR / 4
    xor eax, eax
    rep stosd
    mov eax, T_OUT
    mov ebx, offset slot
    mov ecx, 1
    call request
    call flush
    PRINT "REDONE "
    mov eax, [number]
    sub eax, [first]
    call print_decimal
    PRINT " NEXT "
    mov eax, [number]
    call print_decimal
    PRINT "\n"

# --- transactions -----------------------------------------------------------------------------------------------------
again:
    sub dword ptr [left], 1
    mov al, 0
    jc exit
    call fill_slot
    call log_place
    mov eax, T_OUT
    mov ebx, offset slot
    mov ecx, [slot + BEGIN_COUNT]
    inc ecx
    call request
    call flush
    call find_end
    mov eax, T_OUT
    call log_place
    add edx, [slot + BEGIN_COUNT]
    inc edx
    mov ecx, 1
    call request
    call flush
    PRINT "DONE "
    mov eax, [number]
    call print_decimal
    PRINT "\n"
    call blocks_to_places
    call flush
    inc dword ptr [number]
    mov eax, [number]
    test eax, TAIL_EVERY - 1
    jnz again
    mov [tail + RECORD_NUMBER], eax
    call write_tail             # lost without harm: no flush of its own
    call complete
    jmp again

# log_place: return in EDX the sector of the log where transaction `number` begins. Changes nothing else.
log_place:
    mov edx, [number]
    and edx, LOG_SLOTS - 1
    lea edx, [LOG + SLOT_SECTORS * edx]
    ret

# find_end: return in EBX where the end record is in `slot`. Changes nothing else.
find_end:
    mov ebx, [slot + BEGIN_COUNT]
    inc ebx
    shl ebx, 9
    add ebx, offset slot
    ret

# fill_slot: make transaction `number` in `slot`. Changes all but ESP.
fill_slot:
    mov edi, offset slot
    mov ecx, SLOT_SECTORS * SECTOR / 4
    xor eax, eax
    rep stosd
    mov dword ptr [slot], BEGIN_MAGIC
    mov ebp, [number]
    mov [slot + RECORD_NUMBER], ebp
    mov ebx, ebp
    and ebx, 3
    add ebx, 3
    mov [slot + BEGIN_COUNT], ebx
    mov edi, offset slot + SECTOR
    mov esi, offset slot + BEGIN_PLACES
    lea eax, [ebp + 4 * ebp]
1:  xor edx, edx
    mov ecx, PLACE_COUNT
    div ecx                     # EDX: the place
    mov [esi], edx
    add esi, 4
    mov eax, ebp
    shl eax, 16
    or eax, edx
    mov ecx, SECTOR / 4
    rep stosd
    lea eax, [edx + 3]
    dec ebx
    jnz 1b
    call checksum
    call find_end
    mov dword ptr [ebx], END_MAGIC
    mov [ebx + RECORD_NUMBER], ebp
    mov [ebx + END_CHECKSUM], eax
    ret

# checksum: return in EAX the sum of what is before the end record in `slot`. Changes ECX, ESI.
checksum:
    mov ecx, [slot + BEGIN_COUNT]
    inc ecx
    shl ecx, 4                  # 8 times 32 bits in a turn
    mov esi, offset slot
    xor eax, eax
1:  .irp at, 0, 4, 8, 12, 16, 20, 24, 28
    xor eax, [esi + \at]
    imul eax, eax, 16777619
    .endr
    add esi, 32
    dec ecx
    jnz 1b
    ret

# is_whole: set the zero flag if `slot` holds transaction `number` with its end. Changes EAX, EBX, ECX, EDX, ESI.
is_whole:
    mov edx, [number]
    cmp dword ptr [slot], BEGIN_MAGIC
    jne 2f
    cmp [slot + RECORD_NUMBER], edx
    jne 2f
    mov ecx, [slot + BEGIN_COUNT]
    dec ecx
    cmp ecx, MOST_BLOCKS - 1
    ja 2f
1:  cmp dword ptr [slot + BEGIN_PLACES + 4 * ecx], PLACE_COUNT - 1
    ja 2f
    dec ecx
    jns 1b
    call find_end
    cmp dword ptr [ebx], END_MAGIC
    jne 2f
    cmp [ebx + RECORD_NUMBER], edx
    jne 2f
    call checksum
    cmp eax, [ebx + END_CHECKSUM]
    ret
2:  or eax, 1                   # not zero
    ret

# blocks_to_places: begin to write each block of `slot` to its place. Changes all but ESP.
blocks_to_places:
    xor ebp, ebp
1:  mov eax, T_OUT
    mov edx, [slot + BEGIN_PLACES + 4 * ebp]
    add edx, PLACES
    mov ebx, ebp
    inc ebx
    shl ebx, 9
    add ebx, offset slot
    mov ecx, 1
    call request
    inc ebp
    cmp ebp, [slot + BEGIN_COUNT]
    jb 1b
    ret

# write_tail: begin to write the tail. Changes EAX, EBX, ECX, EDX.
write_tail:
    mov eax, T_OUT
    xor edx, edx
    mov ebx, offset tail
    mov ecx, 1
    jmp request

# flush: wait for all requests, then make them last. Changes EAX, EBX, ECX, EDX.
flush:
    call complete
    mov eax, T_FLUSH
    xor edx, edx
    xor ecx, ecx
    call request
    jmp complete

# request: put request EAX at sector EDX with the ECX sectors at EBX on its way. Changes EAX, EBX, ECX, EDX.
request:
    push esi
    push edi
    push ebp
    mov ebp, [requests]
    mov esi, ebp
    shl esi, 4
    add esi, offset headers
    mov [esi], eax
    mov [esi + 8], edx
    mov byte ptr [statuses + ebp], 0xff
    push ecx
    push ebx
    push eax
    lea ebx, [ebp + 2 * ebp]    # header
    mov eax, esi
    lea edx, [ebx + 1]
    test ecx, ecx
    jnz 1f
    inc edx
1:  shl edx, 16
    or edx, DESC_NEXT
    mov ecx, 16
    call describe
    inc ebx                     # data
    pop edx
    xor edx, T_OUT
    add edx, edx                # the device writes what is not T_OUT
    and edx, DESC_WRITE
    lea esi, [ebx + 1]
    shl esi, 16
    lea edx, [edx + esi + DESC_NEXT]
    pop eax
    pop ecx
    shl ecx, 9
    call describe
    inc ebx                     # status
    lea eax, [statuses + ebp]
    mov ecx, 1
    mov edx, DESC_WRITE
    call describe
    sub ebx, 2
    call offer
    inc dword ptr [requests]
    pop ebp
    pop edi
    pop esi
    ret

# complete: kick the device and wait until all requests are done; end the run with status 3 if one failed. Changes EAX.
complete:
    push ecx
    mov ecx, [requests]
    jecxz 3f
    mov ax, [available + 2]
    push edi
    mov edi, [device]
    mov dword ptr [edi + QUEUE_NOTIFY], 0
    pop edi
1:  pause
    cmp [used + 2], ax
    jne 1b
2:  cmp byte ptr [statuses + ecx - 1], 0
    mov al, 3
    jne exit
    loop 2b
    mov [requests], ecx
3:  pop ecx
    ret
