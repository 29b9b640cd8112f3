# summary: tries to break the VMM: wild ports, wild addresses, odd widths (number: stride above port 0x1000, default 1)
# build: multiboot
#
# Whatever it does, the machine has to answer something and go on. It avoids only what ends a run by design: the reset
# and power-off registers and the debug exit. At the end it says OK, with status 0. A letter on the debug console tells
# which part it is in.
.include "multiboot.inc"
.include "console.inc"
.include "arguments.inc"
.include "tables.inc"
.include "long_mode.inc"

.equ PATTERN, 0xa5a5a5a5
.equ CROWDED_PORTS, 0x1000      # below: every port; from there on: one in `stride`
.equ NOBODY_PORT, 0x6000
.equ NOBODY_MMIO, 0xe0000000
.equ PAGE_SIZE, 4096
.equ MUCH, 65536
.equ CPUID_ADDRESS_SIZES, 0x80000008
.equ CR4_OSFXSR, 1 << 9

.section .rodata
ending_ports:                   # first and last port of each range that ends the run when written to
    .word I8042_COMMAND, I8042_COMMAND
    .word DEBUG_EXIT, DEBUG_EXIT + 3
    .word PM1_CONTROL, PM1_CONTROL + 1
    .word RESET_CONTROL, RESET_CONTROL
ending_ports_end:

wild_addresses:
    .long 0xc0000000, 0xc0000001, 0xcffffffd
    .long TEST_MMIO - 3, TEST_MMIO - 1                                  # into a device from outside
    .long TEST_MMIO, TEST_MMIO + 1, TEST_MMIO + 3, TEST_MMIO + 0x7ff
    .long TEST_MMIO + PAGE_SIZE - 4, TEST_MMIO + PAGE_SIZE - 3, TEST_MMIO + PAGE_SIZE - 1   # and out at its end
    .long NOBODY_MMIO + 0xffd, 0xfe000000, 0xfed00000, 0xfffffffc
wild_addresses_end:

.data
stride: .long 1

.bss
    .balign 4096
scratch: .skip MUCH

START
    mov eax, [stride]
    call next_number
    mov [stride], eax
    call load_tables

    MARK 'p'
    call sweep_ports
    MARK 'm'
    call sweep_mmio
    MARK 'i'
    call probe_interrupt_controllers
    MARK 's'
    call wild_strings
    MARK 'o'
    call odd_instructions
    MARK 'h'
    jmp high_addresses

# sweep_ports: write and read at every port, 1, 2 and 4 bytes at a time, so across the borders of every device.
sweep_ports:
    xor edx, edx
1:  mov ebx, 1                  # width
2:  call ends_the_run
    jc 6f
    mov eax, PATTERN
    cmp ebx, 2
    je 4f
    ja 5f
    out dx, al
    in al, dx
    jmp 6f
4:  out dx, ax
    in ax, dx
    jmp 6f
5:  out dx, eax
    in eax, dx
6:  shl ebx, 1
    cmp ebx, 4
    jbe 2b
    inc edx
    cmp edx, CROWDED_PORTS
    jbe 1b
    add edx, [stride]
    dec edx
    cmp edx, 0xffff
    jbe 1b
    ret

# ends_the_run: set the carry flag if EBX bytes at port EDX touch a port that ends the run. Changes EAX, ESI.
ends_the_run:
    cmp edx, CROWDED_PORTS
    jae 3f                      # none there
    mov esi, offset ending_ports
1:  movzx eax, word ptr [esi]
    sub eax, ebx
    cmp edx, eax                # all of it below the range?
    jle 2f
    cmp dx, [esi + 2]           # or above?
    ja 2f
    stc
    ret
2:  add esi, 4
    cmp esi, offset ending_ports_end
    jb 1b
3:  clc
    ret

# sweep_mmio: read and write at each wild address, 1, 2 and 4 bytes at a time.
sweep_mmio:
    mov esi, offset wild_addresses
1:  mov ebx, [esi]
    mov al, [ebx]
    mov [ebx], al
    mov ax, [ebx]
    mov [ebx], ax
    mov eax, [ebx]
    mov [ebx], eax
    add esi, 4
    cmp esi, offset wild_addresses_end
    jb 1b
    ret

