// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The operations. run_line takes one line of a script (addresses relative to the arena), does it, and writes it to the
 * trace with absolute addresses, its result and everything that changed. `sweep` and `access` are macros: they write
 * the operations they are made of.
 *
 * Numbers: decimal or 0x, with K or M, joined by + or -: 2M+64K-1.
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>
#include "driver.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define MAX_WORDS 12

static int memfd = -1;
static uint64_t last_sum;

/* ---- words ------------------------------------------------------------------------------------------------------ */

static uint64_t number(const char *s)
{
	uint64_t total = 0;
	int sign = 1;

	while (*s) {
		char *end;
		uint64_t n = strtoull(s, &end, 0);

		if (end == s)
			die(s);
		if (*end == 'K' || *end == 'M')
			n <<= *end++ == 'K' ? 10 : 20;
		total += sign * n;
		if (*end && *end != '+' && *end != '-')
			die(s);
		sign = *end == '-' ? -1 : 1;
		s = end + (*end != 0);
	}
	return total;
}

static uint64_t address(const char *s)
{
	return arena + number(s);
}

static int split(char *line, char **words)
{
	char *save;
	int n = 0;

	for (char *w = strtok_r(line, " \t", &save); w && n < MAX_WORDS; w = strtok_r(NULL, " \t", &save))
		words[n++] = w;
	return n;
}

static __attribute__((format(printf, 1, 2))) void begin(const char *fmt, ...)
{
	va_list ap;

	fprintf(trace, "op %llu ", (unsigned long long)op_count++);
	va_start(ap, fmt);
	vfprintf(trace, fmt, ap);
	va_end(ap);
	fputc('\n', trace);
}

/* The result line: 0 or the errno's name, and what the call gave back. */
static __attribute__((format(printf, 2, 3))) void result(int err, const char *fmt, ...)
{
	char more[256];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(more, sizeof(more), fmt, ap);
	va_end(ap);
	fprintf(trace, "= %s%s%s\n", errno_word(err), *more ? " " : "", more);
}

#define ULL(x) ((unsigned long long)(x))

/* ---- the host side: what a program does to its memory ------------------------------------------------------------- */

static int prot_of(const char *perms)
{
	return (strchr(perms, 'r') ? PROT_READ : 0) | (strchr(perms, 'w') ? PROT_WRITE : 0) |
	       (strchr(perms, 'x') ? PROT_EXEC : 0);
}

static void op_mmap(uint64_t at, uint64_t len, const char *perms, const char *kind)
{
	int flags = MAP_FIXED, fd = -1;
	void *p;

	if (memfd < 0 && (memfd = memfd_create("arena", MFD_CLOEXEC)) >= 0 && ftruncate(memfd, arena_len))
		die("memfd");
	if (!strcmp(kind, "anon"))
		flags |= MAP_PRIVATE | MAP_ANONYMOUS;
	else if (!strcmp(kind, "hugetlb"))
		flags |= MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB;
	else if (!strcmp(kind, "file"))
		flags |= MAP_PRIVATE, fd = memfd;
	else if (!strcmp(kind, "shmem"))
		flags |= MAP_SHARED, fd = memfd;
	else if (!strcmp(kind, "io"))
		flags |= MAP_SHARED, fd = ref_fd;
	else
		die(kind);
	begin("mmap %llx %llx %s %s", ULL(at), ULL(len), perms, kind);
	p = mmap((void *)at, len, prot_of(perms), flags, fd, fd < 0 ? 0 : at - arena);
	result(p == MAP_FAILED ? errno : 0, "%s", "");
	capture(false);
}

static void op_munmap(uint64_t at, uint64_t len)
{
	begin("munmap %llx %llx", ULL(at), ULL(len));
	result(munmap((void *)at, len) ? errno : 0, "%s", "");
	capture(false);
}

