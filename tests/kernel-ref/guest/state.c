// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * What the kernel says about the arena after each operation: events, VMAs, page presence, ranges and notifiers.
 * Everything is compared with what the trace last said, and only changes are written (TRACE.md has the lines).
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>
#include "driver.h"

struct state now;
static struct state next;
static int maps_fd = -1, pagemap_fd = -1;
static struct usvm_ref_event events[MAX_EVENTS];

void state_init(void)
{
	maps_fd = open("/proc/self/maps", O_RDONLY | O_CLOEXEC);
	pagemap_fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (maps_fd < 0 || pagemap_fd < 0)
		die("/proc/self/maps and pagemap");
	now.pages = malloc(arena_len / PAGE);
	next.pages = malloc(arena_len / PAGE);
	memset(now.pages, '.', arena_len / PAGE);
}

void state_reset_space(void)
{
	for (size_t i = 0; i < now.nranges; i++)
		fprintf(trace, "x %llx\n", (unsigned long long)now.ranges[i].start);
	for (size_t i = 0; i < now.nnotifiers; i++)
		fprintf(trace, "nx %llx\n", (unsigned long long)now.notifiers[2 * i]);
	now.nranges = now.nnotifiers = 0;
}

const char *errno_word(int err)
{
	static char number[16];
	const char *name;

	if (!err)
		return "0";
	name = strerrorname_np(err);
	if (name)
		return name;
	snprintf(number, sizeof(number), "E%d", err);
	return number;
}

/* ---- events ----------------------------------------------------------------------------------------------------- */

static const char *event_word(uint32_t type)
{
	/* enum mmu_notifier_event */
	static const char *const words[] = { "UNMAP", "CLEAR", "PROT_VMA", "PROT_PAGE", "SOFT_DIRTY", "RELEASE",
					     "MIGRATE", "EXCLUSIVE" };

	return type < sizeof(words) / sizeof(*words) ? words[type] : "OTHER";
}

void drop_events(int fd)
{
	struct usvm_ref_buf buf = { .ptr = (uintptr_t)events, .capacity = MAX_EVENTS };

	if (ioctl(fd, USVM_REF_EVENTS, &buf) < 0)
		die("USVM_REF_EVENTS");
}

/* Whether `b` follows `a` as the next piece of the same length, with the same effect: they share a line. */
static bool continues(const struct usvm_ref_event *a, const struct usvm_ref_event *b)
{
	return a->type == b->type && a->end == b->start && a->end - a->start == b->end - b->start &&
	       a->notifier == b->notifier && a->hits == b->hits && a->first == b->first && a->last == b->last;
}

/* Writes events[i] and those that continue it; gives how many. */
static uint32_t print_event_run(uint32_t i, uint32_t count)
{
	const struct usvm_ref_event *e = &events[i];
	uint32_t n = 1;

	while (i + n < count && continues(&events[i + n - 1], &events[i + n]))
		n++;
	fprintf(trace, "e %s %llx %llx %llx %u", event_word(e->type), (unsigned long long)e->start,
		(unsigned long long)events[i + n - 1].end, (unsigned long long)e->notifier, e->hits);
	if (e->hits)
		fprintf(trace, " %llx %llx", (unsigned long long)e->first, (unsigned long long)e->last);
	if (n > 1)
		fprintf(trace, " /%llx", (unsigned long long)(e->end - e->start));
	fputc('\n', trace);
	return n;
}

void print_events(int fd, bool summary)
{
	struct usvm_ref_buf buf = { .ptr = (uintptr_t)events, .capacity = MAX_EVENTS };
	uint32_t counts[16] = { 0 }, have;

	if (ioctl(fd, USVM_REF_EVENTS, &buf) < 0)
		die("USVM_REF_EVENTS");
	have = buf.count < MAX_EVENTS ? buf.count : MAX_EVENTS;
	if (!summary) {
		if (buf.count > have)
			fprintf(trace, "elost %u\n", buf.count - have);
		for (uint32_t i = 0; i < have;)
			i += print_event_run(i, have);
		return;
	}
	for (uint32_t i = 0; i < have; i++)
		counts[events[i].type & 15]++;
	for (int i = 0; i < 16; i++)
		if (counts[i])
			fprintf(trace, "ecount %s %u\n", event_word(i), counts[i]);
}

/* ---- VMAs ------------------------------------------------------------------------------------------------------- */

