package vmm

// The guest-physical address map:
//
//	0x0000_0500  GDT of the 64-bit boot protocol
//	0x0000_6000  start information of the PVH protocol
//	0x0000_7000  zero page (struct boot_params)
//	0x0000_9000  page tables, identity for the first 4 GiB (6 pages)
//	0x0002_0000  kernel command line (64 KiB)
//	0x0009_fc00  end of usable low memory
//	0x000e_0000  ACPI tables, RSDP first
//	0x000f_f000  the machine's generation (VMGenID): 16 bytes
//	0x000f_fff0  the reset vector: a few bytes that reset the machine
//	0x0010_0000  RAM again: kernel where its ELF headers say, initrd at the end
//	0xc000_0000  the hole: PCI memory window
//	0xe000_0000  PCI configuration space (ECAM, bus 0)
//	0xfe00_0000  windows of virtio-mmio devices, 4 KiB each
//	0xfec0_0000  IOAPIC
//	0xfee0_0000  local APICs and message-signalled interrupts
//	0xfeff_c000  pages KVM wants for itself (identity map, TSS)
//	0x1_0000_0000  RAM that did not fit below the hole
const (
	addrGDT         = 0x500
	addrPVH         = 0x6000
	addrZeroPage    = 0x7000
	addrPageTables  = 0x9000
	addrCmdline     = 0x20000
	maxCmdline      = 0x10000 // with its NUL
	addrLowEnd      = 0x9fc00
	addrACPI        = 0xe0000
	sizeACPI        = 0x1f000
	addrGeneration  = GenerationAddress
	addrResetVector = 0xffff0
	addrHigh        = 0x100000

	addrHole      = 0xc000_0000
	addrPCIWindow = addrHole
	sizePCIWindow = 0x2000_0000
	addrECAM      = 0xe000_0000
	sizeECAM      = 0x10_0000 // bus 0
	addrWindows   = 0xfe00_0000
	addrIOAPIC    = 0xfec0_0000
	addrLAPIC     = 0xfee0_0000
	addrIdentity  = 0xfeff_c000
	addrTSS       = 0xfeff_d000
	addrAbove4G   = 0x1_0000_0000

	pageSize  = 4096
	minMemory = 2 << 20
	// maxMemory keeps guest addresses within 40 bits, what the least of
	// today's processors have.
	maxMemory = 512 << 30
)

// I/O ports and interrupts.
const (
	portCOM2       = 0x2f8
	portCOM1       = 0x3f8
	portCMOS       = 0x70
	portKeyboard   = 0x60
	portKeyboardSt = 0x64
	portSleep      = 0x600 // ACPI sleep control register
	portSleepSt    = 0x601 // ACPI sleep status register
	portPanic      = 0x505
	portPCIAddr    = 0xcf8
	portReset      = 0xcf9 // lies within the address register's four ports
	portPCIData    = 0xcfc

	irqCOM2  = 3
	irqCOM1  = 4
	irqPower = 9
	irqGen   = 10
	irqINTx  = 16 // first of the eight GSIs that PCI lines share
	numINTx  = 8
	numIRQ   = 24 // pins of the IOAPIC
)
