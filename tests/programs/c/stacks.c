/* Threads with stacks of many sizes that nobody keeps: the C library frees what it kept for some when others end, after all
   destructors of those have run. Whoever serves malloc must not begin anything for a thread then. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { THREADS = 6000, AT_ONCE = 24 };
static int living, sum;

static void *body(void *arg) {
    unsigned n = (unsigned)(size_t)arg;
    if (n % 3 == 0) {
        char *block = malloc(n % 7 == 0 ? 100000 : 100);
        memset(block, (int)n, 100);
        __atomic_add_fetch(&sum, block[n % 100], __ATOMIC_RELAXED);
        free(block);
    }
    __atomic_sub_fetch(&living, 1, __ATOMIC_RELEASE);
    return NULL;
}

int main(void) {
    for (unsigned n = 0; n < THREADS; n++) {
        while (__atomic_load_n(&living, __ATOMIC_ACQUIRE) >= AT_ONCE) usleep(50);
        pthread_attr_t attr;
        pthread_t thread;
        pthread_attr_init(&attr);
        pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
        pthread_attr_setstacksize(&attr, (256u << 10) << n % 6);
        __atomic_add_fetch(&living, 1, __ATOMIC_RELAXED);
        while (pthread_create(&thread, &attr, body, (void *)(size_t)n) != 0) usleep(1000);
        pthread_attr_destroy(&attr);
    }
    while (__atomic_load_n(&living, __ATOMIC_ACQUIRE) > 0) usleep(100);
    printf("stacks: %d\n", sum);
    return 0;
}
