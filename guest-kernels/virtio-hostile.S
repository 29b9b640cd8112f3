# summary: breaks every rule of a virtio-mmio device and shows that it works again (numbers: how, device type; --ram 4)
# build: multiboot
# append: 0 2
#
# One mistake after the other; after each a reset and a good request. A line for each: what was done wrong, and what
# came of it. "needs reset" is said only where the device has answered nothing, tells of it by an interrupt cause if the
# driver was ready, and stays as it is whatever is kicked. "status N" is the status of a request that came back, where
# requests have one.
#
# The first number: 0 does all this and ends with status 0; 1 only breaks the queue, and halts for ever; 2 breaks it and
# kicks for ever; 3 breaks it and resets the device for ever. The second: 2 for a disk, which has 4096 sectors, and
# "GOOD" at the beginning of sector 1; 4 for an entropy source; 1 for a network, whose transmit queue it is. Other
# statuses: 1 no device, 2 features refused, 3 the RAM is not 4 MiB, 4 a good request failed: the last line says after
# what.
.equ QUEUE_SIZE, 64
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "virtio_mmio.inc"

.equ MULTIBOOT_MEM_UPPER, 8     # KiB of RAM above 1 MiB
.equ RAM_END, 4 << 20
.equ UNUSED, RAM_END >> 1
.equ HOLE, 0xfec00000           # no RAM, but a device
.equ NETWORK_DEVICE, 1
.equ TRANSMIT_QUEUE, 1
.equ HIGH, 0xffffffff
.equ LAST_SECTOR, 4095
.equ LONG, 1 << 20              # bytes of a read that takes its time
.equ T_DISCARD, 11
.equ READY_STATUS, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
.equ ISR_CONFIG, 2
.equ GOOD, 0x444f4f47           # "GOOD"

.include "virtio_hostile_cases.inc"

.section .rodata
.macro ANSWER label, text
\label: .asciz "\text"
.endm
    ANSWER says_needs_reset, "needs reset"
    ANSWER says_untold, "needs reset, and does not tell"
    ANSWER says_not_latched, "needs reset, and goes on"
    ANSWER says_nothing, "no answer"
    ANSWER says_answered, "answered"
    ANSWER says_status, "status "
    ANSWER says_ignored, "ignored"
    ANSWER says_taken, "taken"
    ANSWER says_refused, "refused"
    ANSWER says_silence, "silence"
    ANSWER says_touched, "memory written afterwards"
    ANSWER says_failed, ", then FAILED\n"
    ANSWER says_good, ", then good\n"

.data
how: .long 0
patience: .long 500000          # looks at a register, each an exit; used up once there is little left
type: .long BLOCK_DEVICE
queue: .long 0
features: .long F_FLUSH | F_INDIRECT
device_writes: .long DESC_WRITE # flag of the request's second and third descriptor

.bss
    .balign 16
header: .skip 16
table: .skip 16 * 257           # an indirect table of the same
outer: .skip 16                 # and a table of that one
data: .skip 2 * SECTOR
status: .skip 4
status_at: .skip 4              # where the status is expected

START
    mov eax, [how]
    call next_number
    mov [how], eax
    mov ebx, [multiboot_info]
    cmp dword ptr [ebx + MULTIBOOT_MEM_UPPER], (RAM_END >> 10) - 1024
    mov al, 3
    jne exit
    mov eax, [type]
    call next_number
    mov [type], eax
    call find_device
    cmp dword ptr [type], BLOCK_DEVICE
    je 1f
    mov dword ptr [features], F_INDIRECT
    cmp dword ptr [type], NETWORK_DEVICE
    jne 1f
    mov dword ptr [device_writes], 0
    mov dword ptr [queue], TRANSMIT_QUEUE
    mov dword ptr [queue_registers + 4], TRANSMIT_QUEUE
1:  cmp dword ptr [how], 0
    jne no_end
    mov esi, offset cases
    call do_cases
    cmp dword ptr [type], BLOCK_DEVICE
    jne 2f
    mov esi, offset disk_cases
    call do_cases
