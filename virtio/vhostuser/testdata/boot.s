# The boot sector of TestQEMUBoots. Built with
#   as --32 -o boot.o boot.s && objcopy -O binary -j .text boot.o boot.bin
.code16
start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7c00,%sp
  sti
  movb %dl,drive+0x7c00
  # read LBA 1.. count 8 to 0x0000:0x8000
  movw $(dap+0x7c00),%si
  movb $0x42,%ah
  int $0x13
  jc fail
  # invert all bytes of 4096
  movw $0x8000,%di
  movw $4096,%cx
1: notb (%di)
  incw %di
  loop 1b
  # write to LBA 16
  movw $16,dap+8+0x7c00
  movw $(dap+0x7c00),%si
  movb drive+0x7c00,%dl
  movw $0x4300,%ax
  int $0x13
  jc fail
  movw $(okmsg+0x7c00),%si
  jmp print
fail:
  movw $(badmsg+0x7c00),%si
print:
  lodsb
  testb %al,%al
  jz done
  movw $0x3f8,%dx
  outb %al,%dx
  jmp print
done:
  movb $0x10,%al
  outb %al,$0xf4
halt:
  hlt
  jmp halt
dap:
  .byte 16,0
  .word 8
  .word 0x8000,0
  .quad 1
okmsg: .asciz "moovm: boot ok\r\n"
badmsg: .asciz "moovm: boot failed\r\n"
drive: .byte 0