/* how: move (to a fixed place), dontunmap (same, the old mapping stays, empty), inplace (grow or shrink) */
static void op_mremap(uint64_t at, uint64_t len, uint64_t newlen, const char *how, uint64_t to)
{
	int flags = 0;
	void *p;

	if (!strcmp(how, "move"))
		flags = MREMAP_MAYMOVE | MREMAP_FIXED;
	else if (!strcmp(how, "dontunmap"))
		flags = MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP;
	begin("mremap %llx %llx %llx %s %llx", ULL(at), ULL(len), ULL(newlen), how, ULL(to));
	p = mremap((void *)at, len, newlen, flags, (void *)to);
	result(p == MAP_FAILED ? errno : 0, "%s", "");
	capture(false);
}

static void op_mprotect(uint64_t at, uint64_t len, const char *perms)
{
	begin("mprotect %llx %llx %s", ULL(at), ULL(len), perms);
	result(mprotect((void *)at, len, prot_of(perms)) ? errno : 0, "%s", "");
	capture(false);
}

static const struct { const char *name; int advice; } advices[] = {
	{ "dontneed", MADV_DONTNEED }, { "free", MADV_FREE }, { "cold", MADV_COLD }, { "pageout", MADV_PAGEOUT },
	{ "hugepage", MADV_HUGEPAGE }, { "nohugepage", MADV_NOHUGEPAGE }, { "collapse", MADV_COLLAPSE },
	{ "populate_read", MADV_POPULATE_READ }, { "populate_write", MADV_POPULATE_WRITE }, { "remove", MADV_REMOVE },
	{ "dontfork", MADV_DONTFORK }, { "dofork", MADV_DOFORK }, { "wipeonfork", MADV_WIPEONFORK },
};

static void op_madvise(uint64_t at, uint64_t len, const char *name)
{
	int advice = -1;

	for (size_t i = 0; i < sizeof(advices) / sizeof(*advices); i++)
		if (!strcmp(name, advices[i].name))
			advice = advices[i].advice;
	if (advice < 0)
		die(name);
	begin("madvise %llx %llx %s", ULL(at), ULL(len), name);
	result(madvise((void *)at, len, advice) ? errno : 0, "%s", "");
	capture(false);
}

static void op_mlock(uint64_t at, uint64_t len, bool lock)
{
	begin("%s %llx %llx", lock ? "mlock" : "munlock", ULL(at), ULL(len));
	result((lock ? mlock : munlock)((void *)at, len) ? errno : 0, "%s", "");
	capture(false);
}

static void op_clear_refs(const char *n)
{
	begin("clear_refs %s", n);
	write_file("/proc/self/clear_refs", n);
	result(0, "%s", "");
	capture(false);
}

/* `never` would stop khugepaged, and starting it again makes it scan: always and madvise only. */
void set_thp(const char *mode)
{
	if (strcmp(mode, "always") && strcmp(mode, "madvise"))
		die(mode);
	write_file("/sys/kernel/mm/transparent_hugepage/enabled", mode);
}

static void op_thp(const char *mode)
{
	begin("thp %s", mode);
	set_thp(mode);
	result(0, "%s", "");
	capture(false);
}

/* ---- touching --------------------------------------------------------------------------------------------------- */

static sigjmp_buf fault_jump;
static volatile int fault_signal;

static void on_fault(int sig)
{
	fault_signal = sig;
	siglongjmp(fault_jump, 1);
}

static void catch_faults(bool on)
{
	struct sigaction sa = { .sa_handler = on ? on_fault : SIG_DFL };

	sigaction(SIGSEGV, &sa, NULL);
	sigaction(SIGBUS, &sa, NULL);
}

/* One access to each page. Gives how many were allowed; *segv and *bus count the others. */
static uint64_t access_pages(uint64_t at, uint64_t len, bool write, uint64_t value, uint64_t *sum, int *segv, int *bus)
{
	volatile uint64_t ok = 0, i = 0;

	*segv = *bus = 0;
	catch_faults(true);
	if (sigsetjmp(fault_jump, 1)) {
		*(fault_signal == SIGBUS ? bus : segv) += 1;
		i++;
	}
	for (; i < len / PAGE; i++) {
		volatile uint64_t *p = (uint64_t *)(at + i * PAGE);

		if (write)
			*p = value + i;
		else
			*sum = (*sum ^ *p) * 0x100000001b3ull;
		ok++;
	}
	catch_faults(false);
	return ok;
}

