// Package virtionet is the virtio network device (virtio 1.2, section 5.1): up
// to 32 queue pairs, mergeable receive buffers, checksum and segmentation
// offloads, link state and a control queue.
//
// What it is plugged into is a Link, which carries packets: a virtio_net_hdr of
// 12 bytes with a frame behind it. Links here are Pair (a cable between two
// devices), Hub (a LAN with faults), Tap (Linux), Null, and Recorder, which
// wraps any of them and writes what passes to a pcap file.
//
// Packets are copied out of guest memory before anybody looks at them, and
// their headers are checked and rewritten from what the frame says, for those
// of the guest as for those of the link: csum_start, csum_offset, hdr_len and
// gso_size come from a stranger.
package virtionet
