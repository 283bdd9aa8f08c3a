// Package agent runs any number of commands on the far side of one byte
// stream: an agent there, a Client here.
//
//	Client                                  agent (Serve)
//	Start ── start ──────────────────────▶  a process with pipes
//	stdin ── data (as much as was granted)▶
//	      ◀── stdout, stderr (likewise) ──
//	      ◀── exit ──────────────────────
//
// Each direction of each session carries only what the other end has granted,
// so that a session nobody reads from holds up no other. When the stream ends,
// the agent kills what it runs.
//
// A guest that takes several commands has an agent as its only command; the
// emulated host that several programs share has one too. Neither end trusts
// the other's lengths.
package agent