/* w: the first 8 bytes of page i become (operation number << 20) + i */
static void op_touch(uint64_t at, uint64_t len, bool write)
{
	uint64_t sum = 0, ok;
	int segv, bus;

	begin("touch %llx %llx %c", ULL(at), ULL(len), write ? 'w' : 'r');
	ok = access_pages(at, len, write, (op_count - 1) << 20, &sum, &segv, &bus);
	result(0, "ok=%llu segv=%d bus=%d", ULL(ok), segv, bus);
	capture(false);
}

/* FNV-like over the first 8 bytes of each page; `same` fails where it is not the previous sum. */
static void op_sum(uint64_t at, uint64_t len, bool same)
{
	uint64_t sum = 0xcbf29ce484222325ull, ok;
	int segv, bus;

	begin("%s %llx %llx", same ? "sumsame" : "sum", ULL(at), ULL(len));
	ok = access_pages(at, len, false, 0, &sum, &segv, &bus);
	result(same && sum != last_sum ? EBADMSG : 0, "ok=%llu segv=%d bus=%d sum=%llx", ULL(ok), segv, bus, ULL(sum));
	last_sum = sum;
	capture(false);
}

/* ---- children ---------------------------------------------------------------------------------------------------- */

struct order { char what; uint64_t at, len; };

static pid_t child;
static int to_child[2], from_child[2];

static void child_loop(void)
{
	struct order o;

	while (read(to_child[0], &o, sizeof(o)) == sizeof(o)) {
		uint64_t sum = 0;
		int segv, bus, err = 0;

		if (o.what == 'u')
			err = munmap((void *)o.at, o.len) ? errno : 0;
		else
			access_pages(o.at, o.len, o.what == 'w', 7, &sum, &segv, &bus);
		if (write(from_child[1], &err, sizeof(err)) != sizeof(err))
			break;
	}
	_exit(0);
}

static void op_fork(bool hold)
{
	int status;

	if (hold && child)
		hold = false;
	begin("fork %s", hold ? "hold" : "exit");
	if (hold && (pipe(to_child) || pipe(from_child)))
		die("pipe");
	fflush(trace);
	if (hold) {
		child = fork();
		if (!child) {
			close(to_child[1]);
			close(from_child[0]);
			child_loop();
		}
		close(to_child[0]);
		close(from_child[1]);
	} else {
		pid_t pid = fork();

		if (!pid)
			_exit(0);
		waitpid(pid, &status, 0);
	}
	result(0, "%s", "");
	capture(false);
}

static void op_child(const char *what, uint64_t at, uint64_t len)
{
	struct order o = { .what = !strcmp(what, "munmap") ? 'u' : what[0], .at = at, .len = len };
	int err = ESRCH, status;

	begin("child %s %llx %llx", what, ULL(at), ULL(len));
	if (child && !strcmp(what, "exit")) {
		close(to_child[1]);
		close(from_child[0]);
		waitpid(child, &status, 0);
		child = 0;
		err = 0;
	} else if (child) {
		if (write(to_child[1], &o, sizeof(o)) != sizeof(o) || read(from_child[0], &err, sizeof(err)) != sizeof(err))
			die("child");
	}
	result(err, "%s", "");
	capture(false);
}

void finish_child(void)
{
	if (child)
		op_child("exit", arena, 0);
}

/*
 * A child with a space of its own that touches and maps the first 4 MiB of the arena, then ends as `how` says. The
 * events and ranges are those of the child's space, read through the file that parent and child share.
 */
