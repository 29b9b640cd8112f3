# summary: starts all processors, counts them and exits with how many answered
# build: multiboot
#
# Three ways to know how many there are must agree: the number in fw_cfg, the processor entries of the MP table (MP 1.4,
# chapter 4), and who answers when called.
.include "multiboot.inc"
.include "console.inc"
.include "tables.inc"
.include "apic.inc"
.include "processors.inc"

.equ MP_POINTER_SIGNATURE, 0x5f504d5f   # "_MP_", on a 16-byte boundary
.equ MP_POINTER_TABLE, 4                # offset of the address of the table
.equ MP_TABLE_SIGNATURE, 0x504d4350     # "PCMP"
.equ MP_TABLE_ENTRIES, 34               # offset of the number of entries, 16 bits
.equ MP_TABLE_FIRST, 44                 # offset of the first entry
.equ MP_PROCESSOR_SIZE, 20              # bytes of an entry of type 0; all others have 8
.equ MP_OTHER_SIZE, 8
.equ MP_PROCESSOR_FLAGS, 3              # offset; bit 0 says usable

.data
answered: .long 1                       # this processor is here

START
    call load_tables
    call start_apic
    call fw_cfg_cpus
    mov edi, eax
    call print_decimal
    PRINT " by fw_cfg, "
    call mp_table_cpus
    call print_decimal
    PRINT " in the MP table, "
    cmp edi, 0xffff                     # no fw_cfg: believe the table
    jne 1f
    mov edi, eax
1:  push edi
    call start_aps
    pop edi
    mov esi, offset answered
    call wait_for
    mov eax, [answered]
    call print_decimal
    PRINT " answered\n"
    jmp exit

# Every application processor arrives here.
ap_main:
    lock inc dword ptr [answered]       # `lock`: they come at once, and none may be lost
1:  hlt
    jmp 1b

# mp_table_cpus: return in EAX how many usable processors the MP table lists; 0 without a table. Changes ECX, ESI.
mp_table_cpus:
    mov esi, 0x9fc00                    # the table's pointer is in the last KiB of conventional memory,
1:  cmp dword ptr [esi], MP_POINTER_SIGNATURE
    je 2f
    add esi, 16
    cmp esi, 0xa0000
    jb 1b
    cmp esi, 0xf0000                    # or in the BIOS's 64 KiB
    jae 9f
    mov esi, 0xf0000
9:  cmp esi, 0x100000
    jb 1b
    xor eax, eax
    ret
2:  mov esi, [esi + MP_POINTER_TABLE]
    xor eax, eax
    cmp dword ptr [esi], MP_TABLE_SIGNATURE
    jne 5f
    movzx ecx, word ptr [esi + MP_TABLE_ENTRIES]
    add esi, MP_TABLE_FIRST
3:  cmp byte ptr [esi], 0
    jne 4f
    test byte ptr [esi + MP_PROCESSOR_FLAGS], 1
    setnz dl
    movzx edx, dl
    add eax, edx
    add esi, MP_PROCESSOR_SIZE - MP_OTHER_SIZE
4:  add esi, MP_OTHER_SIZE
    loop 3b
5:  ret