2:  mov esi, offset register_cases
    call do_cases
    EXIT 0

# do_cases: do the cases at ESI, up to a zero, a line for each. Changes all but ESP.
do_cases:
1:  lodsd
    test eax, eax
    jz 3f
    call print_string
    PRINT ": "
    lodsd
    push eax
    call begin
    call build_request
    pop eax
    mov edi, [device]
    call eax                    # ESI: what it is given; returns with ESI at the next case, and what came of it in EAX
    call print_string
    cmp eax, offset says_status
    jne 2f
    mov eax, [status_at]
    movzx eax, byte ptr [eax]
    call print_decimal
2:  call work_again
    jmp 1b
3:  ret

# --- no end -----------------------------------------------------------------------------------------------------------
no_end:
    call break_queue
    PRINT "BROKEN\n"
    cmp dword ptr [how], 2
    je 2f
    ja 3f
1:  cli
    hlt
    jmp 1b
2:  call kick
    jmp 2b
3:  call break_queue
    jmp 3b

# break_queue: break the queue of the device, which is reset before, and wait until it says so. Changes EAX, EBX, ECX,
# EDX, EDI.
break_queue:
    call begin
    call build_request
    mov word ptr [available + 4], QUEUE_SIZE
    call ready
    call kick
    call outcome
    cmp eax, offset says_needs_reset
    mov al, 4
    jne exit
    ret

# --- how cases are done: the features are chosen, and a request is in the rings ---------------------------------------
bad_queue:
    push esi
    mov esi, offset queue_registers
    call write_registers
    pop esi
    call write_registers
    mov dword ptr [edi + QUEUE_READY], 1
    mov dword ptr [edi + STATUS], READY_STATUS
    call kick
    jmp outcome

bad_chain:
1:  lodsd
    cmp eax, -1
    je 2f
    mov edi, eax
    lodsd
    mov [edi], eax
    jmp 1b
2:  call ready
    call kick
    call outcome
    cmp eax, offset says_needs_reset
    jne 4f
    mov ecx, [patience]         # the driver was ready: it is told
3:  test dword ptr [edi + INTERRUPT_STATUS], ISR_CONFIG
    jnz 4f
    loop 3b
    call lose_patience
    mov eax, offset says_untold
4:  ret

status_cleared:
    call ready
    mov dword ptr [edi + STATUS], ACKNOWLEDGE
    jmp ignored_if_good

needs_reset_set:
    call ready
    mov dword ptr [edi + STATUS], READY_STATUS | NEEDS_RESET
    jmp ignored_if_good

not_offered:
    mov eax, [features]
    mov edx, F_VERSION_1 | 1 << 31
    jmp refused_if_zero

no_version:
    mov eax, [features]
    xor edx, edx
refused_if_zero:
    call negotiate
    mov eax, offset says_refused
    jz 1f
    mov eax, offset says_taken
1:  ret

late_features:                  # an indirect table shows what was taken
    mov eax, [features]
    and eax, ~F_INDIRECT
    mov edx, F_VERSION_1
    call negotiate
    mov dword ptr [edi + DRIVER_FEATURES_SEL], 0
    mov eax, [features]
    mov [edi + DRIVER_FEATURES], eax
    mov dword ptr [HEADER + ADDRESS], offset table
    mov dword ptr [HEADER + LENGTH], 48
    mov dword ptr [HEADER + FLAGS], DESC_INDIRECT
    call ready
    call kick
    call outcome
    cmp eax, offset says_needs_reset
    jmp ignored_if_equal

early_queue:
    mov dword ptr [edi + STATUS], 0
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER
    call half_ready
    cmp dword ptr [edi + QUEUE_READY], 0
    jmp ignored_if_equal

early_driver:
    mov dword ptr [edi + STATUS], 0
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER
    mov dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER | DRIVER_OK
    cmp dword ptr [edi + STATUS], ACKNOWLEDGE | DRIVER
    jmp ignored_if_equal

