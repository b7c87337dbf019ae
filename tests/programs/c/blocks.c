// Linked with the preload library: a device is given the control blocks of threads, which the kernel writes to when it serves
// no fault any more, and robust locks of threads that end. They stay home, or come home; a page of the same stack does go.
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
#include <usvm.h>
#define PAGE ((uintptr_t)4096)
#define OK(call) do { usvm_result_t r = (call); if (r) { printf("%s: %s\n", #call, usvm_result_name(r)); exit(1); } } while (0)
struct thread { pthread_t self; char *stack; sem_t ready, go; };
static usvm_space_t space;
static void *waits(void *p) {
    struct thread *t = p;
    char pages[4 * 4096];
    memset(pages, 7, sizeof pages);
    t->self = pthread_self();
    t->stack = (char *)(((uintptr_t)pages + 2 * PAGE - 1) & -PAGE);
    sem_post(&t->ready);
    while (sem_wait(&t->go)) {}
    return (void *)(intptr_t)pages[5000];
}
static int waits_too(void *p) { return (int)(intptr_t)waits(p); }
static pthread_mutex_t *locks;
static void *dies(void *p) {
    struct thread *t = p;
    for (int i = 0; i < 3; i++) pthread_mutex_lock(&locks[i]);
    sem_post(&t->ready);
    while (sem_wait(&t->go)) {}
    return p;
}
// Of the pages that hold [at, at + len), how many a device has after it was given them.
static int away(const void *at, size_t len) {
    uintptr_t from = (uintptr_t)at & -PAGE, to = ((uintptr_t)at + len + PAGE - 1) & -PAGE;
    usvm_location_t device = {USVM_LOCATION_DEVICE, 0};
    uint64_t bytes = 0;
    for (uintptr_t page = from; page < to; page += PAGE) {
        uint64_t there = 0;
        OK(usvm_prefetch(space, (void *)page, PAGE, device, NULL));
        OK(usvm_range_get_attribute(space, (void *)page, PAGE, USVM_ATTR_RESIDENT_DEVICE_BYTES, &there, sizeof there));
        bytes += there;
    }
    return bytes / PAGE;
}
static struct thread *begin(struct thread *t) { sem_init(&t->ready, 0, 0); sem_init(&t->go, 0, 0); return t; }
static struct thread threads[4];
int main(void) {
    thrd_t c[2];
    pthread_t p[2];
    // Two that are there when usvm starts, and two that begin later.
    for (int late = 0; late < 2; late++) {
        if (late) {
            usvm_device_t device;
            OK(usvm_init(NULL));
            OK(usvm_device_get(0, &device));
            OK(usvm_space_create(device, NULL, &space));
        }
        pthread_create(&p[late], 0, waits, begin(&threads[2 * late]));
        thrd_create(&c[late], waits_too, begin(&threads[2 * late + 1]));
        for (int i = 0; i < 2; i++) sem_wait(&threads[2 * late + i].ready);
    }
    // struct pthread of glibc begins where pthread_self() points to.
    for (int i = 0; i < 4; i++) printf("thread %d: %d of its block away, %d of its stack\n", i, away((void *)threads[i].self, 2304), away(threads[i].stack, PAGE));
    printf("main: %d of its block away\n", away((void *)pthread_self(), 2304));
    for (int i = 0; i < 4; i++) sem_post(&threads[i].go);
    for (int i = 0, is; i < 2; i++) { void *r; pthread_join(p[i], &r); thrd_join(c[i], &is); printf("ended %d %d\n", (int)(intptr_t)r, is); }

    locks = mmap(0, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    pthread_mutexattr_t attr;
    pthread_mutexattr_init(&attr);
    pthread_mutexattr_setrobust(&attr, PTHREAD_MUTEX_ROBUST);
    for (int i = 0; i < 3; i++) pthread_mutex_init(&locks[i], &attr);
    static struct thread owner;
    pthread_t t;
    pthread_create(&t, 0, dies, begin(&owner));
    sem_wait(&owner.ready);
    printf("locks: %d of them away\n", away(locks, PAGE));
    sem_post(&owner.go);
    pthread_join(t, 0);
    for (int i = 0; i < 3; i++) printf("lock %d: %s\n", i, pthread_mutex_trylock(&locks[i]) == EOWNERDEAD ? "its owner died" : "LOST");
    OK(usvm_space_destroy(space));
    OK(usvm_shutdown());
    return 0;
}
