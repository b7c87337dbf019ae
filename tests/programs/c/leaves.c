// Ends in ways that are easily missed. argv[1] says how: children forked where no runtime ran, or one starts; the system call
// itself; a timer's thread as the last one; while others fork or make threads.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static int (*init)(void *);

static void *sleeps(void *p) { sleep(20); return p; }
static void *naps(void *p) { usleep(2500000); return p; }
static void *nothing(void *p) { return p; }
static void *forks(void *p) { for (;;) { pid_t child = fork(); if (!child) _exit(0); waitpid(child, 0, 0); } }

static void *makes(void *p) {
    for (unsigned seed = 1;; seed = seed * 1103515245 + 12345) {
        pthread_t t;
        pthread_attr_t attr;
        pthread_attr_init(&attr);
        pthread_attr_setstacksize(&attr, (1 << 20) + ((seed >> 16) % 64 << 16));
        if (!pthread_create(&t, &attr, nothing, 0)) pthread_join(t, 0);
        pthread_attr_destroy(&attr);
    }
}

static void tick(union sigval v) {
    static int count;
    if (++count == 5 && write(1, "five ticks\n", 11) == 11) _exit(3);
}

static int child(void) {
    pthread_t t;
    pthread_create(&t, 0, sleeps, 0);
    pid_t child = fork();
    if (!child) {
        // Where usvm is: the child begins with none, and its own starts now.
        init = dlsym(RTLD_DEFAULT, "usvm_init");
        if (init && init(0)) _exit(4);
        pthread_exit(0);
    }
    int status = -1;
    for (int i = 0; i < 150 && waitpid(child, &status, WNOHANG) != child; i++) usleep(100000);
    if (status == -1) kill(child, SIGKILL);
    printf("the child %s\n", status == 0 ? "ended" : "did not end");
    return 5;
}

static void *starts(void *p) { if (init) init(0); return p; }

// Children that are forked while another thread starts usvm for the first time.
static int beside_a_start(void) {
    int bad = 0;
    init = dlsym(RTLD_DEFAULT, "usvm_init");
    for (int round = 0; round < 60; round++) {
        pid_t parent = fork();
        if (!parent) {
            pthread_t t;
            pthread_create(&t, 0, starts, 0);
            for (volatile int i = round * 3001 % 200000; i > 0; i--);
            pid_t child = fork();
            if (!child) { alarm(10); starts(0); _exit(0); }
            int status = -1;
            waitpid(child, &status, 0);
            _exit(status != 0);
        }
        int status = -1;
        waitpid(parent, &status, 0);
        bad += status != 0;
    }
    printf("%d children did not end\n", bad);
    return 8;
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "";
    char *data = calloc(2048, 4096);
    for (int i = 0; i < 2048; i++) data[i * 4096] = 1;
    pthread_t t;
    if (!strcmp(how, "child")) return child();
    if (!strcmp(how, "starts")) return beside_a_start();
    if (!strcmp(how, "alone")) syscall(SYS_exit, 7);
    if (!strcmp(how, "call")) { pthread_create(&t, 0, naps, 0); syscall(SYS_exit, 7); }
    if (!strcmp(how, "timer")) {
        struct sigevent event = { .sigev_notify = SIGEV_THREAD, .sigev_notify_function = tick };
        struct itimerspec every = { { 0, 100000000 }, { 0, 100000000 } };
        timer_t timer;
        timer_create(CLOCK_MONOTONIC, &event, &timer);
        timer_settime(timer, 0, &every, 0);
        pthread_exit(0);
    }
    if (!strcmp(how, "forks")) pthread_create(&t, 0, forks, 0);
    if (!strcmp(how, "makes")) for (int i = 0; i < 2; i++) pthread_create(&t, 0, makes, 0);
    usleep(50000);
    return 6;
}
