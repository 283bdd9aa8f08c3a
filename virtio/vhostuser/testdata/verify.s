# A boot sector that writes and reads back for a while: 4 KiB each time, to one
# of 64 places, with contents that depend on the round. Built with
#   as --32 -o verify.o verify.s && objcopy -O binary -j .text verify.o verify.bin
.code16
.set BASE, 0x7c00
.set ROUNDS, 3000
start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7c00,%sp
  sti
  movb %dl,drive+BASE
  movw $(begin+BASE),%si
  call print
  movw $0,round+BASE
loop:
  # fill 0x8000..0x8fff with round*2+1+i
  movw round+BASE,%ax
  shlw $1,%ax
  incw %ax
  movw $0x8000,%di
  movw $2048,%cx
1: stosw
  incw %ax
  loop 1b
  # place = 64 + (round % 64) * 8
  movw round+BASE,%ax
  andw $63,%ax
  shlw $3,%ax
  addw $64,%ax
  movw %ax,dap+8+BASE
  movw $0x8000,dap+4+BASE
  movw $(dap+BASE),%si
  movb drive+BASE,%dl
  movw $0x4300,%ax
  int $0x13
  jc fail
  # read back to 0x9000
  movw $0x9000,dap+4+BASE
  movw $(dap+BASE),%si
  movb drive+BASE,%dl
  movb $0x42,%ah
  int $0x13
  jc fail
  movw $0x8000,%si
  movw $0x9000,%di
  movw $2048,%cx
  repe cmpsw
  jne wrong
  incw round+BASE
  cmpw $ROUNDS,round+BASE
  jne loop
  movw $(okmsg+BASE),%si
  jmp end
wrong:
  movw $(wrongmsg+BASE),%si
  jmp end
fail:
  movw $(failmsg+BASE),%si
end:
  call print
  movb $0x10,%al
  outb %al,$0xf4
halt:
  hlt
  jmp halt
print:
  lodsb
  testb %al,%al
  jz 2f
  movw $0x3f8,%dx
  outb %al,%dx
  jmp print
2: ret
dap:
  .byte 16,0
  .word 8
  .word 0,0
  .quad 0
begin: .asciz "begin\r\n"
okmsg: .asciz "verify ok\r\n"
wrongmsg: .asciz "wrong data\r\n"
failmsg: .asciz "I/O error\r\n"
drive: .byte 0
round: .word 0
