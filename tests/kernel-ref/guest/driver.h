/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* What the parts of the guest driver share. One process, one space, one arena, one trace. */
#ifndef DRIVER_H
#define DRIVER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include "usvm_ref.h"

#define PAGE		4096ul
#define MAX_VMAS	4096
#define MAX_RANGES	65536
#define MAX_NOTIFIERS	4096
#define MAX_EVENTS	16384

struct vma {
	uint64_t start, end;
	char perms[5];			/* as /proc/self/maps writes them: rwxp */
	const char *kind;		/* anon, file, shmem, hugetlb, io */
};

/* What the trace last said about the arena, so that only changes are written. */
struct state {
	size_t nvmas;
	struct vma vmas[MAX_VMAS];
	unsigned char *pages;		/* one letter for each page of the arena */
	size_t nranges;
	struct usvm_ref_range ranges[MAX_RANGES];
	size_t nnotifiers;
	uint64_t notifiers[2 * MAX_NOTIFIERS];
	uint32_t gc_queue, vram_used;
};

extern FILE *trace;
extern int ref_fd;
extern uint64_t arena, arena_len;
extern struct state now;
extern uint64_t op_count;

/* state.c */
void state_init(void);
void state_reset_space(void);
void capture(bool summary);		/* events, VMAs, pages, ranges: what changed goes to the trace */
void drop_events(int fd);
void print_events(int fd, bool summary);
const char *errno_word(int err);

/* ops.c */
void run_line(const char *line);	/* one line of a script; writes one or more operations to the trace */
void set_thp(const char *mode);
void finish_child(void);

/* random.c */
void run_random(const char *config, uint64_t seed, uint64_t ops);
uint64_t rnd(void);

/* bench.c */
int run_bench(FILE *out);

/* main.c */
void start_trace(void);
void die(const char *what);
void write_file(const char *path, const char *text);
uint64_t now_ns(void);

#endif
