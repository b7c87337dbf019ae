// Threads that allocate, map, drop, move and unmap memory, and know what every byte must be. Prints one line.
// argv: seconds, threads, whether to fork (0/1)
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static double limit;
static int forks;
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
static _Noreturn void wrong(const char *what, void *at, uint64_t is, uint64_t must) {
    fprintf(stderr, "WRONG: %s at %p: %#lx, not %#lx\n", what, at, is, must);
    fflush(stderr);
    abort();
}

struct block { uint64_t *p; size_t words; uint64_t key; int mapped; };
enum { BLOCKS = 160 };
static uint64_t word(const struct block *b, size_t i) { return b->key * 0x9e3779b97f4a7c15u + i; }
static void fill(struct block *b, size_t from) { for (size_t i = from; i < b->words; i++) b->p[i] = word(b, i); }
static void check(const char *what, const struct block *b) {
    for (size_t i = 0; i < b->words; i++)
        if (b->p[i] != word(b, i)) wrong(what, &b->p[i], b->p[i], word(b, i));
}

static void *churn(void *arg) {
    uint64_t s = (uintptr_t)arg * 7919 + 1, key = s << 32;
    struct block b[BLOCKS] = {0};
    uint64_t local[512];
    for (int i = 0; i < 512; i++) local[i] = key + i;
    while (now() < limit) {
        for (int step = 0; step < 50; step++) {
            s ^= s << 13, s ^= s >> 7, s ^= s << 17;
            struct block *x = &b[s % BLOCKS];
            unsigned what = s >> 20 & 15;
            size_t words = (s >> 30) % 97 == 0 ? 300000 : (s >> 30) % 7 == 0 ? 20000 : 8 + (s >> 40) % 900;
            if (!x->p) {
                x->words = words, x->key = ++key, x->mapped = what == 0;
                x->p = x->mapped ? mmap(0, words * 8, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) : malloc(words * 8);
                if (!x->p || x->p == MAP_FAILED) wrong("mmap or malloc fails", x->p, errno, 0);
                fill(x, 0);
                continue;
            }
            check("block", x);
            if (what < 8) {
                if (x->mapped) munmap(x->p, x->words * 8); else free(x->p);
                x->p = 0;
            } else if (what < 11) {
                size_t old = x->words;
                x->p = x->mapped ? mremap(x->p, old * 8, words * 8, MREMAP_MAYMOVE) : realloc(x->p, words * 8);
                if (!x->p || x->p == MAP_FAILED) wrong("mremap or realloc fails", x->p, errno, 0);
                x->words = words;
                fill(x, old);
                check("moved block", x);
            } else if (what == 11 && x->mapped) {
                madvise(x->p, x->words * 8, MADV_DONTNEED);
                for (size_t i = 0; i < x->words; i++) if (x->p[i]) wrong("dropped page", &x->p[i], x->p[i], 0);
                fill(x, 0);
            } else if (what == 12 && x->mapped) {
                mprotect(x->p, x->words * 8, PROT_READ);
                check("read-only block", x);
                mprotect(x->p, x->words * 8, PROT_READ | PROT_WRITE);
                fill(x, 0);
            } else {
                x->key = ++key;
                fill(x, 0);
            }
        }
        for (int i = 0; i < 512; i++) if (local[i] != ((uint64_t)((uintptr_t)arg * 7919 + 1) << 32) + i) wrong("stack", &local[i], local[i], i);
        if (forks && s % 199 == 0) {
            pid_t child = fork();
            if (child == 0) {
                for (int i = 0; i < BLOCKS; i++) if (b[i].p) { check("child's block", &b[i]); fill(&b[i], 0); }
                _exit(7);
            }
            int status = 0;
            waitpid(child, &status, 0);
            if (!WIFEXITED(status) || WEXITSTATUS(status) != 7) wrong("child's status", 0, status, 7 << 8);
        }
    }
    for (int i = 0; i < BLOCKS; i++) if (b[i].p) { check("last", &b[i]); if (b[i].mapped) munmap(b[i].p, b[i].words * 8); else free(b[i].p); }
    return arg;
}

static void *shortlived(void *arg) { char big[30000]; memset(big, (int)(intptr_t)arg, sizeof big); for (size_t i = 0; i < sizeof big; i++) if (big[i] != (char)(intptr_t)arg) wrong("short stack", &big[i], big[i], 0); return malloc(100); }

int main(int argc, char **argv) {
    double seconds = argc > 1 ? atof(argv[1]) : 1;
    int threads = argc > 2 ? atoi(argv[2]) : 3;
    forks = argc > 3 ? atoi(argv[3]) : 0;
    limit = now() + seconds;
    pthread_t t[64];
    for (intptr_t i = 0; i < threads; i++) pthread_create(&t[i], 0, churn, (void *)(i + 1));
    while (now() < limit) {
        pthread_t s[8];
        for (intptr_t i = 0; i < 8; i++) pthread_create(&s[i], 0, shortlived, (void *)i);
        for (int i = 0; i < 8; i++) { void *p; pthread_join(s[i], &p); free(p); }
        usleep(2000);
    }
    for (int i = 0; i < threads; i++) pthread_join(t[i], 0);
    puts("all as it should be");
    return 0;
}
