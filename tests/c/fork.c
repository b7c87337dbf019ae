/* A child of fork begins without usvm and may start it anew; the parent goes on. Also while other threads are inside. */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define LEN ((size_t)2 << 20)

static usvm_space_t space;
static atomic_int stop;

static void note(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)addr, (void)len, (void)reason;
    atomic_fetch_add((atomic_int *)user, 1);
}

static void *busy(void *arg) {
    unsigned char *at = arg;
    while (!stop) {
        usvm_fence_t fence;
        usvm_location_t device = {USVM_LOCATION_DEVICE, 0};
        OK(usvm_fill(space, at, 7, LEN));
        OK(usvm_prefetch(space, at, LEN, device, &fence));
        OK(usvm_fence_destroy(fence));
        CHECK(at[LEN - 1] == 7);
    }
    return NULL;
}

/* fork, which must not wait for what waits for its end. */
static pid_t quick_fork(void) {
    struct timespec before, after;
    clock_gettime(CLOCK_MONOTONIC, &before);
    pid_t pid = fork();
    clock_gettime(CLOCK_MONOTONIC, &after);
    CHECK(pid >= 0);
    if (pid != 0)
        CHECK(after.tv_sec - before.tv_sec < 6);
    return pid;
}

/* In the child; checks abort, and the parent sees that. */
static void child(unsigned char *mine, usvm_space_t parents, usvm_notifier_t notifier, atomic_int *told) {
    int before = *told;
    for (size_t i = 0; i < LEN; i += 4096)
        CHECK(mine[i] == 5);
    CHECK(usvm_fill(parents, mine, 1, LEN) == USVM_ERROR_NOT_RUNNING);
    CHECK(usvm_notifier_unregister(notifier) == USVM_ERROR_NOT_RUNNING);
    usvm_space_t own = open_space("vram=16M");
    CHECK(usvm_fill(parents, mine, 1, LEN) == USVM_ERROR_INVALID_HANDLE);
    OK(usvm_fill(own, mine, 6, LEN));
    CHECK(mine[LEN - 1] == 6);
    CHECK(madvise(mine, 4096, MADV_DONTNEED) == 0 && *told == before); /* the parent's notifier is the parent's */
    close_space(own);
    _exit(0);
}

/* A handler that forks, too, the first time. */
static void forks_too(void) {
    static atomic_int done;
    if (atomic_exchange(&done, 1))
        return;
    pid_t pid = fork();
    if (pid == 0)
        _exit(0);
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void) {
#ifdef __GLIBC_PREREQ
#if __GLIBC_PREREQ(2, 36) /* before, such a handler waits for itself */
    CHECK(pthread_atfork(forks_too, NULL, NULL) == 0);
#endif
#endif
    space = open_space("vram=16M");
    unsigned char *mine = usvm_malloc(LEN), *theirs = usvm_malloc(3 * LEN);
    CHECK(mine && theirs);
    memset(theirs, 7, 3 * LEN);
    atomic_int told = 0;
    usvm_notifier_t notifier;
    OK(usvm_notifier_register(space, mine, LEN, note, &told, &notifier));
    pthread_t threads[3]; /* as many requests at once as can be served, and more */
    for (int i = 0; i < 3; i++)
        pthread_create(&threads[i], NULL, busy, theirs + i * LEN);
    for (int round = 0; round < 10; round++) {
        OK(usvm_fill(space, mine, 5, LEN));
        pid_t pid = quick_fork();
        if (pid == 0)
            child(mine, space, notifier, &told);
        OK(usvm_copy(space, mine, mine + 100, LEN - 100));
        int status = 0;
        CHECK(waitpid(pid, &status, 0) == pid);
        CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    }
    stop = 1;
    for (int i = 0; i < 3; i++)
        pthread_join(threads[i], NULL);
    CHECK(mine[0] == 5);
    pid_t pid = (pid_t)syscall(SYS_clone, SIGCHLD, 0, 0, 0, 0); /* no handler runs */
    if (pid == 0)
        child(mine, space, notifier, &told);
    int status = 0;
    CHECK(waitpid(pid, &status, 0) == pid);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
    OK(usvm_notifier_unregister(notifier));
    close_space(space);
    usvm_free(mine);
    usvm_free(theirs);
    puts("fork: good");
    return 0;
}
