package kmod

import (
	"cmp"
	"slices"
	"strings"
)

// nearMost is how many near names an error shows.
const nearMost = 3

// near are the modules, there or built in, whose names are most like name:
// what may have been meant by it.
func (m *Modules) near(name string) []string {
	name = Underscores(name)
	most := max(1, len(name)/3) // edits
	edits := map[string]int{}
	look := func(have string) {
		switch n := editDistance(name, have); {
		case n <= most:
			edits[have] = n
		case len(name) > 2 && (strings.HasPrefix(have, name) || strings.HasPrefix(name, have) && len(have) > 2):
			edits[have] = most + n
		}
	}
	for have := range m.files {
		look(have)
	}
	for have := range m.builtin {
		if !strings.ContainsAny(have, ":*") { // a name, no alias
			look(have)
		}
	}
	var out []string
	for have := range edits {
		out = append(out, have)
	}
	slices.SortFunc(out, func(a, b string) int { return cmp.Or(edits[a]-edits[b], strings.Compare(a, b)) })
	return out[:min(len(out), nearMost)]
}

// editDistance is the number of bytes to insert, delete or replace to make b of
// a (Levenshtein).
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}
