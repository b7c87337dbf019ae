// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * How long the kernel takes for each operation on 2 MiB, beside the kernel's memcpy of 2 MiB in the same machine (and the
 * C library's, which an emulated CPU may make much slower: it picks vector instructions). Medians of 31 rounds after two
 * of warm-up for one range, of 15 for many; a ratio is the median of what each round took by its own baseline, so that a
 * slow moment of the host is in both. The figures of an emulated CPU mean something only as ratios.
 */
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include "driver.h"

#define MB2	(2ul << 20)
#define ROUNDS	33
#define LOOPS	17
#define WARM	2
#define MANY	64

struct timing { const char *name; double best_us, median_us, p90_us, ratio; unsigned n; };

static struct timing timings[64];
static unsigned ntimings;
static double baseline[1024];
static unsigned nbaseline;
static double by_round[ROUNDS];			/* the baseline of each round */
static unsigned retries;			/* migrations that answered EBUSY at first */
static const struct usvm_ref_ctx rw_ctx = { .flags = USVM_REF_OWNER | USVM_REF_DEVMEM_POSSIBLE };

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

static double median(double *us, unsigned n)
{
	qsort(us, n, sizeof(*us), by_value);
	return us[n / 2];
}

/* Sorts n samples, each of `per` ranges of 2 MiB; the figures are per range. */
static struct timing summary(const char *name, double *us, unsigned n, unsigned per)
{
	for (unsigned i = 0; i < n; i++)
		us[i] /= per;
	median(us, n);
	return (struct timing){ name, us[0], us[n / 2], us[n * 9 / 10], 1, n };
}

static void record(const char *name, double *us, unsigned rounds, unsigned per)
{
	unsigned n = rounds - WARM;
	double ratios[ROUNDS];

	for (unsigned i = 0; i < n; i++)
		ratios[i] = us[WARM + i] / per / by_round[WARM + i];
	timings[ntimings] = summary(name, us + WARM, n, per);
	timings[ntimings++].ratio = median(ratios, n);
}

static double one_memcpy(void)
{
	struct usvm_ref_on_range r = { 0 };

	if (ioctl(ref_fd, USVM_REF_MEMCPY, &r))
		die("bench memcpy");
	if (!r.value)
		die("bench memcpy: no free device memory");
	if (nbaseline < sizeof(baseline) / sizeof(*baseline))
		baseline[nbaseline++] = r.value / 1e3;
	return r.value / 1e3;
}

/* The baseline is sampled in every round of everything, so that both see the same load of the host. */
static void sample_memcpy(unsigned round)
{
	double us[3];

	for (int i = 0; i < 3; i++)
		us[i] = one_memcpy();
	by_round[round] = median(us, 3);
}

static void on(unsigned long cmd, uint64_t at, uint32_t flags)
{
	struct usvm_ref_on_range r = { .addr = at, .ctx = rw_ctx };

	r.ctx.flags |= flags;
	/* A migration of untouched memory answers EBUSY the first time although it happened; a busy host adds a few. */
	for (int i = 0; i < 50; i++) {
		if (!ioctl(ref_fd, cmd, &r))
			return;
		retries++;
	}
	die("bench operation");
}

static void find(uint64_t at)
{
	struct usvm_ref_find f = { .addr = at, .gpuva_end = ~0ull, .ctx = rw_ctx };

	if (ioctl(ref_fd, USVM_REF_FIND, &f) || f.out.end - f.out.start != MB2)
		die("bench find");
}

