// Puts a filter on itself while it runs: from then on only what it needs, anything else kills. Its memory goes on migrating.
// argv: "all" (the whole program with a fork, to its exit) | "few" (one thread, without mremap and the exit: a running usvm needs more
// system calls than the program for these)
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define ALLOW(name) BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)
static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}
static int all;
static _Atomic int ended;
static void *filtered(void *unused) {
    (void)unused;
    static uint64_t words[1 << 16];
    uint64_t *heap = malloc(1 << 20), sum = 0;
    for (int i = 0; i < 1 << 16; i++) words[i] = i;
    memset(heap, 5, 1 << 20);
    printf("before\n");
    fflush(stdout);
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        ALLOW(write), ALLOW(mmap), ALLOW(munmap), ALLOW(mremap), ALLOW(madvise), ALLOW(mprotect), ALLOW(brk),
        ALLOW(futex), ALLOW(clock_gettime), ALLOW(exit_group), ALLOW(exit), ALLOW(rt_sigreturn),
        // What a fork and its end are made of.
        ALLOW(clone), ALLOW(set_robust_list), ALLOW(rt_sigprocmask), ALLOW(gettid), ALLOW(wait4),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
    };
    struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program)) { perror("seccomp"); _exit(77); }
    double end = now() + 0.7;
    for (unsigned round = 0; now() < end; round++) {
        for (int i = 0; i < 1 << 16; i++) {
            if (words[i] != i + (uint64_t)round) sum = 1;
            words[i]++;
        }
        size_t size = 1000 + round % 7 * 100000;
        char *block = malloc(size), *map = mmap(0, 1 << 21, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        memset(block, 1, size);
        memset(map, 2, 1 << 20);
        block = realloc(block, size * 2);
        if (all) map = mremap(map, 1 << 21, 1 << 22, MREMAP_MAYMOVE);
        mprotect(map, 4096, PROT_READ);
        madvise(map + 4096, 1 << 16, MADV_DONTNEED);
        sum |= block[size - 1] != 1 || map[0] != 2 || map[5000] != 0 || map[1 << 19] != 2;
        munmap(map, all ? 1 << 22 : 1 << 21);
        free(block);
    }
    if (all) {
        int status = -1;
        pid_t child = fork();
        if (!child) _exit(words[5] < 5);
        sum |= waitpid(child, &status, 0) != child || status != 0;
    }
    for (int i = 0; i < 1 << 17; i++) sum |= heap[i] != 0x0505050505050505;
    static const char good[] = "after\n", bad[] = "WRONG\n";
    if (write(1, sum ? bad : good, 6) != 6) syscall(SYS_exit_group, 1);
    ended = 1;
    // A thread of the filter cannot end by itself either: that is the C library's business.
    while (!all) syscall(SYS_futex, &ended, 0 /* FUTEX_WAIT */, 1, NULL);
    return NULL;
}
int main(int argc, char **argv) {
    pthread_t thread;
    all = argc > 1 && !strcmp(argv[1], "all");
    if (all) {
        filtered(NULL);
        exit(3);
    }
    if (pthread_create(&thread, NULL, filtered, NULL)) return 1;
    while (!ended) usleep(1000);
    return 3;
}