static void op_procend(const char *how)
{
	struct usvm_ref_create create = {
		.mm_start = arena, .mm_range = arena_len, .notifier_size = 512ul << 20,
		.chunks = { 2ul << 20, 64 << 10, PAGE }, .num_chunks = 3,
	};
	int fd = open("/dev/usvm_ref", O_RDWR), ready[2], end[2], status;
	struct usvm_ref_dump dump = { 0 };
	char c = 0;
	pid_t pid;

	begin("procend %s", how);
	if (fd < 0 || pipe(ready) || pipe(end))
		die("procend");
	fflush(trace);
	pid = fork();
	if (!pid) {
		struct usvm_ref_find find = { .gpuva_end = ~0ull };
		struct usvm_ref_on_range on = { 0 };

		if (mmap((void *)arena, 4 << 20, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) ==
		    MAP_FAILED || ioctl(fd, USVM_REF_CREATE, &create))
			_exit(1);
		for (uint64_t at = arena; at < arena + (4 << 20); at += 2 << 20) {
			memset((void *)at, 1, 2 << 20);
			find.addr = on.addr = at;
			if (ioctl(fd, USVM_REF_FIND, &find) || ioctl(fd, USVM_REF_GET_PAGES, &on))
				_exit(1);
		}
		if (write(ready[1], &c, 1) != 1 || read(end[0], &c, 1) != 1)
			_exit(1);
		if (!strcmp(how, "exec"))
			execl("/proc/self/exe", "driver", "noop", NULL);
		_exit(0);
	}
	if (read(ready[0], &c, 1) != 1)
		die("procend child");
	drop_events(fd);	/* what ending causes is of interest, not what came before */
	if (write(end[1], &c, 1) != 1)
		die("procend child");
	waitpid(pid, &status, 0);
	result(0, "%s", "");
	print_events(fd, false);
	if (!ioctl(fd, USVM_REF_DUMP, &dump))
		fprintf(trace, "left %u %u\n", dump.ranges.count, dump.notifiers.count);
	close(fd);
	close(ready[0]);
	close(ready[1]);
	close(end[0]);
	close(end[1]);
	capture(false);
}

/* ---- the device side ---------------------------------------------------------------------------------------------- */

struct ctx {
	struct usvm_ref_ctx c;
	uint64_t lim_start, lim_end;
	char text[128];
};

/* ro,dm,only,mixed,own,thr=64K,ts=20,lim=4K:2M or - */
static struct ctx context(const char *s)
{
	struct ctx x = { .lim_end = ~0ull };
	char copy[128], *save;

	snprintf(copy, sizeof(copy), "%s", s);
	for (char *w = strtok_r(copy, ",", &save); w; w = strtok_r(NULL, ",", &save)) {
		if (!strcmp(w, "ro"))
			x.c.flags |= USVM_REF_READ_ONLY;
		else if (!strcmp(w, "dm"))
			x.c.flags |= USVM_REF_DEVMEM_POSSIBLE;
		else if (!strcmp(w, "only"))
			x.c.flags |= USVM_REF_DEVMEM_ONLY;
		else if (!strcmp(w, "mixed"))
			x.c.flags |= USVM_REF_ALLOW_MIXED;
		else if (!strcmp(w, "own"))
			x.c.flags |= USVM_REF_OWNER;
		else if (!strncmp(w, "thr=", 4))
			x.c.check_pages_threshold = number(w + 4);
		else if (!strncmp(w, "ts=", 3))
			x.c.timeslice_ms = number(w + 3);
		else if (!strncmp(w, "lim=", 4)) {
			char *colon = strchr(w, ':');

			*colon = 0;
			x.lim_start = address(w + 4);
			x.lim_end = address(colon + 1);
		} else if (strcmp(w, "-"))
			die(w);
	}
	snprintf(x.text, sizeof(x.text), "%s%s%s%s%s", x.c.flags & USVM_REF_READ_ONLY ? "ro," : "",
		 x.c.flags & USVM_REF_DEVMEM_POSSIBLE ? "dm," : "", x.c.flags & USVM_REF_DEVMEM_ONLY ? "only," : "",
		 x.c.flags & USVM_REF_ALLOW_MIXED ? "mixed," : "", x.c.flags & USVM_REF_OWNER ? "own," : "");
	if (*x.text)
		x.text[strlen(x.text) - 1] = 0;
	else
		strcpy(x.text, "-");
	return x;
}

