package qcow2

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// benchImages are 64 MiB of a disk, most of it data that compresses to about a half.
func benchImages(b *testing.B) (dir string, images [][2]string) {
	needQEMU(b)
	dir = b.TempDir()
	data := make([]byte, 256<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := 0; i < len(data); i += 2 {
		data[i] = byte(rng.Uint32()) // every second byte stays 0
	}
	src := filepath.Join(dir, "src.raw")
	if err := os.WriteFile(src, data, 0o600); err != nil {
		b.Fatal(err)
	}
	for name, args := range map[string][]string{
		"plain": nil, "extended": {"-o", "extended_l2=on"}, "zlib": {"-c"}, "zstd": {"-c", "-o", "compression_type=zstd"},
	} {
		sh(b, dir, append(append([]string{"qemu-img", "convert", "-O", "qcow2"}, args...), src, name)...)
		images = append(images, [2]string{name, filepath.Join(dir, name)})
	}
	return dir, images
}

// BenchmarkSequential reads an image whole, by 2 MiB as qemu-img convert does, and lets qemu-img read the same file: "vs-qemu" is how many
// times as fast as it we are, both timed in the same run, one after the other.
func BenchmarkSequential(b *testing.B) {
	dir, images := benchImages(b)
	for _, i := range images {
		b.Run(i[0], func(b *testing.B) {
			buf := make([]byte, 2<<20)
			var ours, theirs time.Duration
			for b.Loop() {
				start := time.Now()
				m, err := Open(i[1], Options{})
				if err != nil {
					b.Fatal(err)
				}
				for off := int64(0); off < m.Size(); off += int64(len(buf)) {
					if n, err := m.ReadAt(buf, off); n == 0 {
						b.Fatal(err)
					}
				}
				b.SetBytes(m.Size())
				m.Close()
				ours += time.Since(start)
				start = time.Now()
				// It looks for zeros in what it reads, and writes to nowhere.
				sh(b, dir, "qemu-img", "convert", "-n", "--target-image-opts", i[1], "driver=null-co,size=64M")
				theirs += time.Since(start)
			}
			b.ReportMetric(float64(theirs)/float64(ours), "vs-qemu")
			b.ReportMetric(64*float64(b.N)/ours.Seconds(), "MiB/s")
		})
	}
}

// BenchmarkRandom reads 4 KiB at random places, one after the other, and lets qemu-img bench read as many at places that far apart.
func BenchmarkRandom(b *testing.B) {
	dir, images := benchImages(b)
	const reads = 5000
	for _, i := range images {
		b.Run(i[0], func(b *testing.B) {
			buf := make([]byte, 4096)
			var ours, theirs time.Duration
			for b.Loop() {
				start := time.Now()
				m, err := Open(i[1], Options{})
				if err != nil {
					b.Fatal(err)
				}
				const step = 13 * 1 << 20
				for k := range int64(reads) {
					if _, err := m.ReadAt(buf, k*(step+4096)%(m.Size()-4096)&^4095); err != nil {
						b.Fatal(err)
					}
				}
				m.Close()
				ours += time.Since(start)
				start = time.Now()
				sh(b, dir, "qemu-img", "bench", "-f", "qcow2", "-c", fmt.Sprint(reads), "-d", "1", "-s", "4096", "-S", fmt.Sprint(step+4096), i[1])
				theirs += time.Since(start)
			}
			b.ReportMetric(float64(theirs)/float64(ours), "vs-qemu")
			b.ReportMetric(reads*float64(b.N)/ours.Seconds(), "IOPS")
		})
	}
}
