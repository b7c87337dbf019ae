// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * The guest driver: runs scripts or random operations against the kernel's drm_gpusvm and writes a trace.
 *
 *   driver script NAME SCRIPT TRACE
 *   driver random CONFIG SEED OPS TRACE
 *   driver bench OUT.json
 *   driver idle                 keeps khugepaged asleep
 */
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>
#include "driver.h"

FILE *trace;
int ref_fd = -1;
uint64_t arena = 0x1000000000, arena_len = 16ul << 20;
uint64_t op_count;

void die(const char *what)
{
	fprintf(stderr, "driver: %s: %s\n", what, strerror(errno));
	if (trace)
		fflush(trace);
	exit(1);
}

void write_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY | O_TRUNC);

	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		die(path);
	close(fd);
}

uint64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

/*
 * The kernel must change nothing behind the trace's back, so khugepaged must sleep. It makes a pass when it is started
 * (when THP comes from `never`, so that mode is not used), when its list of processes was empty, and every
 * scan_sleep_millisecs. `driver idle` stays on the list and makes the sleep endless. A trace is refused if khugepaged
 * collapsed anything while it was recorded.
 */
#define KHUGEPAGED "/sys/kernel/mm/transparent_hugepage/khugepaged/"

static unsigned khugepaged_counter(const char *path)
{
	FILE *f = fopen(path, "r");
	unsigned n = 0;

	if (!f || fscanf(f, "%u", &n) != 1)
		die(path);
	fclose(f);
	return n;
}

static unsigned collapsed_before;

static void quiet_kernel(void)
{
	write_file("/sys/kernel/mm/transparent_hugepage/defrag", "always");
	write_file("/proc/sys/vm/nr_hugepages", "16");
	set_thp("madvise");
	collapsed_before = khugepaged_counter(KHUGEPAGED "pages_collapsed");
}

static __attribute__((noreturn)) void idle(void)
{
	void *p = mmap(NULL, 4 << 20, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	write_file(KHUGEPAGED "pages_to_scan", "1000000000");
	if (p == MAP_FAILED || madvise(p, 4 << 20, MADV_HUGEPAGE))
		die("idle");
	write_file(KHUGEPAGED "scan_sleep_millisecs", "4000000000");
	memset(p, 1, 4 << 20);	/* the first huge page puts the process on the list, and that starts a pass */
	for (int i = 0; i < 100 && !khugepaged_counter(KHUGEPAGED "full_scans"); i++)
		usleep(20000);
	printf("driver: khugepaged made %u passes\n", khugepaged_counter(KHUGEPAGED "full_scans"));
	fflush(stdout);
	if (mkdir("/tmp/idle", 0700))
		die("/tmp/idle");
	for (;;)
		pause();
}

static void open_trace(const char *path, const char *name)
{
	struct utsname uts;

	trace = fopen(path, "w");
	if (!trace)
		die(path);
	setvbuf(trace, malloc(1 << 20), _IOFBF, 1 << 20);
	uname(&uts);
	fprintf(trace, "usvm-kernel-trace 1\nkernel %s %s\nname %s\n", uts.release, uts.version, name);
}

void start_trace(void)
{
	ref_fd = open("/dev/usvm_ref", O_RDWR);
	if (ref_fd < 0)
		die("/dev/usvm_ref");
	fprintf(trace, "arena %llx %llx\n", (unsigned long long)arena, (unsigned long long)arena_len);
	state_init();
}

static void finish(uint64_t t0)
{
	double seconds = (now_ns() - t0) / 1e9;

	finish_child();
	fprintf(trace, "end %llu\n", (unsigned long long)op_count);
	if (fclose(trace))
		die("trace");
	trace = NULL;
	errno = EBUSY;
	if (khugepaged_counter(KHUGEPAGED "pages_collapsed") != collapsed_before)
		die("khugepaged was awake");
	printf("%llu operations, %.2f s, %.0f/s\n", (unsigned long long)op_count, seconds, op_count / seconds);
}

static void run_script(const char *path)
{
	char line[1024];
	FILE *in = fopen(path, "r");
	bool started = false;

	if (!in)
		die(path);
	while (fgets(line, sizeof(line), in)) {
		unsigned long long base, len;
		char *hash = strchr(line, '#');

		if (hash)
			*hash = 0;
		line[strcspn(line, "\n")] = 0;
		if (!started && sscanf(line, " arena %llx %llx", &base, &len) == 2) {
			arena = base;
			arena_len = len;
			continue;
		}
		if (!line[strspn(line, " \t")])
			continue;
		if (!started)
			start_trace();
		started = true;
		run_line(line);
	}
	fclose(in);
}

int main(int argc, char **argv)
{
	uint64_t t0;

	if (argc == 2 && !strcmp(argv[1], "noop"))
		return 0;
	if (argc == 2 && !strcmp(argv[1], "idle"))
		idle();
	quiet_kernel();
	t0 = now_ns();
	if (argc == 5 && !strcmp(argv[1], "script")) {
		open_trace(argv[4], argv[2]);
		run_script(argv[3]);
		finish(t0);
		return 0;
	}
	if (argc == 6 && !strcmp(argv[1], "random")) {
		char name[128];

		snprintf(name, sizeof(name), "random-%s-%s", argv[2], argv[3]);
		open_trace(argv[5], name);
		run_random(argv[2], strtoull(argv[3], NULL, 0), strtoull(argv[4], NULL, 0));
		finish(t0);
		return 0;
	}
	if (argc == 3 && !strcmp(argv[1], "bench")) {
		FILE *out = fopen(argv[2], "w");

		ref_fd = open("/dev/usvm_ref", O_RDWR);
		if (!out || ref_fd < 0)
			die("bench");
		return run_bench(out) | fclose(out);
	}
	fprintf(stderr, "usage: driver script NAME SCRIPT TRACE | random CONFIG SEED OPS TRACE | bench OUT\n");
	return 2;
}
