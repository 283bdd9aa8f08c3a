package cowdisk

import (
	"bufio"
	"context"
	"encoding/xml"
	"fmt"
	"io"
	"path/filepath"
	"strings"
)

// The picture: the disk from left to right and top to bottom, like a page of text. Each cell is coloured by the layer that most of its
// bytes come from.
const (
	svgColumns = 128
	svgRows    = 64
	svgCell    = 7
)

var svgColours = []string{"#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#e6ab02", "#a6761d"}

const svgZero = "#eeeeee"

// WriteSVG draws where each part of the disk comes from: the overlay, each backing file, or nowhere (zeros).
func (d *Disk) WriteSVG(ctx context.Context, w io.Writer) error {
	layers := d.Layers()
	if layers == nil {
		return d.errClosed()
	}
	cells := int64(svgColumns * svgRows)
	per := max((d.size+cells-1)/cells, sectorSize)
	cells = (d.size + per - 1) / per
	weight := make([][]int64, cells) // bytes of each layer; the last entry is zeros
	totals := make([]int64, len(layers)+1)
	err := d.Extents(ctx, 0, d.size, func(e Extent) error {
		kind := e.Depth
		if e.Zero {
			kind = len(layers)
		}
		totals[kind] += e.Length
		for off, end := e.Start, e.Start+e.Length; off < end; {
			i := off / per
			next := min((i+1)*per, end)
			if weight[i] == nil {
				weight[i] = make([]int64, len(layers)+1)
			}
			weight[i][kind] += next - off
			off = next
		}
		return nil
	})
	if err != nil {
		return err
	}
	rows := (cells + svgColumns - 1) / svgColumns
	legend := int64(len(layers)+2) * 18
	b := bufio.NewWriter(w)
	fmt.Fprintf(b, "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"12\">\n", svgColumns*svgCell+20, rows*svgCell+legend+30)
	fmt.Fprintf(b, "<title>%s</title>\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n", xmlText(d.path))
	for row := range rows {
		for col := int64(0); col < svgColumns; { // neighbours of one colour are one rectangle
			i := row*svgColumns + col
			if i >= cells {
				break
			}
			kind, n := heaviest(weight[i]), int64(1)
			for col+n < svgColumns && i+n < cells && heaviest(weight[i+n]) == kind {
				n++
			}
			fmt.Fprintf(b, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\"/>\n", 10+col*svgCell, 10+row*svgCell, n*svgCell, svgCell-1, svgColour(kind, len(layers)))
			col += n
		}
	}
	y := rows*svgCell + 30
	for kind := range totals {
		name := "zeros"
		if kind < len(layers) {
			name = filepath.Base(layers[kind].c.layers[0].path)
		}
		fmt.Fprintf(b, "<rect x=\"10\" y=\"%d\" width=\"12\" height=\"12\" fill=\"%s\"/><text x=\"28\" y=\"%d\">%s: %d bytes</text>\n", y-10, svgColour(kind, len(layers)), y, xmlText(name), totals[kind])
		y += 18
	}
	fmt.Fprintf(b, "<text x=\"10\" y=\"%d\">one cell: %d bytes</text>\n</svg>\n", y, per)
	return b.Flush()
}

func heaviest(w []int64) int {
	best := 0
	for i := range w {
		if w[i] > w[best] {
			best = i
		}
	}
	return best
}

func svgColour(kind, layers int) string {
	if kind == layers {
		return svgZero
	}
	return svgColours[kind%len(svgColours)]
}

// xmlText is s as XML can hold it: what no XML may contain (control characters,
// bytes that are no UTF-8) becomes U+FFFD.
func xmlText(s string) string {
	var b strings.Builder
	_ = xml.EscapeText(&b, []byte(s)) // a Builder takes all
	return b.String()
}
