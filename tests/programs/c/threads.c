// Threads that end in every way: return, pthread_exit, cancelled, detached, with TLS destructors that allocate, with
// robust and plain locks held, on stacks of their own; C11 threads; and a main thread that leaves first, so that the last
// thread's end, after its destructors, is the program's.
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <threads.h>
#include <unistd.h>

static pthread_key_t key;
static __thread char big_tls[3000];
static int destroyed;
static sem_t done;
static void destroy(void *p) { char *q = malloc(3000); memset(q, 1, 3000); __sync_fetch_and_add(&destroyed, q[2999]); free(q); free(p); }
static void *returns(void *p) { pthread_setspecific(key, malloc(100)); memset(big_tls, 7, sizeof big_tls); return (char *)p + big_tls[2999]; }
static void *exits(void *p) { pthread_setspecific(key, malloc(100)); pthread_exit((char *)p + 1); }
static void *waits(void *p) { pthread_setspecific(key, malloc(100)); for (;;) pause(); return p; }
static void *detached(void *p) { sem_post(&done); return p; }
static pthread_mutex_t *robust;
static void *dies_with_lock(void *p) { pthread_mutex_lock(robust); return p; }
static int c11(void *p) { return (int)(intptr_t)p * 2; }
static int deep(int n) { volatile char f[4000]; f[0] = n; return n ? deep(n - 1) + (f[0] == (char)n) : 0; }
static void *recurses(void *p) { return (void *)(intptr_t)deep((intptr_t)p); }
static pthread_key_t rounds;
static void once_more(void *p) { printf("the last thread's destructor, round %d\n", (int)(intptr_t)p); fflush(stdout); if ((intptr_t)p < 3) pthread_setspecific(rounds, (char *)p + 1); }
static void *last(void *p) { usleep(30000); printf("the last thread: %d destroyed\n", destroyed); fflush(stdout); pthread_setspecific(rounds, (void *)1L); return p; }

int main(void) {
    pthread_key_create(&key, destroy);
    sem_init(&done, 0, 0);
    long sum = 0;
    for (int round = 0; round < 40; round++) {
        pthread_t t[9];
        void *r;
        for (intptr_t i = 0; i < 3; i++) {
            pthread_create(&t[i], 0, returns, (void *)i);
            pthread_create(&t[3 + i], 0, exits, (void *)i);
            pthread_create(&t[6 + i], 0, waits, (void *)i);
        }
        for (int i = 6; i < 9; i++) pthread_cancel(t[i]);
        for (int i = 0; i < 9; i++) { pthread_join(t[i], &r); sum += r == PTHREAD_CANCELED ? 100 : (intptr_t)r; }
        pthread_t d;
        pthread_create(&d, 0, detached, 0);
        pthread_detach(d);
        sem_wait(&done);
        thrd_t c;
        int is;
        thrd_create(&c, c11, (void *)(intptr_t)round);
        thrd_join(c, &is);
        sum += is;
    }
    printf("sum %ld, %d destroyed\n", sum, destroyed);
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    int dead = 0;
    for (int i = 0; i < 200; i++) {
        robust = malloc(sizeof *robust);
        pthread_mutex_init(robust, &attr);
        pthread_t t;
        pthread_create(&t, 0, dies_with_lock, 0);
        pthread_join(t, 0);
        dead += pthread_mutex_lock(robust) == EOWNERDEAD;
        pthread_mutex_consistent(robust);
        pthread_mutex_unlock(robust);
        free(robust);
    }
    printf("owners dead %d\n", dead);
    pthread_attr_t own;
    pthread_attr_init(&own);
    size_t len = 1 << 20;
    void *stack = mmap(0, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_attr_setstack(&own, stack, len);
    for (int i = 0; i < 30; i++) {
        pthread_t t;
        void *r;
        pthread_create(&t, &own, recurses, (void *)200L);
        pthread_join(t, &r);
        if ((intptr_t)r != 200) printf("recursion: %ld\n", (long)(intptr_t)r);
    }
    munmap(stack, len);
    printf("main recursion %d\n", deep(1500));
    pthread_attr_t now;
    void *base;
    size_t size;
    pthread_getattr_np(pthread_self(), &now);
    pthread_attr_getstack(&now, &base, &size);
    printf("main stack %s, holds this %d\n", size >= (7u << 20) ? "large" : "SMALL", (char *)&size > (char *)base && (char *)&size < (char *)base + size);
    pthread_key_create(&rounds, once_more);
    pthread_t t;
    pthread_create(&t, 0, last, 0);
    pthread_exit(0);
}