# probe_interrupt_controllers: they live in KVM, not in the VMM, but behind the same kind of address. Reads only, and
# writes to read-only registers: these devices can stop this processor for good, and may.
probe_interrupt_controllers:
    mov al, [LAPIC + 0x21]
    mov ax, [LAPIC + 0x32]
    mov eax, [LAPIC + 0x3f4]
    mov eax, [LAPIC + 0xffc]
    mov word ptr [LAPIC + 0x31], 0x5a
    mov eax, [LAPIC + 0xffe]    # out at the end
    mov al, [IOAPIC + 3]
    mov ax, [IOAPIC + 0x11]
    mov eax, [IOAPIC + 0xffe]
    mov byte ptr [IOAPIC], 0xff # selects a register that is not there
    mov eax, [IOAPIC + 0x10]
    ret

# wild_strings: string instructions with large counts, and with devices at both ends.
wild_strings:
    mov dx, NOBODY_PORT
    mov esi, 0x100000           # ourselves
    mov ecx, MUCH
    rep outsb
    mov edi, offset scratch + 1 # not aligned, and beyond the end by one
    mov ecx, MUCH / 4 - 1
    rep insd
    mov esi, TEST_MMIO + PAGE_SIZE - 16
    mov ecx, 32
    rep outsb                   # from MMIO to a port, and across the device's end
    mov edi, TEST_MMIO + PAGE_SIZE - 16
    mov ecx, 32
    rep insb                    # and back
    mov esi, TEST_MMIO + 1
    mov edi, NOBODY_MMIO + 3
    mov ecx, 17
    rep movsd                   # from one device to another, not aligned
    mov edi, TEST_MMIO + 6
    mov ecx, 64
    std
    rep stosw                   # downwards, out of the device
    cld
    ret

# odd_instructions: what else touches memory: read-modify-write, locked, a stack.
odd_instructions:
    mov ebx, TEST_MMIO + PAGE_SIZE - 8
    mov eax, PATTERN
    inc byte ptr [ebx]
    add [ebx], eax
    xchg [ebx], ax
    lock xadd [ebx], eax
    lock cmpxchg [ebx], ecx
    lock cmpxchg8b [ebx]
    bts dword ptr [ebx], 5
    not word ptr [ebx + 7]      # across the device's end
    push dword ptr [ebx]
    pop dword ptr [ebx]
    mov ebp, esp
    mov esp, TEST_MMIO + 0x802  # a stack in a device
    push eax                    # no call: nothing that is popped there can be trusted
    push cx
    pop cx
    pop eax
    mov esp, ebp
    ret

# high_addresses: above 4 GiB, up to the last byte that the processor can name. One page is enough: it moves.
high_addresses:
    mov eax, CPUID_ADDRESS_SIZES
    cpuid
    movzx ebp, al               # bits of a physical address
    ENTER_LONG_MODE
    mov rax, cr4
    or eax, CR4_OSFXSR          # allows SSE
    mov cr4, rax
    mov ebx, 0x40000000         # the virtual address that moves; what was there is not RAM that we use
    lea ecx, [ebp - 1]
    mov eax, 1                  # 4 GiB shifted left: 4 GiB, 8 GiB, ... half of the address space
    shl rax, 32
    sub ecx, 32
1:  call poke_high
    shl rax, 1
    loop 1b
    mov eax, 1                  # the last 2 MiB
    mov ecx, ebp
    shl rax, cl
    sub rax, LARGE_PAGE
    call poke_high
    jmp finish

# poke_high: map the 2 MiB at physical address RAX at RBX, and read and write at both ends, 8 and 16 bytes at a time.
poke_high:
    lea rdx, [rax + PAGE_TABLE + PAGE_LARGE]
    mov [rip + page_directories + 8 * (0x40000000 / LARGE_PAGE)], rdx
    invlpg [rbx]
    mov rdx, [rbx]
    mov [rbx + 3], rdx
    mov rdx, [rbx + PAGE_SIZE - 5]      # across a page's end
    movups xmm0, [rbx + 1]
    movups [rbx + LARGE_PAGE - 16], xmm0
    mov [rbx + LARGE_PAGE - 8], rdx
    ret

# The UART is in whatever state the sweep left it: as a driver does, set it up before using it.
finish:
    mov dx, COM1_LCR
    mov al, 0x03                # 8 data bits, and the divisor latch out of the way
    out dx, al
    mov dx, COM1_IER
    mov al, 0
    out dx, al
    mov dx, COM1_FCR
    mov al, 0x07                # FIFOs on and empty
    out dx, al
    mov dx, COM1_MCR
    mov al, 0x03                # DTR, RTS, no loopback
    out dx, al
    PRINT64 "\nOK\n"
    EXIT 0
