// Threads that are to be cancelled while they call what is no cancellation point: the call is done as a whole.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { LEN = 64 << 12, ROUNDS = 40 };

static void *map(size_t len, int prot) { return mmap(0, len, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0); }

static void *moves(void *into) {
    char *from = map(LEN, PROT_READ | PROT_WRITE), *to = map(LEN, PROT_NONE);
    memset(from, 7, LEN);
    pthread_cancel(pthread_self());
    char *moved = mremap(from, LEN, LEN, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    *(int *)into = moved == to && moved[0] == 7 && moved[LEN - 1] == 7;
    pthread_testcancel();
    return 0;
}

static void *asks(void *into) {
    pthread_attr_t attr;
    pthread_cancel(pthread_self());
    *(int *)into = pthread_getattr_np(*(pthread_t *)into, &attr) == 0;
    pthread_testcancel();
    return 0;
}

static void *starts(void *into) {
    int (*init)(void *) = dlsym(RTLD_DEFAULT, "usvm_init");
    pthread_cancel(pthread_self());
    *(int *)into = init ? init(0) == 0 : 1;
    pthread_testcancel();
    return 0;
}

int main(void) {
    int good = 0, cancelled = 0;
    void *(*what[])(void *) = { moves, asks, starts };
    for (int i = 0; i < 3 * ROUNDS; i++) {
        pthread_t t, word = pthread_self();
        void *result = 0;
        pthread_create(&t, 0, what[i % 3], &word);
        pthread_join(t, &result);
        good += (int)word == 1;
        cancelled += result == PTHREAD_CANCELED;
    }
    printf("%d calls done, %d threads cancelled\n", good, cancelled);
    return 0;
}
