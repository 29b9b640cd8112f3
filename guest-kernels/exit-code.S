# summary: exits with the status that the command line names (default 42)
# build: multiboot
.include "multiboot.inc"
.include "arguments.inc"

START
    mov eax, 42
    call next_number
    jmp exit