static const char *kind_of(const struct procmap_query *q, const char *name)
{
	if (strstr(name, "usvm_ref"))
		return "io";
	if (strstr(name, "anon_hugepage"))
		return "hugetlb";
	if (q->vma_flags & PROCMAP_QUERY_VMA_SHARED)
		return "shmem";
	return q->inode ? "file" : "anon";
}

static void read_vmas(struct state *s)
{
	uint64_t at = arena, end = arena + arena_len;

	for (s->nvmas = 0; at < end;) {
		char name[256] = "";
		struct procmap_query q = {
			.size = sizeof(q),
			.query_flags = PROCMAP_QUERY_COVERING_OR_NEXT_VMA,
			.query_addr = at,
			.vma_name_addr = (uintptr_t)name,
			.vma_name_size = sizeof(name),
		};
		struct vma *v = &s->vmas[s->nvmas];

		if (ioctl(maps_fd, PROCMAP_QUERY, &q) < 0) {
			if (errno == ENOENT)
				return;
			die("PROCMAP_QUERY");
		}
		if (q.vma_start >= end)
			return;
		if (s->nvmas == MAX_VMAS)
			die("too many VMAs");
		v->start = q.vma_start;
		v->end = q.vma_end;
		v->perms[0] = q.vma_flags & PROCMAP_QUERY_VMA_READABLE ? 'r' : '-';
		v->perms[1] = q.vma_flags & PROCMAP_QUERY_VMA_WRITABLE ? 'w' : '-';
		v->perms[2] = q.vma_flags & PROCMAP_QUERY_VMA_EXECUTABLE ? 'x' : '-';
		v->perms[3] = q.vma_flags & PROCMAP_QUERY_VMA_SHARED ? 's' : 'p';
		v->perms[4] = 0;
		v->kind = kind_of(&q, name);
		s->nvmas++;
		at = q.vma_end;
	}
}

static bool same_vmas(void)
{
	if (now.nvmas != next.nvmas)
		return false;
	for (size_t i = 0; i < now.nvmas; i++) {
		const struct vma *a = &now.vmas[i], *b = &next.vmas[i];

		if (a->start != b->start || a->end != b->end || a->kind != b->kind || strcmp(a->perms, b->perms))
			return false;
	}
	return true;
}

static void capture_vmas(void)
{
	read_vmas(&next);
	if (same_vmas())
		return;
	fprintf(trace, "vma %zu\n", next.nvmas);
	for (size_t i = 0; i < next.nvmas; i++)
		fprintf(trace, "v %llx %llx %s %s\n", (unsigned long long)next.vmas[i].start,
			(unsigned long long)next.vmas[i].end, next.vmas[i].perms, next.vmas[i].kind);
	now.nvmas = next.nvmas;
	memcpy(now.vmas, next.vmas, next.nvmas * sizeof(*next.vmas));
}

/* ---- pages ------------------------------------------------------------------------------------------------------ */

static char page_letter(uint64_t cat)
{
	bool huge = cat & PAGE_IS_HUGE;

	if (cat & PAGE_IS_PRESENT) {
		if (cat & PAGE_IS_PFNZERO)
			return huge ? 'Z' : 'z';
		return huge ? 'H' : 'p';
	}
	if (cat & PAGE_IS_SWAPPED)	/* the machine has no swap: a swap entry is a device-private page */
		return huge ? 'D' : 'd';
	return '.';
}

static void read_pages(struct state *s)
{
	static struct page_region regions[4096];
	uint64_t at = arena, end = arena + arena_len;

	memset(s->pages, '.', arena_len / PAGE);
	while (at < end) {
		struct pm_scan_arg arg = {
			.size = sizeof(arg),
			.start = at,
			.end = end,
			.vec = (uintptr_t)regions,
			.vec_len = 4096,
			.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
			.return_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED | PAGE_IS_PFNZERO | PAGE_IS_HUGE,
		};
		int n = ioctl(pagemap_fd, PAGEMAP_SCAN, &arg);

		if (n < 0)
			die("PAGEMAP_SCAN");
		for (int i = 0; i < n; i++)
			memset(s->pages + (regions[i].start - arena) / PAGE, page_letter(regions[i].categories),
			       (regions[i].end - regions[i].start) / PAGE);
		at = arg.walk_end;
	}
}

