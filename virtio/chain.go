package virtio

// DescriptorChain is one request of the driver.
type DescriptorChain struct{}

// Head is the chain's head index, unique among the chains in flight.
func (c *DescriptorChain) Head() uint16 { return 0 }

// Reader reads the device-readable bytes.
func (c *DescriptorChain) Reader() *ChainReader { return nil }

// Writer writes the device-writable bytes.
func (c *DescriptorChain) Writer() *ChainWriter { return nil }

// ChainReader reads the device-readable bytes of a chain as a stream.
type ChainReader struct{}

// Read implements io.Reader.
func (r *ChainReader) Read(p []byte) (int, error) { return 0, nil }

// Len is the number of bytes left.
func (r *ChainReader) Len() int { return 0 }

// Buffers appends the guest slices of the next n bytes to dst and consumes them.
func (r *ChainReader) Buffers(n int, dst [][]byte) ([][]byte, error) { return dst, nil }

// ChainWriter writes the device-writable bytes of a chain as a stream.
type ChainWriter struct{}

// Write implements io.Writer.
func (w *ChainWriter) Write(p []byte) (int, error) { return 0, nil }

// Len is the number of bytes left.
func (w *ChainWriter) Len() int { return 0 }

// Buffers appends the guest slices of the next n bytes to dst and consumes them.
func (w *ChainWriter) Buffers(n int, dst [][]byte) ([][]byte, error) { return dst, nil }

// SplitLast cuts the last n bytes off into a writer of their own.
func (w *ChainWriter) SplitLast(n int) (*ChainWriter, error) { return nil, nil }

// Written is the number of bytes written so far, for used.len.
func (w *ChainWriter) Written() uint32 { return 0 }
