// Children whose last thread leaves by pthread_exit at some moment after the fork, from a thread and from the main thread:
// each of them has to end by itself, with 0, say nothing, and have run what it registered for its end.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char *data;
static int said[2];
static void at_exit(void) { if (write(said[1], "e", 1) != 1) _exit(3); }
static void *works(void *p) { for (int i = 0; i < 4096; i++) data[i * 512] += 1; return p; }

// Waits up to 20 s for one child; ends it otherwise.
static int ends(pid_t child) {
    int status = 0;
    for (int i = 0; i < 20000; i++) {
        if (waitpid(child, &status, WNOHANG) == child) return status;
        usleep(1000);
    }
    kill(child, SIGKILL);
    waitpid(child, &status, 0);
    return -1;
}

static void *forks(void *p) {
    int round = *(int *)p;
    pid_t child = fork();
    if (child == 0) {
        // Around the time at which something of the library's own may begin in a child.
        struct timespec pause = { 0, (round % 40) * 250000L };
        nanosleep(&pause, 0);
        pthread_t t;
        pthread_create(&t, 0, works, 0);
        if (round % 3) pthread_join(t, 0);
        pthread_exit(0);
    }
    int status = ends(child);
    if (status) printf("child %d %s %d\n", round, status == -1 ? "never ended:" : "ended with", status), _exit(fflush(stdout) + 1);
    char byte = 0;
    if (read(said[0], &byte, 1) != 1 || byte != 'e') printf("child %d ran nothing at its end\n", round);
    return p;
}

int main(void) {
    data = calloc(4096, 512);
    if (pipe(said)) return 2;
    atexit(at_exit);
    for (int round = 0; round < 160; round++) {
        pthread_t t;
        if (round % 2 == 0) { forks(&round); continue; }
        pthread_create(&t, 0, forks, &round);
        pthread_join(t, 0);
    }
    puts("160 children ended");
    return 0;
}
