# summary: leaves the guest once in every way that port I/O and MMIO have, and sleeps once
# build: multiboot
#
# Before each step its letter goes to the debug console. Reads are written back where the step says, so that a device
# sees that its answer arrived.
#
#   a b c   out of 1, 2, 4 bytes to TEST_PORT
#   d e f   in of 1, 2, 4 bytes from TEST_PORT, written back there
#   g h     rep outsb of "string", then rep insb of 4 bytes, written back by rep outsb
#   i       hlt, woken by a timer interrupt
#   j k l m MMIO writes of 1, 2, 4, 8 bytes to TEST_MMIO + 0x00, 0x10, 0x20, 0x40
#   n o p q MMIO reads of 1, 2, 4, 8 bytes there, written back 0x100 higher
#   r       cpuid and rdmsr, which KVM answers without asking anybody
#
# The ways that end a guest are guests of their own: exit-code, reset-cf9, acpi-poweroff, triple-fault, internal-error.
.include "multiboot.inc"
.include "tables.inc"
.include "legacy_irq.inc"
.include "long_mode.inc"

.equ MSR_APIC_BASE, 0x1b

.section .rodata
string: .ascii "string"
string_end:

.data
answer: .skip 4
ticked: .byte 0

START
    call load_tables
    call start_pic
    GATE IRQ_BASE, tick

    MARK 'a'
    mov dx, TEST_PORT
    mov al, 0x11
    out dx, al
    MARK 'b'
    mov ax, 0x2222
    out dx, ax
    MARK 'c'
    mov eax, 0x44444444
    out dx, eax
    MARK 'd'
    in al, dx
    out dx, al
    MARK 'e'
    in ax, dx
    out dx, ax
    MARK 'f'
    in eax, dx
    out dx, eax

    MARK 'g'
    mov esi, offset string
    mov ecx, offset string_end - string
    rep outsb
    MARK 'h'
    mov edi, offset answer
    mov ecx, 4
    rep insb
    mov esi, offset answer
    mov ecx, 4
    rep outsb

    MARK 'i'
    call start_pit
    UNMASK 0
1:  sti
    hlt
    cli
    cmp byte ptr [ticked], 0
    je 1b

    ENTER_LONG_MODE
    mov ebx, TEST_MMIO
    MARK 'j'
    mov byte ptr [rbx], 0x11
    MARK 'k'
    mov word ptr [rbx + 0x10], 0x2222
    MARK 'l'
    mov dword ptr [rbx + 0x20], 0x44444444
    MARK 'm'
    movabs rcx, 0x8888888888888888
    mov [rbx + 0x40], rcx
    MARK 'n'
    mov cl, [rbx]
    mov [rbx + 0x100], cl
    MARK 'o'
    mov cx, [rbx + 0x10]
    mov [rbx + 0x110], cx
    MARK 'p'
    mov ecx, [rbx + 0x20]
    mov [rbx + 0x120], ecx
    MARK 'q'
    mov rcx, [rbx + 0x40]
    mov [rbx + 0x140], rcx
    MARK 'r'
    xor eax, eax
    cpuid
    mov ecx, MSR_APIC_BASE
    rdmsr
    EXIT 0

    .code32
tick:
    mov byte ptr [ticked], 1
    push eax
    mov al, 0xff                # once is enough
    out PIC1_DATA, al
    mov al, PIC_EOI
    out PIC1_COMMAND, al
    pop eax
    INTERRUPT_RETURN