early_kick:
    call half_ready
    call kick
    call look_on
    cmp word ptr [used + 2], 0
    jne taken
    mov dword ptr [edi + STATUS], READY_STATUS
    jmp ignored_if_good

late_queue:
    call ready
    mov dword ptr [edi + QUEUE_NUM], 0
    mov dword ptr [edi + QUEUE_DESC], HOLE
    mov dword ptr [edi + QUEUE_DRIVER], HOLE
    mov dword ptr [edi + QUEUE_DEVICE + 4], HIGH
    mov dword ptr [edi + QUEUE_READY], 1
    cmp dword ptr [edi + QUEUE_READY], 1
    jne taken
    jmp ignored_if_good

no_queue:
    call ready
    mov dword ptr [edi + QUEUE_SEL], 99
    cmp dword ptr [edi + QUEUE_NUM_MAX], 0
    jne taken
    mov dword ptr [edi + QUEUE_NUM], QUEUE_SIZE
    mov dword ptr [edi + QUEUE_READY], 1
    cmp dword ptr [edi + QUEUE_READY], 0
    jne taken
    jmp ignored_if_good

stray_kicks:
    call ready
    .irp queue, 1, 7, 0xffff, 0x10000, HIGH
    mov dword ptr [edi + QUEUE_NOTIFY], \queue
    .endr
    jmp ignored_if_good

wrong_widths:
    call ready
    xor eax, eax
    mov [edi + STATUS], al
    mov [edi + STATUS], ax
    mov [edi + STATUS + 1], eax
    mov [edi + STATUS - 2], eax
    mov [edi + QUEUE_READY], al
    mov [edi + QUEUE_READY], ax
    mov [edi + QUEUE_NOTIFY], al
    mov [edi + QUEUE_NOTIFY], ax
    cmp byte ptr [edi], 0xff    # as where there is nothing
    jne taken
    cmp word ptr [edi + 2], 0xffff
    jne taken
    jmp ignored_if_good

reset_in_flight:
    mov edx, STATUS
    jmp stop_in_flight

disable_in_flight:
    mov edx, QUEUE_READY
stop_in_flight:                 # write zero to register EDX while the device works; then it may not
    mov ebp, 10
1:  push edx
    call begin
    call build_request
    pop edx
    cmp dword ptr [type], BLOCK_DEVICE
    jne 2f
    mov dword ptr [DATA + ADDRESS], UNUSED
    mov dword ptr [DATA + LENGTH], LONG
2:  mov word ptr [available + 2], QUEUE_SIZE    # all are head 0: the same, again and again
    call ready
    call kick
    mov dword ptr [edi + edx], 0
    mov ecx, [patience]
3:  cmp dword ptr [edi + edx], 0
    je 4f
    loop 3b
    call lose_patience
    jmp taken
4:  mov eax, 0x5555
    .irp place, used+2, data, status, UNUSED, UNUSED+LONG-2
    mov word ptr [\place], ax
    .endr
    call kick
    call look_on
    mov eax, offset says_touched
    .irp place, used+2, data, status, UNUSED, UNUSED+LONG-2
    cmp word ptr [\place], 0x5555
    jne 5f
    .endr
    dec ebp
    jnz 1b
    mov eax, offset says_silence
5:  ret

# ignored_if_good: "ignored" if the device is as ready as before and does the request; else "taken". Changes ECX, EDI.
ignored_if_good:
    cmp dword ptr [edi + STATUS], READY_STATUS
    jne taken
    call kick
    call outcome
    call is_good
ignored_if_equal:
    mov eax, offset says_ignored
    je 1f
taken:
    mov eax, offset says_taken
1:  ret

# --- the driver -------------------------------------------------------------------------------------------------------

# begin: reset the device and choose features. Changes EAX, EDX, EDI.
begin:
    mov eax, [features]
    mov edx, F_VERSION_1
    call negotiate
    mov al, 2
    jz exit
    ret