static void op_create(char **w, int n)
{
	struct usvm_ref_create c = { .mm_start = address(w[1]), .mm_range = number(w[2]), .notifier_size = number(w[3]) };
	char *save;
	int err;

	for (char *s = strtok_r(w[4], ",", &save); s && c.num_chunks < USVM_REF_MAX_CHUNKS; s = strtok_r(NULL, ",", &save))
		c.chunks[c.num_chunks++] = number(s);
	c.vram_pages = n > 5 ? number(w[5]) / PAGE : 0;
	fprintf(trace, "op %llu create %llx %llx %llx ", ULL(op_count++), ULL(c.mm_start), ULL(c.mm_range),
		ULL(c.notifier_size));
	for (uint32_t i = 0; i < c.num_chunks; i++)
		fprintf(trace, "%s%llx", i ? "," : "", ULL(c.chunks[i]));
	fprintf(trace, " %x\n", c.vram_pages);
	err = ioctl(ref_fd, USVM_REF_CREATE, &c) ? errno : 0;
	result(err, "%s", "");
	capture(false);
}

static void op_destroy(void)
{
	int err;

	begin("destroy");
	err = ioctl(ref_fd, USVM_REF_DESTROY) ? errno : 0;
	result(err, "%s", "");
	if (!err)
		state_reset_space();
	capture(false);
}

static int do_find(uint64_t at, struct ctx x, struct usvm_ref_find *f)
{
	int err;

	*f = (struct usvm_ref_find){ .addr = at, .gpuva_start = x.lim_start, .gpuva_end = x.lim_end, .ctx = x.c };
	begin("find %llx %s thr=%llx lim=%llx:%llx", ULL(at), x.text, ULL(x.c.check_pages_threshold), ULL(x.lim_start),
	      ULL(x.lim_end));
	err = ioctl(ref_fd, USVM_REF_FIND, f) ? errno : 0;
	if (err)
		result(err, "%s", "");
	else
		result(0, "%llx %llx %s", ULL(f->out.start), ULL(f->out.end), f->inserted ? "new" : "old");
	capture(false);
	return err;
}

static void op_find(uint64_t at, const char *ctx)
{
	struct usvm_ref_find f;

	do_find(at, context(ctx), &f);
}

static void op_sweep(uint64_t at, uint64_t len, const char *ctx)
{
	struct usvm_ref_find f;

	for (uint64_t a = at; a < at + len;)
		a = do_find(a, context(ctx), &f) ? a + PAGE : f.out.end;
}

static int on_range(const char *name, unsigned long cmd, uint64_t at, struct ctx x)
{
	struct usvm_ref_on_range r = { .addr = at, .ctx = x.c };
	int err;

	begin("%s %llx %s ts=%u", name, ULL(at), x.text, x.c.timeslice_ms);
	err = ioctl(ref_fd, cmd, &r) ? errno : 0;
	if (cmd == USVM_REF_SCAN) {
		static const char *const words[] = { "unpopulated", "equal", "other", "system", "mixed_device", "mixed" };

		result(err, "%s", err ? "" : words[r.value]);
	} else {
		result(err, "%s", "");
	}
	capture(false);
	return err;
}

static void op_gc(void)
{
	struct usvm_ref_on_range r = { 0 };
	int err;

	begin("gc");
	err = ioctl(ref_fd, USVM_REF_GC, &r) ? errno : 0;
	result(err, "%llu", ULL(r.value));
	capture(false);
}

static void op_devevict(uint64_t want)
{
	struct usvm_ref_on_range r = { .value = want };
	int err;

	begin("devevict %llu", ULL(want));
	err = ioctl(ref_fd, USVM_REF_DEVEVICT, &r) ? errno : 0;
	result(err, "%llu", ULL(r.value));
	capture(false);
}

/* w: page i gets (operation number << 20) + i, as touch does; r: the sum of what touch and gpuw wrote */
static void op_gpu_rw(uint64_t at, uint64_t len, bool write)
{
	struct usvm_ref_gpu_rw rw = { .addr = at, .len = len, .write = write, .value = op_count << 20 };
	int err;

	begin("gpu%c %llx %llx", write ? 'w' : 'r', ULL(at), ULL(len));
	err = ioctl(ref_fd, USVM_REF_GPU_RW, &rw) ? errno : 0;
	if (write || err)
		result(err, "%s", "");
	else
		result(0, "sum=%llx", ULL(rw.value));
	capture(false);
}

