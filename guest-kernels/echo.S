# summary: echoes what is typed at the console, by the UART's interrupt; ends at a "q"
# build: multiboot
#
# The UART raises IRQ 4 when a byte has come in; the handler takes all there are. Between bytes the CPU sleeps.
.include "multiboot.inc"
.include "console.inc"
.include "tables.inc"
.include "legacy_irq.inc"

.equ RECEIVED_DATA_INTERRUPT, 0x01      # IER
.equ FIFO_ENABLE_AND_CLEAR, 0x07        # FCR
.equ LINE_8N1, 0x03                     # LCR
.equ DTR_RTS_OUT2, 0x0b                 # MCR; OUT2 is what connects a PC's UART to its interrupt line

START
    call load_tables
    call start_pic
    GATE IRQ_BASE + 4, received
    mov dx, COM1_LCR
    mov al, LINE_8N1
    out dx, al
    mov dx, COM1_FCR
    mov al, FIFO_ENABLE_AND_CLEAR
    out dx, al
    mov dx, COM1_MCR
    mov al, DTR_RTS_OUT2
    out dx, al
    mov dx, COM1_IER
    mov al, RECEIVED_DATA_INTERRUPT
    out dx, al
    UNMASK 4
    PRINT "type, q ends\n"
1:  sti
    hlt
    jmp 1b

received:
    push eax
    push edx
1:  mov dx, COM1_LSR
    in al, dx
    test al, LSR_DATA_READY
    jz 2f
    mov dx, COM1
    in al, dx
    out dx, al
    cmp al, 'q'
    jne 1b
    EXIT 0
2:  mov al, PIC_EOI
    out PIC1_COMMAND, al
    pop edx
    pop eax
    INTERRUPT_RETURN
