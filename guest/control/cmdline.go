package control

import "iter"

// SplitCmdline yields the words of a kernel command line. As in the kernel,
// blanks within double quotes do not end a word.
func SplitCmdline(line string) iter.Seq[string] {
	return func(yield func(string) bool) {
		start, quoted := -1, false
		for i := 0; i < len(line); i++ {
			c := line[i]
			if c == '"' {
				quoted = !quoted
			}
			if blank := c == ' ' || c == '\t' || c == '\n'; blank && !quoted {
				if start >= 0 && !yield(line[start:i]) {
					return
				}
				start = -1
			} else if start < 0 {
				start = i
			}
		}
		if start >= 0 {
			yield(line[start:])
		}
	}
}

// JoinOptions joins two lists of mount options.
func JoinOptions(a, b string) string {
	if b == "" {
		return a
	}
	return a + "," + b
}