/* The fault handler of drm_gpusvm's documentation, one try. */
static void op_access(uint64_t at, const char *ctx)
{
	struct ctx x = context(ctx);
	struct usvm_ref_find f;
	int err;

	op_gc();
	if (do_find(at, x, &f))
		return;
	if (f.out.flags & USVM_REF_F_MIGRATE_DEVMEM && !(x.c.flags & USVM_REF_READ_ONLY))
		on_range("migrate", USVM_REF_MIGRATE, at, x);
	err = on_range("pages", USVM_REF_GET_PAGES, at, x);
	if (err == EOPNOTSUPP) {
		on_range("evict", USVM_REF_EVICT, at, x);
		on_range("pages", USVM_REF_GET_PAGES, at, x);
	}
}

/* ---- two threads -------------------------------------------------------------------------------------------------- */

struct race {
	uint64_t at, len, rounds;
	volatile bool done;		/* the device side has gone over the pages `rounds` times */
};

/* A counter in each page, at byte 64: the values touch writes stay as they are. */
static volatile uint64_t *counter(uint64_t page)
{
	return (uint64_t *)(page + 64);
}

static void race_serve(uint64_t a, uint64_t *next)
{
	struct usvm_ref_ctx ctx = { .flags = USVM_REF_OWNER | USVM_REF_DEVMEM_POSSIBLE };
	struct usvm_ref_on_range gc = { 0 }, on = { .addr = a, .ctx = ctx };
	struct usvm_ref_find f = { .addr = a, .gpuva_end = ~0ull, .ctx = ctx };

	*next = a + PAGE;
	ioctl(ref_fd, USVM_REF_GC, &gc);
	if (ioctl(ref_fd, USVM_REF_FIND, &f))
		return;
	ioctl(ref_fd, USVM_REF_MIGRATE, &on);
	ioctl(ref_fd, USVM_REF_GET_PAGES, &on);
	*next = f.out.end;
}

static void *race_gpu(void *arg)
{
	struct race *r = arg;

	for (uint64_t i = 0; i < r->rounds; i++)
		for (uint64_t a = r->at; a < r->at + r->len;)
			race_serve(a, &a);
	r->done = true;
	return NULL;
}

/* One thread adds to a counter in each page as long as the other migrates the same pages to the device, without a lock. */
static void op_race(uint64_t at, uint64_t len, uint64_t rounds)
{
	struct race r = { .at = at, .len = len, .rounds = rounds };
	uint64_t before = 0, after = 0, added = 0;
	pthread_t gpu;

	begin("race %llx %llx %llu", ULL(at), ULL(len), ULL(rounds));
	for (uint64_t a = at; a < at + len; a += PAGE)
		before += *counter(a);
	if (pthread_create(&gpu, NULL, race_gpu, &r))
		die("pthread_create");
	while (!r.done) {
		for (uint64_t a = at; a < at + len; a += PAGE)
			*counter(a) += 1;
		added += len / PAGE;
	}
	pthread_join(gpu, NULL);
	for (uint64_t a = at; a < at + len; a += PAGE)
		after += *counter(a);
	result(after - before == added ? 0 : EBADMSG, "lost=%lld", (long long)(added - (after - before)));
	capture(true);
}

/* Whether [at, at+len) is readable and writable anonymous memory: race must not fault. */
static bool writable(uint64_t at, uint64_t len)
{
	uint64_t ok = at;

	for (size_t i = 0; i < now.nvmas; i++) {
		struct vma *v = &now.vmas[i];

		if (v->start <= ok && ok < v->end && v->perms[0] == 'r' && v->perms[1] == 'w' && strcmp(v->kind, "io"))
			ok = v->end;
	}
	return ok >= at + len;
}

/* ---- lines --------------------------------------------------------------------------------------------------------- */

