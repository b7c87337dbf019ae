// A program with its own SIGSEGV and SIGBUS handlers, on an alternate stack: null pointers, guard pages, mprotect'ed
// pages as write barriers (as garbage collectors have them), SIGBUS past a file's end, and a storm of timer signals.
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

static sigjmp_buf back;
static volatile int barriers, ticks;
static char *watched;
enum { PAGES = 64, PAGE = 4096 };

static void on_fault(int sig, siginfo_t *info, void *context) {
    (void)context;
    char *at = info->si_addr;
    if (sig == SIGSEGV && at >= watched && at < watched + PAGES * PAGE) {
        barriers++;
        mprotect((char *)((uintptr_t)at & ~(uintptr_t)(PAGE - 1)), PAGE, PROT_READ | PROT_WRITE);
        return;
    }
    siglongjmp(back, sig);
}
static void on_tick(int sig) {
    (void)sig;
    char frame[2000];
    memset(frame, ticks & 127, sizeof frame);
    ticks += frame[1999] == (ticks & 127);
}
static int deep(int n) {
    volatile char frame[1000];
    frame[0] = n, frame[999] = n >> 8;
    int below = n ? deep(n - 1) : 0;
    return below + (frame[0] == (char)n && frame[999] == (char)(n >> 8));
}
int main(void) {
    stack_t alt = {.ss_sp = malloc(1 << 16), .ss_size = 1 << 16};
    sigaltstack(&alt, 0);
    struct sigaction act = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER};
    sigaction(SIGSEGV, &act, 0);
    sigaction(SIGBUS, &act, 0);
    struct sigaction tick = {.sa_handler = on_tick, .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGALRM, &tick, 0);
    struct itimerval often = {{0, 500}, {0, 500}};
    setitimer(ITIMER_REAL, &often, 0);

    watched = mmap(0, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int nulls = 0, buses = 0;
    uint64_t sum = 0;
    for (int round = 0; round < 300; round++) {
        if (sigsetjmp(back, 1) == 0) *(volatile int *)(uintptr_t)(round & 7) = 1; else nulls++;
        mprotect(watched, PAGES * PAGE, PROT_READ);
        for (int i = 0; i < PAGES; i++) watched[i * PAGE + round] = round + i;
        for (int i = 0; i < PAGES; i++) sum = sum * 31 + watched[i * PAGE + round];
        mprotect(watched, PAGES * PAGE, PROT_NONE);
        if (sigsetjmp(back, 1) == 0) sum += deep(800);
        mprotect(watched, PAGES * PAGE, PROT_READ | PROT_WRITE);
    }
    int fd = memfd_create("short", 0);
    char *file = mmap(0, 2 * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    for (int i = 0; i < 20; i++) if (sigsetjmp(back, 1) == SIGBUS) buses++; else sum += file[PAGE];
    setitimer(ITIMER_REAL, &(struct itimerval){0}, 0);
    printf("%d nulls, %d buses, %d barriers, sum %#lx, ticks %s\n", nulls, buses, barriers, sum, ticks > 0 ? "came" : "none");
}