# half_ready: set the queue up. Changes EAX, ECX, EDI.
half_ready:
    push esi
    mov esi, offset queue_registers
    call write_registers
    mov dword ptr [edi + QUEUE_READY], 1
    pop esi
    ret

# ready: set the queue up, then be ready. Changes EAX, ECX, EDI.
ready:
    call half_ready
    mov dword ptr [edi + STATUS], READY_STATUS
    ret

# build_request: in empty rings make a request available, three descriptors, and the same in `table`. It is a read of
# sector 1; an entropy source fills the last two, and for a network all are a frame. Changes EAX, EBX, ECX, EDX, EDI.
build_request:
    call empty_rings
    mov dword ptr [header], T_IN
    mov dword ptr [header + 8], 1
    mov dword ptr [header + 12], 0
    mov dword ptr [status], 0xff
    mov dword ptr [status_at], offset status
    mov dword ptr [data], 0
    xor ebx, ebx
    mov eax, offset header
    mov ecx, 16
    mov edx, DESC_NEXT | 1 << NEXT_IS
    call describe
    inc ebx
    mov eax, offset data
    mov ecx, SECTOR
    mov edx, DESC_NEXT | 2 << NEXT_IS
    or edx, [device_writes]
    call describe
    inc ebx
    mov eax, offset status
    mov ecx, 1
    mov edx, [device_writes]
    call describe
    push esi
    mov esi, offset descriptors
    mov edi, offset table
    mov ecx, 3 * 16 / 4
    rep movsd
    pop esi
    xor ebx, ebx
    jmp offer

# kick: tell the device to look. Changes EDI.
kick:
    push eax
    mov edi, [device]
    mov eax, [queue]
    mov [edi + QUEUE_NOTIFY], eax
    pop eax
    ret

# look_on: give the device time to do what it should not. Changes ECX.
look_on:
    mov ecx, 50
1:  test dword ptr [edi + STATUS], 0
    loop 1b
    ret

lose_patience:
    mov dword ptr [patience], 20000
    ret

# outcome: wait for what comes of a request, and return it in EAX. If it is "needs reset" make a good one and kick: it
# must not be answered. Changes ECX, EDI.
outcome:
    mov edi, [device]
    mov ecx, [patience]
1:  cmp word ptr [used + 2], 0
    jne 5f
    test dword ptr [edi + STATUS], NEEDS_RESET
    jnz 2f
    loop 1b
    call lose_patience
    mov eax, offset says_nothing
    ret
2:  pushad
    call build_request
    mov ecx, 16
3:  call kick
    loop 3b
    call look_on
    popad
    mov eax, offset says_not_latched
    cmp word ptr [used + 2], 0
    jne 4f
    test dword ptr [edi + STATUS], NEEDS_RESET
    jz 4f
    mov eax, offset says_needs_reset
4:  ret
5:  mov eax, offset says_status
    cmp dword ptr [type], BLOCK_DEVICE
    je 4b
    mov eax, offset says_answered
    ret

# is_good: set the zero flag if EAX, what `outcome` has returned, is that of a request that was done. Changes nothing.
is_good:
    cmp eax, offset says_answered
    je 1f
    cmp eax, offset says_status
    jne 1f
    cmp byte ptr [status], 0
    jne 1f
    cmp dword ptr [data], GOOD
    jne 1f
    cmp dword ptr [used + 8], SECTOR + 1
1:  ret

# work_again: reset the device, and end the run with status 4 if a good request fails then. Changes all but ESI, ESP.
work_again:
    call begin
    call build_request
    call ready
    call kick
    call outcome
    call is_good
    jne 1f
    mov eax, offset says_good
    jmp print_string
1:  mov eax, offset says_failed
    call print_string
    EXIT 4

# print_string: write the text at EAX, up to a zero. Changes nothing.
print_string:
    pushad
    mov esi, eax
    xor ecx, ecx
1:  cmp byte ptr [esi + ecx], 0
    je 2f
    inc ecx
    jmp 1b
2:  call print
    popad
    ret
