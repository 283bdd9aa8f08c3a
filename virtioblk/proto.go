package virtioblk

// Feature bits (section 5.2.3).
const (
	FeatureSizeMax     uint64 = 1 << 1  // VIRTIO_BLK_F_SIZE_MAX
	FeatureSegMax      uint64 = 1 << 2  // VIRTIO_BLK_F_SEG_MAX
	FeatureReadOnly    uint64 = 1 << 5  // VIRTIO_BLK_F_RO
	FeatureBlkSize     uint64 = 1 << 6  // VIRTIO_BLK_F_BLK_SIZE
	FeatureFlush       uint64 = 1 << 9  // VIRTIO_BLK_F_FLUSH
	FeatureTopology    uint64 = 1 << 10 // VIRTIO_BLK_F_TOPOLOGY
	FeatureConfigWCE   uint64 = 1 << 11 // VIRTIO_BLK_F_CONFIG_WCE
	FeatureMQ          uint64 = 1 << 12 // VIRTIO_BLK_F_MQ
	FeatureDiscard     uint64 = 1 << 13 // VIRTIO_BLK_F_DISCARD
	FeatureWriteZeroes uint64 = 1 << 14 // VIRTIO_BLK_F_WRITE_ZEROES
)

// Request types (section 5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13
)

// Request status.
const (
	statusOK     = 0
	statusIOErr  = 1
	statusUnsupp = 2
)

const (
	sectorSize  = 512
	headerSize  = 16
	segmentSize = 16 // of a discard or write-zeroes request
	serialSize  = 20

	flagUnmap = 1 // of a segment

	// Offered limits. A discard of a whole disk comes in few requests, yet
	// none of them keeps a worker for long.
	maxSegments       = 32
	maxSegmentSectors = 1 << 21 // 1 GiB
	sizeMax           = 1 << 20 // bytes per data buffer
)

// Offsets in the configuration space (section 5.2.4).
const (
	cfgCapacity      = 0
	cfgSizeMax       = 8
	cfgSegMax        = 12
	cfgBlkSize       = 20
	cfgPhysicalExp   = 24
	cfgMinIO         = 26
	cfgOptIO         = 28
	cfgWriteback     = 32
	cfgNumQueues     = 34
	cfgDiscardMax    = 36
	cfgDiscardSegs   = 40
	cfgDiscardAlign  = 44
	cfgZeroesMax     = 48
	cfgZeroesSegs    = 52
	cfgZeroesUnmap   = 56
	cfgLen           = 60
	physicalBlockExp = 3 // 8 sectors: copy-on-write disks allocate 4 KiB units
)
