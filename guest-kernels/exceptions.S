# summary: raises CPU exceptions in long mode, handles each, and goes on
# build: multiboot
#
# None of them leaves the guest: the CPU enters the guest's own handler through the IDT. Status 0 when each came once
# and each handler could mend what was wrong; otherwise 100 + the number of the exception that failed.
.include "multiboot.inc"
.include "tables.inc"
.include "long_mode.inc"

.equ DIVIDE_ERROR, 0            # vectors (Intel SDM volume 3, Interrupt and Exception Handling)
.equ INVALID_OPCODE, 6
.equ GENERAL_PROTECTION, 13
.equ PAGE_FAULT, 14

.equ LOST_PAGE, 0x600000        # this 2 MiB page is taken out of the page tables

.data
    .balign 8
seen: .quad 0                   # bit n: exception n came
fault_address: .quad 0

START
    call load_tables
    GATE64 DIVIDE_ERROR, divide_error
    GATE64 INVALID_OPCODE, invalid_opcode
    GATE64 GENERAL_PROTECTION, general_protection
    GATE64 PAGE_FAULT, page_fault
    ENTER_LONG_MODE

    xor edx, edx
    mov eax, 100
    xor ecx, ecx
    div ecx                     # by zero; the handler makes it 4 and tries again
    cmp eax, 25
    mov al, 100 + DIVIDE_ERROR
    jne exit

    ud2                         # the handler steps over it

    movabs rax, 0x8000000000000000
    mov rax, [rax]              # no canonical address: the handler steps over it

    and dword ptr [rip + page_directories + 8 * (LOST_PAGE / LARGE_PAGE)], ~PAGE_PRESENT
    mov ebx, LOST_PAGE + 0x123
    invlpg [rbx]
    mov byte ptr [rbx], 0x5a    # not mapped: the handler maps it, and the instruction is run again
    mov al, 100 + PAGE_FAULT
    cmp byte ptr [rbx], 0x5a
    jne exit
    cmp [rip + fault_address], rbx
    jne exit

    .irp vector, DIVIDE_ERROR, INVALID_OPCODE, GENERAL_PROTECTION, PAGE_FAULT
    mov al, 100 + \vector
    bt dword ptr [rip + seen], \vector
    jnc exit
    .endr
    PRINT64 "divide error, invalid opcode, general protection, page fault: all handled\n"
    EXIT 0

# The stack of a handler: RIP, CS, RFLAGS, RSP, SS; below them an error code, where the exception has one.
divide_error:
    or dword ptr [rip + seen], 1 << DIVIDE_ERROR
    mov ecx, 4
    iretq

invalid_opcode:
    or dword ptr [rip + seen], 1 << INVALID_OPCODE
    add qword ptr [rsp], 2      # ud2 is two bytes long
    iretq

general_protection:
    or dword ptr [rip + seen], 1 << GENERAL_PROTECTION
    add rsp, 8                  # the error code
    add qword ptr [rsp], 3      # mov rax, [rax] is three
    iretq

page_fault:
    or dword ptr [rip + seen], 1 << PAGE_FAULT
    push rax
    mov rax, cr2                # the address that was used
    mov [rip + fault_address], rax
    or dword ptr [rip + page_directories + 8 * (LOST_PAGE / LARGE_PAGE)], PAGE_PRESENT
    pop rax
    add rsp, 8                  # the error code
    iretq