static void capture_pages(void)
{
	size_t n = arena_len / PAGE;

	read_pages(&next);
	for (size_t i = 0; i < n;) {
		size_t from = i;

		if (now.pages[i] == next.pages[i]) {
			i++;
			continue;
		}
		/* A run goes on over unchanged pages of the same new state: fewer lines, same meaning. */
		while (i < n && next.pages[i] == next.pages[from])
			i++;
		fprintf(trace, "p %llx %llx %c\n", (unsigned long long)(arena + from * PAGE),
			(unsigned long long)(arena + i * PAGE), next.pages[from]);
	}
	memcpy(now.pages, next.pages, n);
}

/* ---- ranges and notifiers --------------------------------------------------------------------------------------- */

static void print_range(const struct usvm_ref_range *r)
{
	fprintf(trace, "r %llx %llx %c%c%c%c%c %u %u %u %s%s\n", (unsigned long long)r->start,
		(unsigned long long)r->end, r->flags & USVM_REF_F_MIGRATE_DEVMEM ? 'M' : '-',
		r->flags & USVM_REF_F_UNMAPPED ? 'U' : '-', r->flags & USVM_REF_F_PARTIAL_UNMAP ? 'P' : '-',
		r->flags & USVM_REF_F_HAS_DEVMEM ? 'D' : '-', r->flags & USVM_REF_F_HAS_DMA ? 'A' : '-', r->sys_pages,
		r->dev_pages, r->segments, r->flags & USVM_REF_F_HAS_DMA ? (r->read_only ? "ro" : "rw") : "-",
		r->queued ? " gc" : "");
}

static void capture_ranges(void)
{
	size_t i = 0, j = 0;

	while (i < now.nranges || j < next.nranges) {
		struct usvm_ref_range *a = i < now.nranges ? &now.ranges[i] : NULL;
		struct usvm_ref_range *b = j < next.nranges ? &next.ranges[j] : NULL;

		if (a && (!b || a->start < b->start)) {
			fprintf(trace, "x %llx\n", (unsigned long long)a->start);
			i++;
		} else if (b && (!a || b->start < a->start)) {
			print_range(b);
			j++;
		} else {
			if (memcmp(a, b, sizeof(*a)))
				print_range(b);
			i++;
			j++;
		}
	}
	now.nranges = next.nranges;
	memcpy(now.ranges, next.ranges, next.nranges * sizeof(*next.ranges));
}

static void capture_notifiers(void)
{
	size_t i = 0, j = 0;

	while (i < now.nnotifiers || j < next.nnotifiers) {
		uint64_t a = i < now.nnotifiers ? now.notifiers[2 * i] : ~0ull;
		uint64_t b = j < next.nnotifiers ? next.notifiers[2 * j] : ~0ull;

		if (a < b)
			fprintf(trace, "nx %llx\n", (unsigned long long)a);
		else if (b < a)
			fprintf(trace, "n %llx %llx\n", (unsigned long long)b,
				(unsigned long long)next.notifiers[2 * j + 1]);
		i += a <= b;
		j += b <= a;
	}
	now.nnotifiers = next.nnotifiers;
	memcpy(now.notifiers, next.notifiers, next.nnotifiers * 2 * sizeof(uint64_t));
}

static void capture_space(void)
{
	struct usvm_ref_dump d = {
		.ranges = { .ptr = (uintptr_t)next.ranges, .capacity = MAX_RANGES },
		.notifiers = { .ptr = (uintptr_t)next.notifiers, .capacity = MAX_NOTIFIERS },
	};

	if (ioctl(ref_fd, USVM_REF_DUMP, &d) < 0) {
		if (errno == EBADFD)
			return;
		die("USVM_REF_DUMP");
	}
	if (d.ranges.count > MAX_RANGES || d.notifiers.count > MAX_NOTIFIERS)
		die("too many ranges");
	next.nranges = d.ranges.count;
	next.nnotifiers = d.notifiers.count;
	capture_notifiers();
	capture_ranges();
	if (d.gc_queue != now.gc_queue || d.vram_used != now.vram_used)
		fprintf(trace, "g %u %u\n", d.gc_queue, d.vram_used);
	now.gc_queue = d.gc_queue;
	now.vram_used = d.vram_used;
}

void capture(bool summary)
{
	print_events(ref_fd, summary);
	capture_vmas();
	capture_pages();
	capture_space();
}
