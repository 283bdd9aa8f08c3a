package virtionet

// Feature bits of a network device (section 5.1.3).
const (
	FeatureCsum          uint64 = 1 << 0  // VIRTIO_NET_F_CSUM
	FeatureGuestCsum     uint64 = 1 << 1  // VIRTIO_NET_F_GUEST_CSUM
	FeatureMTU           uint64 = 1 << 3  // VIRTIO_NET_F_MTU
	FeatureMAC           uint64 = 1 << 5  // VIRTIO_NET_F_MAC
	FeatureGuestTSO4     uint64 = 1 << 7  // VIRTIO_NET_F_GUEST_TSO4
	FeatureGuestTSO6     uint64 = 1 << 8  // VIRTIO_NET_F_GUEST_TSO6
	FeatureHostTSO4      uint64 = 1 << 11 // VIRTIO_NET_F_HOST_TSO4
	FeatureHostTSO6      uint64 = 1 << 12 // VIRTIO_NET_F_HOST_TSO6
	FeatureMrgRxBuf      uint64 = 1 << 15 // VIRTIO_NET_F_MRG_RXBUF
	FeatureStatus        uint64 = 1 << 16 // VIRTIO_NET_F_STATUS
	FeatureCtrlVQ        uint64 = 1 << 17 // VIRTIO_NET_F_CTRL_VQ
	FeatureGuestAnnounce uint64 = 1 << 21 // VIRTIO_NET_F_GUEST_ANNOUNCE
	FeatureMQ            uint64 = 1 << 22 // VIRTIO_NET_F_MQ
	FeatureCtrlMACAddr   uint64 = 1 << 23 // VIRTIO_NET_F_CTRL_MAC_ADDR
)

// Configuration space (section 5.1.4).
const (
	cfgMAC      = 0
	cfgStatus   = 6
	cfgMaxPairs = 8
	cfgMTU      = 10
	cfgLen      = 12

	statusLinkUp   = 1
	statusAnnounce = 2
)

// HeaderSize is the length of virtio_net_hdr (section 5.1.6), always with
// num_buffers since VERSION_1 is required.
const HeaderSize = 12

// Fields of virtio_net_hdr and what they hold.
const (
	hdrFlags      = 0
	hdrGSOType    = 1
	hdrLen        = 2
	hdrGSOSize    = 4
	hdrCsumStart  = 6
	hdrCsumOffset = 8
	hdrNumBuffers = 10

	flagNeedsCsum = 1
	gsoNone       = 0
	gsoTCPv4      = 1
	gsoTCPv6      = 4
)

// Commands of the control queue (section 5.1.6.5).
const (
	ctrlMAC         = 1
	ctrlMACAddrSet  = 1
	ctrlAnnounce    = 3
	ctrlAnnounceAck = 0
	ctrlMQ          = 4
	ctrlMQPairsSet  = 0

	ctrlOK  = 0
	ctrlErr = 1
)

// Sizes of frames, without their check sequence.
const (
	ethHeader = 14
	vlanTag   = 4
	// minMTU is what IPv4 demands of every link (RFC 791), maxMTU what the
	// 16-bit lengths leave room for.
	minMTU, maxMTU = 68, 65535
	// maxFrame is the largest frame there is, with or without segmentation
	// offload: an IP packet of 64 KiB.
	maxFrame = ethHeader + vlanTag + maxMTU
)
