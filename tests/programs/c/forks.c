// fork from threads, fork of a fork, vfork, posix_spawn, system, popen, exec of itself; children that exit, _exit,
// abort, live on, make threads of their own.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>
extern char **environ;

static uint32_t *data;
enum { WORDS = 1 << 16 };
static uint32_t sum(void) { uint32_t s = 0; for (int i = 0; i < WORDS; i++) s = s * 31 + data[i]; return s; }
static void *other(void *p) { for (int i = 0; i < 100; i++) { void *q = malloc(5000); memset(q, i, 5000); free(q); } return p; }
static int code(pid_t pid) { int st = 0; waitpid(pid, &st, 0); return WIFEXITED(st) ? WEXITSTATUS(st) : -WTERMSIG(st); }
static int child(int how) {
    pid_t pid = fork();
    if (pid) return code(pid);
    for (int i = 0; i < WORDS; i++) data[i] ^= how;
    if (how == 1) { usleep(15000); pthread_t t[3]; for (int i = 0; i < 3; i++) pthread_create(&t[i], 0, other, 0); for (int i = 0; i < 3; i++) pthread_join(t[i], 0); }
    if (how == 2) { pid_t inner = fork(); if (!inner) { usleep(8000); _exit(sum() & 63); } if (code(inner) != (sum() & 63)) _exit(99); }
    if (how == 3) { signal(SIGABRT, SIG_DFL); abort(); }
    if (how == 4) exit(sum() & 63);
    _exit(sum() & 63);
}
static void *forker(void *p) {
    static __thread uint32_t mine[100];
    for (int i = 0; i < 100; i++) mine[i] = i;
    intptr_t bad = 0;
    for (int i = 0; i < 12; i++) {
        pid_t pid = fork();
        if (!pid) { uint32_t s = 0; for (int k = 0; k < 100; k++) s += mine[k]; _exit(s == 4950 ? 5 : 6); }
        bad += code(pid) != 5;
        (void)p;
    }
    return (void *)bad;
}
int main(int argc, char **argv) {
    if (argc > 1) { printf("exec'ed %s\n", argv[1]); return 3; }
    setvbuf(stdout, 0, _IONBF, 0);
    data = malloc(WORDS * 4);
    for (uint32_t i = 0; i < WORDS; i++) data[i] = i * 2654435761u;
    for (int how = 0; how < 5; how++) printf("child %d: %d\n", how, child(how));
    pthread_t t[3];
    for (int i = 0; i < 3; i++) pthread_create(&t[i], 0, forker, 0);
    intptr_t bad = 0;
    for (int i = 0; i < 3; i++) { void *r; pthread_join(t[i], &r); bad += (intptr_t)r; }
    printf("bad children of threads: %ld\n", (long)bad);
    for (int i = 0; i < 20; i++) {
        pid_t pid = vfork();
        if (pid == 0) { if (i % 2) _exit(9); execl(argv[0], argv[0], "by vfork", (char *)0); _exit(98); }
        int is = code(pid);
        if (is != (i % 2 ? 9 : 3)) printf("vfork %d: %d\n", i, is);
    }
    for (int i = 0; i < 10; i++) {
        pid_t pid;
        char *args[] = {argv[0], "by spawn", 0};
        if (posix_spawn(&pid, argv[0], 0, 0, args, environ)) puts("no spawn"); else if (code(pid) != 3) puts("spawn failed");
    }
    printf("system: %d\n", system("exit 4"));
    FILE *p = popen("echo popen; cat", "w");
    fputs("through the pipe\n", p);
    printf("pclose: %d\n", pclose(p));
    printf("sum %08x\n", sum());
    fflush(stdout);
    execl(argv[0], argv[0], "at last", (char *)0);
}
