# The guest of TestVirtioBareMetal: an interpreter of a list of memory accesses
# and waits, 16 bytes each (address 8, value 4, operation 4), which the test
# writes behind it. Entered in 64-bit mode at 0x100000 with the first 4 GiB
# mapped. To get the bytes for the test:
#   as -o rings.o rings.s && objcopy -O binary rings.o /dev/stdout | xxd -p
	.code64
	.org 0
start:	mov	$0x180000, %esp
	lidt	0x1000e0
	mov	$0x101000, %esi
next:	mov	(%rsi), %rdi
	mov	8(%rsi), %eax
	mov	12(%rsi), %ecx
	add	$16, %rsi
	cmp	$1, %ecx		# write 1, 2 or 4 bytes
	je	w8
	cmp	$2, %ecx
	je	w16
	cmp	$4, %ecx
	je	w32
	cmp	$5, %ecx		# wait until 2 bytes have the value
	je	wait
	cmp	$6, %ecx		# wait for an interrupt
	je	irq
	mov	%edi, %edx		# write a byte to a port
	out	%al, %dx
	jmp	next
w8:	mov	%al, (%rdi)
	jmp	next
w16:	mov	%ax, (%rdi)
	jmp	next
w32:	mov	%eax, (%rdi)
	jmp	next
wait:	cmp	%ax, (%rdi)
	jne	wait
	jmp	next
irq:	sti
	hlt
	jmp	irq
# Interrupt handlers count and go on with the list instead of returning: some
# KVMs do not know iretq.
	.org 0x80
	incl	0x1ff000
	jmp	common
	.org 0xa0
	incl	0x1ff004
common:	mov	$0xfee000b0, %edi	# end of interrupt
	movl	$0, (%rdi)
	mov	$0x180000, %esp
	jmp	next
	.org 0xe0
	.word	0x7ff			# the interrupt table's limit and address
	.quad	0x100800
