// A library with a constructor that allocates, makes a thread and a mapping; with thread-local storage, opened late.
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
static char *kept;
static __thread uint32_t local[500];
static void *fills(void *p) { memset(p, 3, 70000); return p; }
__attribute__((constructor)) static void begin(void) {
    pthread_t t;
    kept = malloc(70000);
    pthread_create(&t, 0, fills, kept);
    pthread_join(t, 0);
}
__attribute__((destructor)) static void end(void) { free(kept); }
uint32_t answer(uint32_t x) {
    uint32_t s = 0;
    for (int i = 0; i < 500; i++) local[i] += x + i;
    for (int i = 0; i < 500; i++) s = s * 31 + local[i] + kept[i * 100];
    return s;
}
