# summary: prints what the multiboot loader handed over: command line, memory, modules
# build: multiboot
#
# Multiboot 0.6.96, section 3.3. The first word of the information says which of the other fields hold anything.
.include "multiboot.inc"
.include "console.inc"

.equ HAS_MEMORY, 1 << 0
.equ HAS_CMDLINE, 1 << 2
.equ HAS_MODULES, 1 << 3
.equ HAS_MEMORY_MAP, 1 << 6

.equ INFO_MEM_LOWER, 4          # KiB below 1 MiB
.equ INFO_MEM_UPPER, 8          # KiB above 1 MiB, up to the first hole
.equ INFO_CMDLINE, 16
.equ INFO_MODULES_COUNT, 20
.equ INFO_MODULES, 24
.equ INFO_MAP_LENGTH, 44        # bytes
.equ INFO_MAP, 48

.equ MODULE_START, 0
.equ MODULE_END, 4              # one past the last byte
.equ MODULE_STRING, 8
.equ MODULE_SIZE, 16

.equ MAP_SIZE, 0                # of the entry, not counting this word
.equ MAP_BASE, 4
.equ MAP_LENGTH, 12
.equ MAP_TYPE, 20               # 1 is RAM

START
    test dword ptr [ebx], HAS_CMDLINE
    jz 1f
    PRINT "command line: "
    mov esi, [ebx + INFO_CMDLINE]
    call print_line

1:  test dword ptr [ebx], HAS_MEMORY
    jz 2f
    PRINT "memory: "
    mov eax, [ebx + INFO_MEM_LOWER]
    call print_decimal
    PRINT " KiB low, "
    mov eax, [ebx + INFO_MEM_UPPER]
    call print_decimal
    PRINT " KiB high\n"

2:  test dword ptr [ebx], HAS_MEMORY_MAP
    jz 4f
    mov edi, [ebx + INFO_MAP]
    mov ebp, edi
    add ebp, [ebx + INFO_MAP_LENGTH]
3:  cmp edi, ebp
    jae 4f
    PRINT "map: "
    lea esi, [edi + MAP_BASE]
    call print_hex64
    PRINT " + "
    lea esi, [edi + MAP_LENGTH]
    call print_hex64
    PRINT " type "
    mov eax, [edi + MAP_TYPE]
    call print_decimal
    PRINT "\n"
    add edi, [edi + MAP_SIZE]
    add edi, 4
    jmp 3b

4:  test dword ptr [ebx], HAS_MODULES
    jz 6f
    mov ebp, [ebx + INFO_MODULES_COUNT]
    mov edi, [ebx + INFO_MODULES]
5:  sub ebp, 1
    jc 6f
    PRINT "module: "
    mov eax, [edi + MODULE_END]
    sub eax, [edi + MODULE_START]
    call print_decimal
    PRINT " bytes, sum "
    call sum_module
    call print_decimal
    PRINT ", string: "
    mov esi, [edi + MODULE_STRING]
    call print_line
    add edi, MODULE_SIZE
    jmp 5b
6:  EXIT 0

# print_line: write the zero-terminated string at ESI and a newline; a null pointer is an empty string. Changes AL,
# ECX, ESI.
print_line:
    xor ecx, ecx
    test esi, esi
    jz 2f
1:  cmp byte ptr [esi + ecx], 0
    je 2f
    inc ecx
    jmp 1b
2:  call print
    PRINT "\n"
    ret

# print_hex64: write the 64-bit number at ESI in hexadecimal, all 16 digits. Changes EAX.
print_hex64:
    PRINT "0x"
    mov eax, [esi + 4]
    call 1f
    mov eax, [esi]
1:  pushad                      # eight digits: EAX turns, so that the next one is in its low four bits
    mov ecx, 8
    mov dx, COM1
2:  rol eax, 4
    push eax
    and al, 0xf
    add al, '0'
    cmp al, '9'
    jbe 3f
    add al, 'a' - '0' - 10
3:  out dx, al
    pop eax
    loop 2b
    popad
    ret

# sum_module: return in EAX the sum of the bytes of the module at EDI. Changes ECX, EDX.
sum_module:
    xor eax, eax
    mov ecx, [edi + MODULE_START]
1:  cmp ecx, [edi + MODULE_END]
    jae 2f
    movzx edx, byte ptr [ecx]
    add eax, edx
    inc ecx
    jmp 1b
2:  ret