static bool host_line(char **w, int n)
{
	if (!strcmp(w[0], "mmap") && n == 5)
		op_mmap(address(w[1]), number(w[2]), w[3], w[4]);
	else if (!strcmp(w[0], "munmap") && n == 3)
		op_munmap(address(w[1]), number(w[2]));
	else if (!strcmp(w[0], "mremap") && n >= 5)
		op_mremap(address(w[1]), number(w[2]), number(w[3]), w[4], n > 5 ? address(w[5]) : 0);
	else if (!strcmp(w[0], "mprotect") && n == 4)
		op_mprotect(address(w[1]), number(w[2]), w[3]);
	else if (!strcmp(w[0], "madvise") && n == 4)
		op_madvise(address(w[1]), number(w[2]), w[3]);
	else if (!strcmp(w[0], "mlock") && n == 3)
		op_mlock(address(w[1]), number(w[2]), true);
	else if (!strcmp(w[0], "munlock") && n == 3)
		op_mlock(address(w[1]), number(w[2]), false);
	else if (!strcmp(w[0], "clear_refs") && n == 2)
		op_clear_refs(w[1]);
	else if (!strcmp(w[0], "thp") && n == 2)
		op_thp(w[1]);
	else if (!strcmp(w[0], "touch") && n == 4)
		op_touch(address(w[1]), number(w[2]), w[3][0] == 'w');
	else if (!strcmp(w[0], "sum") && n == 3)
		op_sum(address(w[1]), number(w[2]), false);
	else if (!strcmp(w[0], "sumsame") && n == 3)
		op_sum(address(w[1]), number(w[2]), true);
	else if (!strcmp(w[0], "fork") && n == 2)
		op_fork(!strcmp(w[1], "hold"));
	else if (!strcmp(w[0], "child") && n >= 2)
		op_child(w[1], n > 2 ? address(w[2]) : arena, n > 3 ? number(w[3]) : 0);
	else if (!strcmp(w[0], "procend") && n == 2)
		op_procend(w[1]);
	else
		return false;
	return true;
}

static bool device_line(char **w, int n)
{
	static const struct { const char *name; unsigned long cmd; } on[] = {
		{ "pages", USVM_REF_GET_PAGES }, { "unmap", USVM_REF_UNMAP_PAGES }, { "migrate", USVM_REF_MIGRATE },
		{ "evict", USVM_REF_EVICT }, { "remove", USVM_REF_REMOVE }, { "scan", USVM_REF_SCAN },
	};

	for (size_t i = 0; i < sizeof(on) / sizeof(*on); i++) {
		if (!strcmp(w[0], on[i].name) && n >= 2) {
			on_range(w[0], on[i].cmd, address(w[1]), context(n > 2 ? w[2] : "-"));
			return true;
		}
	}
	if (!strcmp(w[0], "create") && n >= 5)
		op_create(w, n);
	else if (!strcmp(w[0], "destroy"))
		op_destroy();
	else if (!strcmp(w[0], "find") && n == 3)
		op_find(address(w[1]), w[2]);
	else if (!strcmp(w[0], "sweep") && n == 4)
		op_sweep(address(w[1]), number(w[2]), w[3]);
	else if (!strcmp(w[0], "access") && n == 3)
		op_access(address(w[1]), w[2]);
	else if (!strcmp(w[0], "gc"))
		op_gc();
	else if (!strcmp(w[0], "devevict") && n == 2)
		op_devevict(number(w[1]));
	else if (!strcmp(w[0], "gpuw") && n == 3)
		op_gpu_rw(address(w[1]), number(w[2]), true);
	else if (!strcmp(w[0], "gpur") && n == 3)
		op_gpu_rw(address(w[1]), number(w[2]), false);
	else if (!strcmp(w[0], "race") && n == 4) {
		if (writable(address(w[1]), number(w[2])))
			op_race(address(w[1]), number(w[2]), number(w[3]));
	} else
		return false;
	return true;
}

void run_line(const char *line)
{
	char copy[1024], *w[MAX_WORDS];
	int n;

	snprintf(copy, sizeof(copy), "%s", line);
	n = split(copy, w);
	if (n && !host_line(w, n) && !device_line(w, n)) {
		errno = EINVAL;
		die(line);
	}
}
