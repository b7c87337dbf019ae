// Mappings under a program's hands: MAP_FIXED over used memory, brk up and down, mremap over what usvm divided, mlock,
// madvise, files mapped privately.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { PAGE = 4096 };
static uint64_t h = 14695981039346656037u;
static void mix(const void *p, size_t n) { const uint64_t *w = p; for (size_t i = 0; i < n / 8; i++) h = (h ^ w[i]) * 1099511628211u; }
static void fill(void *p, size_t n, uint64_t k) { uint64_t *w = p; for (size_t i = 0; i < n / 8; i++) w[i] = k * 31 + i; }

int main(void) {
    size_t len = 4 << 20;
    for (int round = 0; round < 24; round++) {
        char *p = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fill(p, len, round);
        // A hole in the middle, another mapping over a part of it.
        char *q = mmap(p + len / 4, len / 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
        mix(q, len / 4);
        fill(q, len / 8, round + 1);
        mix(p, len);
        madvise(p + len / 2, len / 4, round % 2 ? MADV_DONTNEED : MADV_NORMAL);
        mix(p + len / 2, len / 4);
        if (round % 3 == 0) { mlock(p, 64 * PAGE); fill(p, 32 * PAGE, 5); mix(p, 64 * PAGE); munlock(p, 64 * PAGE); }
        char *r = mremap(p, len, len * 2, MREMAP_MAYMOVE);
        if (r == MAP_FAILED) { printf("grow: %s\n", strerror(errno)); return 1; }
        mix(r, len * 2);
        r = mremap(r, len * 2, len / 2, 0);
        if (r == MAP_FAILED) { printf("shrink: %s\n", strerror(errno)); return 1; }
        mix(r, len / 2);
        char *place = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        fill(place, PAGE * 16, 9);
        r = mremap(r, len / 2, len / 2, MREMAP_MAYMOVE | MREMAP_FIXED, place);
        if (r != place) { printf("fixed: %s\n", strerror(errno)); return 1; }
        mix(r, len / 2);
        munmap(place, len);
        munmap(p, len);
    }
    printf("mappings %016lx\n", h);
    for (int round = 0; round < 40; round++) {
        char *at = sbrk(1 << 20);
        fill(at, 1 << 20, round);
        mix(at, 1 << 20);
        if (sbrk(-(1 << 19)) == (void *)-1) puts("no way down");
        at = sbrk(1 << 19);
        mix(at, 1 << 19);
        sbrk(-(1 << 20));
    }
    printf("brk %016lx\n", h);
    char name[] = "/tmp/usvm-maps-XXXXXX";
    int fd = mkstemp(name);
    unlink(name);
    static char bytes[64 * PAGE];
    fill(bytes, sizeof bytes, 77);
    if (write(fd, bytes, sizeof bytes) != sizeof bytes) return 1;
    char *file = mmap(0, sizeof bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    for (int round = 0; round < 50; round++) { fill(file + round % 32 * PAGE, PAGE, round); mix(file, sizeof bytes); if (pread(fd, bytes, sizeof bytes, 0) != sizeof bytes) return 1; mix(bytes, sizeof bytes); }
    printf("files %016lx\n", h);
    // As far as the address space goes, which the caller may have limited.
    char *some = malloc(32 << 20);
    fill(some, 32 << 20, 3);
    mix(some, 32 << 20);
    free(some);
    printf("limit %016lx\n", h);
    return 0;
}
