package cowdisk

import "fmt"

// Variant names one of the header layouts.
type Variant int

// The layouts. QEMUV2 is the default for new images; UMLV3 is what User Mode Linux and uml_mkcow write.
const (
	VariantUnknown Variant = iota
	QEMUV2                 // QEMU version 2 as x86-64 builds laid it out
	QEMUV2i386             // QEMU version 2 as i386 builds laid it out
	UMLV1                  // UML version 1, host-endian
	UMLV2                  // UML version 2, packed
	UMLV3                  // UML version 3
	UMLV3Broken            // UML version 3 from 64-bit builds before December 2005
	UMLV1Unpacked          // UML version 1 from old 64-bit builds; read-only
	UMLV2Unpacked          // UML version 2 from old 64-bit builds; read-only
	numVariants
)

var variantNames = [numVariants]string{"unknown", "qemu-v2", "qemu-v2-i386", "uml-v1", "uml-v2", "uml-v3", "uml-v3-broken", "uml-v1-unpacked", "uml-v2-unpacked"}

// String is the name that `moovm info` shows.
func (v Variant) String() string {
	if v < 0 || v >= numVariants {
		return fmt.Sprintf("Variant(%d)", int(v))
	}
	return variantNames[v]
}

// MarshalText makes JSON show the name.
func (v Variant) MarshalText() ([]byte, error) { return []byte(v.String()), nil }

// UnmarshalText is ParseVariant.
func (v *Variant) UnmarshalText(b []byte) (err error) {
	*v, err = ParseVariant(string(b))
	return err
}

// ParseVariant takes a name as String gives it, or the short forms v2 (QEMUV2) and v3 (UMLV3).
func ParseVariant(s string) (Variant, error) {
	switch s {
	case "v2":
		return QEMUV2, nil
	case "v3":
		return UMLV3, nil
	}
	for i, n := range variantNames {
		if n == s {
			return Variant(i), nil
		}
	}
	return 0, fmt.Errorf("%w: %q is no COW layout; use v2 or v3", ErrVariant, s)
}
