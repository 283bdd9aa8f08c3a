/*
 * For User Mode Linux on processors with a large extended state: it sets the
 * extended registers (NT_X86_XSTATE) of its processes from a buffer that is
 * shorter than the kernel's register set, which the kernel refuses. Loaded with
 * LD_PRELOAD, this puts UML's part over all of the present registers.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <elf.h>
#include <stdarg.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/types.h>
#include <sys/uio.h>

#ifndef NT_X86_XSTATE
#define NT_X86_XSTATE 0x202
#endif

long ptrace(enum __ptrace_request request, ...)
{
	static long (*next)(enum __ptrace_request, pid_t, void *, void *);
	static char all[1 << 16] __attribute__((aligned(64)));
	struct iovec full = { all, sizeof all }, *part;
	va_list ap;
	va_start(ap, request);
	pid_t pid = va_arg(ap, pid_t);
	void *addr = va_arg(ap, void *), *data = va_arg(ap, void *);
	va_end(ap);
	if (!next)
		next = (long (*)(enum __ptrace_request, pid_t, void *, void *))dlsym(RTLD_NEXT, "ptrace");
	if (request != PTRACE_SETREGSET || (long)addr != NT_X86_XSTATE)
		return next(request, pid, addr, data);
	if (next(PTRACE_GETREGSET, pid, addr, &full))
		return -1;
	part = data;
	memcpy(all, part->iov_base, part->iov_len < full.iov_len ? part->iov_len : full.iov_len);
	return next(request, pid, addr, &full);
}
