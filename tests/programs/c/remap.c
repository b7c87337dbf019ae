// A mapping that grows, shrinks, and moves over another one in use, again and again; every page is compared. With an argument
// no descriptor is left meanwhile.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>

enum { PAGE = 4096, WORDS = PAGE / sizeof(uint64_t), ROUNDS = 150 };

static void fill(uint64_t *word, size_t bytes, uint64_t key) {
    for (size_t i = 0; i < bytes / sizeof *word; i++) word[i] = key * 1000003 + i + 1;
}

// Counts pages of `word` that do not hold what fill() put there.
static int wrong(const char *when, int round, const uint64_t *word, size_t bytes, uint64_t key) {
    int count = 0;
    for (size_t page = 0; page < bytes / PAGE; page++) {
        size_t i = page * WORDS, end = i + WORDS;
        while (i < end && word[i] == key * 1000003 + i + 1) i++;
        if (i == end) continue;
        if (count++ == 0) printf("round %d, %s: page %zu holds %#lx\n", round, when, page, (unsigned long)word[i]);
    }
    return count;
}

static void *map(size_t bytes) {
    return mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
}

int main(int argc, char **argv) {
    const size_t len = 4 << 20;
    int bad = 0;
    if (argc > 1) {
        struct rlimit few = { 64, 64 };
        setrlimit(RLIMIT_NOFILE, &few);
        while (open("/dev/null", O_RDONLY) >= 0) continue;
    }
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t *at = map(len);
        if (at == MAP_FAILED) return perror("mmap"), 1;
        fill(at, len, round);
        at = mremap(at, len, 2 * len, MREMAP_MAYMOVE);
        if (at == MAP_FAILED) return perror("growing"), 1;
        bad += wrong("grown", round, at, len, round);
        at = mremap(at, 2 * len, len / 2, 0);
        if (at == MAP_FAILED) return perror("shrinking"), 1;
        bad += wrong("shrunk", round, at, len / 2, round);
        uint64_t *place = map(len);
        if (place == MAP_FAILED) return perror("mmap"), 1;
        fill(place, 16 * PAGE, 9);
        if (mremap(at, len / 2, len / 2, MREMAP_MAYMOVE | MREMAP_FIXED, place) != place) return perror("moving"), 1;
        bad += wrong("moved", round, place, len / 2, round);
        uint64_t *there = mremap(place, len / 2, len / 2, MREMAP_MAYMOVE | 4 /* MREMAP_DONTUNMAP */, 0);
        if (there == MAP_FAILED) return perror("moving without the place"), 1;
        bad += wrong("moved without its place", round, there, len / 2, round) + (place[0] != 0);
        munmap(there, len / 2);
        munmap(place, len);
    }
    printf("%d pages are wrong\n", bad);
    return bad != 0;
}