static void fresh(uint64_t count, bool huge)
{
	munmap((void *)arena, MANY * MB2);
	struct usvm_ref_on_range r = { 0 };
	ioctl(ref_fd, USVM_REF_GC, &r);
	if (mmap((void *)arena, count * MB2, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) ==
	    MAP_FAILED)
		die("bench mmap");
	madvise((void *)arena, count * MB2, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
}

static void dirty(uint64_t at)
{
	for (uint64_t i = 0; i < MB2; i += PAGE)
		*(volatile uint64_t *)(at + i) = i;
}

#define TIMED(slot, ...) do { uint64_t t_ = now_ns(); __VA_ARGS__; (slot) = (now_ns() - t_) / 1e3; } while (0)

static void bench_memcpy(void)
{
	char *a = aligned_alloc(MB2, MB2), *b = aligned_alloc(MB2, MB2);
	double us[LOOPS];

	memset(a, 1, MB2);
	memset(b, 2, MB2);
	for (int i = 0; i < LOOPS; i++) {
		sample_memcpy(i);
		TIMED(us[i], for (int k = 0; k < 4; k++) {
			memcpy(a, b, MB2);
			__asm__ volatile("" : : "r"(a) : "memory");
		});
	}
	record("memcpy_user_2m", us, LOOPS, 4);
	free(a);
	free(b);
}

static const char *name_of(const char *what, bool huge)
{
	char *s = malloc(64);

	snprintf(s, 64, "%s_%s", what, huge ? "huge" : "4k");
	return s;
}

static void bench_one(bool huge)
{
	double nw[ROUNDS], old[ROUNDS], untouched[ROUNDS], touched[ROUNDS], valid[ROUNDS], todev[ROUNDS], back[ROUNDS];
	double clean[ROUNDS];

	for (int i = 0; i < ROUNDS; i++) {
		fresh(1, huge);
		sample_memcpy(i);
		TIMED(nw[i], find(arena));
		TIMED(old[i], find(arena));
		TIMED(untouched[i], on(USVM_REF_GET_PAGES, arena, 0));
		dirty(arena);
		on(USVM_REF_UNMAP_PAGES, arena, 0);
		TIMED(touched[i], on(USVM_REF_GET_PAGES, arena, 0));
		TIMED(valid[i], on(USVM_REF_GET_PAGES, arena, 0));
		TIMED(todev[i], on(USVM_REF_MIGRATE, arena, 0); on(USVM_REF_GET_PAGES, arena, 0));
		TIMED(back[i], *(volatile uint64_t *)arena += 1);
		/* The device only reads it; the kernel keeps no copy, so the way back is the same. */
		on(USVM_REF_MIGRATE, arena, 0);
		on(USVM_REF_GET_PAGES, arena, USVM_REF_READ_ONLY);
		TIMED(clean[i], (void)*(volatile uint64_t *)arena);
	}
	record(name_of("find_new", huge), nw, ROUNDS, 1);
	record(name_of("find_existing", huge), old, ROUNDS, 1);
	record(name_of("get_pages_untouched", huge), untouched, ROUNDS, 1);
	record(name_of("get_pages_touched", huge), touched, ROUNDS, 1);
	record(name_of("get_pages_valid", huge), valid, ROUNDS, 1);
	record(name_of("to_device_2m", huge), todev, ROUNDS, 1);
	record(name_of("cpu_fault_return_2m", huge), back, ROUNDS, 1);
	record(name_of("clean_return_2m", huge), clean, ROUNDS, 1);
}

static void bench_many(bool huge)
{
	double pingpong[LOOPS], evict[LOOPS], devevict[LOOPS];

	fresh(MANY, huge);
	for (uint64_t i = 0; i < MANY; i++) {
		find(arena + i * MB2);
		dirty(arena + i * MB2);
	}
	for (int r = 0; r < LOOPS; r++) {
		sample_memcpy(r);
		TIMED(pingpong[r], for (uint64_t i = 0; i < MANY; i++) {
			on(USVM_REF_MIGRATE, arena + i * MB2, 0);
			on(USVM_REF_GET_PAGES, arena + i * MB2, 0);
			*(volatile uint64_t *)(arena + i * MB2) += 1;
		});
		for (uint64_t i = 0; i < MANY; i++)
			on(USVM_REF_MIGRATE, arena + i * MB2, 0);
		TIMED(evict[r], for (uint64_t i = 0; i < MANY; i++) on(USVM_REF_EVICT, arena + i * MB2, 0));
		for (uint64_t i = 0; i < MANY; i++)
			on(USVM_REF_MIGRATE, arena + i * MB2, 0);
		TIMED(devevict[r], struct usvm_ref_on_range d = { .value = MANY };
		      if (ioctl(ref_fd, USVM_REF_DEVEVICT, &d) || d.value != MANY) die("bench devevict"));
	}
	record(name_of("ping_pong_64", huge), pingpong, LOOPS, MANY);
	record(name_of("evict_64", huge), evict, LOOPS, MANY);
	record(name_of("devevict_64", huge), devevict, LOOPS, MANY);
}

static void print_json(FILE *out, const char *release)
{
	struct timing base = summary("memcpy_2m", baseline, nbaseline, 1);

	timings[ntimings++] = base;
	fprintf(out, "{\"kernel\":\"%s\",\"note\":\"emulated CPU: only the ratios mean something\",\"retries\":%u,"
		"\"results\":[\n", release, retries);
	for (unsigned i = 0; i < ntimings; i++) {
		const struct timing *t = &timings[i];

		fprintf(out, "{\"name\":\"%s\",\"unit\":\"us\",\"best\":%.3f,\"median\":%.3f,\"p90\":%.3f,\"n\":%u,"
			"\"baseline\":\"memcpy_2m\",\"baseline_best\":%.3f,\"baseline_median\":%.3f,\"ratio_best\":%.4f,"
			"\"ratio\":%.4f}%s\n", t->name, t->best_us, t->median_us, t->p90_us, t->n, base.best_us, base.median_us,
			t->best_us / base.best_us, t->ratio, i + 1 < ntimings ? "," : "");
	}
	fprintf(out, "]}\n");
}

int run_bench(FILE *out)
{
	struct usvm_ref_create c = {
		.mm_start = arena, .mm_range = MANY * MB2, .notifier_size = 512ul << 20,
		.chunks = { MB2, 64 << 10, PAGE }, .num_chunks = 3,
	};
	struct utsname uts;

	uname(&uts);
	if (ioctl(ref_fd, USVM_REF_CREATE, &c))
		die("bench create");
	bench_memcpy();
	for (int huge = 0; huge < 2; huge++) {
		bench_one(huge);
		bench_many(huge);
	}
	print_json(out, uts.release);
	return 0;
}
