package virtio

// Device types (virtio 1.2, section 5).
const (
	IDNet   = 1
	IDBlock = 2
	ID9P    = 9
	IDVsock = 19
)

// Feature bits that belong to the ring and the transport (section 6).
const (
	FeatureIndirectDesc   uint64 = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	FeatureEventIdx       uint64 = 1 << 29 // VIRTIO_F_EVENT_IDX
	FeatureVersion1       uint64 = 1 << 32 // VIRTIO_F_VERSION_1
	FeatureAccessPlatform uint64 = 1 << 33 // VIRTIO_F_ACCESS_PLATFORM
	FeatureRingReset      uint64 = 1 << 40 // VIRTIO_F_RING_RESET
)

// Device status bits (section 2.1).
const (
	StatusAcknowledge uint8 = 1
	StatusDriver      uint8 = 2
	StatusDriverOK    uint8 = 4
	StatusFeaturesOK  uint8 = 8
	StatusNeedsReset  uint8 = 64
	StatusFailed      uint8 = 128
)
