// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * Random operations from a seed. The generator looks at the state the trace has (VMAs, ranges), so that most operations
 * hit something; the rest go anywhere. Same configuration, seed and kernel: same operations.
 */
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include "driver.h"

static uint64_t rng;

uint64_t rnd(void)
{
	/* splitmix64 */
	uint64_t z = rng += 0x9e3779b97f4a7c15ull;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

static uint64_t below(uint64_t n)
{
	return n ? rnd() % n : 0;
}

static bool chance(unsigned percent)
{
	return below(100) < percent;
}

/* What a configuration weighs; percent unless said otherwise. */
struct config {
	const char *name;
	uint64_t arena, len;
	const char *create;	/* arguments of `create` after mm_start and mm_range */
	const char *thp;
	unsigned migrate;	/* of device operations that migrate */
	unsigned owner, read_only, limits, mixed, only;
	unsigned host;		/* operations that change the host side */
	unsigned kinds;		/* mappings that are not anonymous */
	unsigned forks, races;	/* per 1000 */
	const char *thresholds[4];
};

static const struct config configs[] = {
	{ "chunks", 0x1000000000, 16 << 20, "512M 2M,64K,4K", "madvise", 5, 80, 30, 20, 10, 5, 45, 10, 2, 0,
	  { "0", "0", "64K", "2M" } },
	{ "windows", 0x1000000000, 16 << 20, "4M 2M,64K,4K", "madvise", 10, 80, 30, 20, 10, 5, 45, 10, 2, 0,
	  { "0", "64K", "64K", "2M" } },
	{ "edge512", 0x0fff800000, 16 << 20, "512M 2M,64K,4K", "always", 20, 90, 30, 20, 10, 5, 45, 5, 5, 0,
	  { "0", "64K", "64K", "2M" } },
	{ "migrate", 0x1000000000, 16 << 20, "512M 2M,64K,4K", "madvise", 45, 90, 15, 5, 15, 5, 35, 0, 5, 1,
	  { "0", "0", "64K", "2M" } },
	{ "huge", 0x1000000000, 16 << 20, "512M 2M,64K,4K", "always", 45, 90, 15, 5, 15, 5, 35, 0, 5, 1,
	  { "0", "0", "64K", "2M" } },
	{ "full", 0x1000000000, 16 << 20, "32M 2M,64K,4K 4M", "madvise", 55, 95, 10, 0, 15, 5, 30, 0, 2, 0,
	  { "0", "0", "0", "64K" } },
	{ "fork", 0x1000000000, 8 << 20, "512M 2M,64K,4K", "madvise", 25, 90, 30, 5, 10, 5, 45, 5, 60, 0,
	  { "0", "0", "64K", "2M" } },
	{ "small", 0x1000000000, 1 << 20, "512M 64K,4K", "madvise", 30, 90, 20, 20, 10, 5, 50, 10, 10, 0,
	  { "0", "4K", "64K", "64K" } },
	{ "ladder", 0x1000000000, 16 << 20, "8M 8M,2M,512K,64K,16K,4K", "madvise", 15, 90, 20, 20, 10, 5, 45, 5, 2, 0,
	  { "0", "16K", "512K", "2M" } },
	{ "narrow", 0x1000000000, 8 << 20, "512K 2M,64K,4K", "madvise", 15, 90, 20, 20, 10, 5, 45, 5, 2, 0,
	  { "0", "0", "64K", "2M" } },
	{ "pages", 0x1000000000, 4 << 20, "2M 4K", "madvise", 25, 90, 25, 10, 15, 5, 40, 10, 10, 0,
	  { "0", "4K", "64K", "2M" } },
};

static const struct config *cfg;
static char line[512];

static __attribute__((format(printf, 1, 2))) void say(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	run_line(line);
}

/* A page-aligned offset, aligned more than that as often as not. */
static uint64_t offset(void)
{
	static const uint64_t aligns[] = { 4 << 10, 4 << 10, 64 << 10, 64 << 10, 1 << 20, 2 << 20, 2 << 20 };
	uint64_t at;

	if (now.nvmas && chance(75)) {
		struct vma *v = &now.vmas[below(now.nvmas)];
		uint64_t pick = v->start + below((v->end - v->start) / PAGE) * PAGE;

		at = (chance(30) ? (chance(50) ? v->start : v->end - PAGE) : pick) - arena;
	} else {
		at = below(cfg->len / PAGE) * PAGE;
	}
	at &= ~(aligns[below(7)] - 1);
	return at < cfg->len ? at : 0;
}

static uint64_t length(uint64_t at)
{
	static const uint64_t units[] = { 4 << 10, 4 << 10, 64 << 10, 64 << 10, 512 << 10, 2 << 20 };
	uint64_t len = units[below(6)] * (1 + below(4));

	if (chance(25))
		len += PAGE * (1 + below(20));
	return len > cfg->len - at ? cfg->len - at : len;
}

static const char *ctx(bool find)
{
	static char text[128];

	snprintf(text, sizeof(text), "-%s%s%s%s%s", chance(cfg->read_only) ? ",ro" : "", chance(75) ? ",dm" : "",
		 chance(cfg->only) ? ",only" : "", chance(cfg->mixed) ? ",mixed" : "", chance(cfg->owner) ? ",own" : "");
	if (find) {
		size_t n = strlen(text);

		n += snprintf(text + n, sizeof(text) - n, ",thr=%s", cfg->thresholds[below(4)]);
		if (chance(cfg->limits)) {
			uint64_t a = offset(), b = a + length(a);

			snprintf(text + n, sizeof(text) - n, ",lim=%llu:%llu", (unsigned long long)a, (unsigned long long)b);
		}
	}
	return text;
}

/* An address for a device operation: mostly in a range that exists, else in a VMA, else anywhere. */
static uint64_t range_offset(unsigned existing)
{
	if (now.nranges && chance(existing)) {
		struct usvm_ref_range *r = &now.ranges[below(now.nranges)];

		return r->start + below((r->end - r->start) / PAGE) * PAGE - arena;
	}
	return offset() + (chance(50) ? below(PAGE) : 0);
}

static void host_op(void)
{
	static const char *const perms[] = { "rw", "rw", "rw", "r", "r", "-", "rwx", "w" };
	static const char *const kinds[] = { "file", "shmem", "hugetlb", "io" };
	static const char *const advices[] = { "dontneed", "dontneed", "free", "cold", "pageout", "hugepage", "hugepage",
					       "nohugepage", "collapse", "collapse", "populate_read", "populate_write" };
	uint64_t at = offset(), len = length(at);
	unsigned long long a = at, l = len;

	switch (below(20)) {
	case 0 ... 4:
		if (chance(cfg->kinds))
			say("mmap %llu %llu %s %s", a, l, perms[below(8)], kinds[below(4)]);
		else
			say("mmap %llu %llu %s anon", a, l, chance(80) ? "rw" : perms[below(8)]);
		break;
	case 5 ... 6:
		say("munmap %llu %llu", a, l);
		break;
	case 7: {
		static const char *const how[] = { "move", "move", "dontunmap", "inplace" };
		uint64_t to = offset();
		int i = below(4);
		uint64_t newlen = i == 3 ? length(at) : len;

		if (to + newlen > cfg->len)
			to = 0;
		say("mremap %llu %llu %llu %s %llu", a, l, (unsigned long long)newlen, how[i], (unsigned long long)to);
		break;
	}
	case 8 ... 9:
		say("mprotect %llu %llu %s", a, l, perms[below(7)]);
		break;
	case 10 ... 12:
		say("madvise %llu %llu %s", a, l, advices[below(12)]);
		break;
	case 13:
		if (chance(20))
			say("%s %llu %llu", chance(50) ? "mlock" : "munlock", a, l);
		else if (chance(30))
			say("clear_refs 4");
		else
			say("sum %llu %llu", a, l);
		break;
	default:
		say("touch %llu %llu %c", a, l, chance(60) ? 'w' : 'r');
	}
}

/* The GPU loads or stores a part of a range, now and then past its end. */
static void gpu_op(void)
{
	struct usvm_ref_range copy, *r = &copy;
	uint64_t at, len;

	if (!now.nranges)
		return;
	copy = now.ranges[below(now.nranges)];
	at = r->start + below((r->end - r->start) / PAGE) * PAGE;
	if (chance(50))
		say("pages %llu %s", (unsigned long long)(at - arena), ctx(false));
	len = PAGE * (1 + below(chance(90) ? (r->end - at) / PAGE : 600));
	say("gpu%c %llu %llu", chance(50) ? 'w' : 'r', (unsigned long long)(at - arena), (unsigned long long)len);
}

/* Puts 64K or 4K of a block on the device and forgets the range: a larger range then has mixed pages. */
static void carve(void)
{
	uint64_t size = chance(50) ? 64 << 10 : PAGE, at = offset() & ~(size - 1);
	unsigned long long a = at, end = at + size;

	for (int i = 0; i < 2 && end <= cfg->len; i++, a += size, end += size) {
		say("find %llu dm,own,lim=%llu:%llu", a, a, end);
		say("migrate %llu own", a);
		say("remove %llu", a);
		if (chance(50))
			break;
	}
	if (chance(70)) {
		a = at & ~((chance(50) ? 2ull << 20 : 64ull << 10) - 1);
		say("find %llu dm,own", a);
		say("pages %llu %s", a, ctx(false));
	}
}

static void device_op(void)
{
	unsigned long long at;

	if (chance(cfg->migrate)) {
		at = range_offset(70) & ~(PAGE - 1);
		switch (below(8)) {
		case 0 ... 2: say("migrate %llu", at); break;
		case 3 ... 4: say("access %llu %s", at, ctx(true)); break;
		case 5: say("evict %llu", at); break;
		case 6: say("scan %llu %s", at, chance(50) ? "own" : "-"); break;
		default: say("devevict %llu", (unsigned long long)(1 + below(3)));
		}
		return;
	}
	switch (below(16)) {
	case 0 ... 6:
		say("find %llu %s", (unsigned long long)range_offset(15), ctx(true));
		break;
	case 7 ... 10:
		say("pages %llu %s", (unsigned long long)range_offset(95) & ~(PAGE - 1), ctx(false));
		break;
	case 11:
		say("unmap %llu", (unsigned long long)range_offset(95));
		break;
	case 12:
		say("remove %llu", (unsigned long long)range_offset(95));
		break;
	case 13:
		say("gc");
		break;
	case 14:
		gpu_op();
		break;
	case 15:
		if (chance(cfg->migrate))
			carve();
		break;
	default:
		say("scan %llu %s", (unsigned long long)range_offset(90), chance(50) ? "own" : "-");
	}
}

static void rare_op(void)
{
	uint64_t at = offset(), len = length(at);
	static const char *const what[] = { "munmap", "write", "read", "exit" };

	if (chance(40))
		say("fork %s", chance(60) ? "hold" : "exit");
	else
		say("child %s %llu %llu", what[below(4)], (unsigned long long)at, (unsigned long long)len);
}

void run_random(const char *name, uint64_t seed, uint64_t ops)
{
	for (size_t i = 0; i < sizeof(configs) / sizeof(*configs); i++)
		if (!strcmp(name, configs[i].name))
			cfg = &configs[i];
	if (!cfg)
		die(name);
	rng = seed;
	arena = cfg->arena;
	arena_len = cfg->len;
	start_trace();
	say("thp %s", cfg->thp);
	say("create 0 %llu %s", (unsigned long long)cfg->len, cfg->create);
	while (op_count < ops) {
		if (below(1000) < cfg->forks)
			rare_op();
		else if (below(1000) < cfg->races)
			say("race %llu %u 5", (unsigned long long)(offset() & ~0xffffull), 64 << 10);
		else if (chance(cfg->host))
			host_op();
		else
			device_op();
	}
}
