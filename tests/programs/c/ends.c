// Leaves in the way argv[1] says while other threads touch memory all the time. argv: how, code.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char *data;
static void *touches(void *p) { for (unsigned s = 1;; s = s * 1103515245 + 12345) data[s % (8 << 20)]++; return p; }
static void *leaves(void *p) { usleep(60000); exit(*(int *)p); }
static void at_exit(void) { puts("at exit"); for (int i = 0; i < 100; i++) { char *p = malloc(100000); memset(p, i, 100000); free(p); } }
int main(int argc, char **argv) {
    if (argc < 3) return 2;
    int code = atoi(argv[2]);
    atexit(at_exit);
    at_quick_exit(at_exit);
    data = malloc(8 << 20);
    pthread_t t;
    for (int i = 0; i < 3; i++) pthread_create(&t, 0, touches, 0);
    usleep(100000);
    puts("leaving");
    fflush(stdout);
    if (!strcmp(argv[1], "return")) return code;
    if (!strcmp(argv[1], "exit")) exit(code);
    if (!strcmp(argv[1], "_exit")) _exit(code);
    if (!strcmp(argv[1], "quick")) quick_exit(code);
    if (!strcmp(argv[1], "thread")) { pthread_create(&t, 0, leaves, &code); pause(); }
    if (!strcmp(argv[1], "abort")) abort();
    if (!strcmp(argv[1], "kill")) kill(getpid(), SIGKILL);
    return 1;
}
