package cowdisk

import (
	"encoding/xml"
	"testing"
)

func TestXMLTextIsWellFormed(t *testing.T) {
	for _, name := range []string{"a\x1b]0;b\x07", "\xff<&>\"'", "\x00", "\ufffe"} {
		var got struct {
			Text string `xml:",chardata"`
		}
		if err := xml.Unmarshal([]byte("<title>"+xmlText(name)+"</title>"), &got); err != nil {
			t.Errorf("%q: %v", name, err)
		}
	}
}
