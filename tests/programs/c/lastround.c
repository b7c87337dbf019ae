// Destructors of thread-specific data that allocate in every round, also in the last: what such threads leave is little.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static pthread_key_t early, late;
static long ran;
static void *kept[60];
static void use(void) {
    void *blocks[60];
    for (int i = 0; i < 60; i++) memset(blocks[i] = malloc(16 + i * 500), i, 16 + i * 500);
    for (int i = 0; i < 60; i++) free(blocks[i]);
}
static void of_early(void *value) { use(); __atomic_add_fetch(&ran, 1, __ATOMIC_RELAXED); pthread_setspecific(early, value); }
static void of_late(void *value) { use(); __atomic_add_fetch(&ran, 1, __ATOMIC_RELAXED); pthread_setspecific(late, value); }
static void *work(void *which) {
    use();
    for (int i = 0; i < 60; i++) memset(kept[i] = malloc(16 + i * 500), i, 16 + i * 500);
    if ((long)which != 1) pthread_setspecific(early, &early);
    if ((long)which != 0) pthread_setspecific(late, &late);
    return 0;
}
static long pages(void) {
    long all, resident;
    FILE *file = fopen("/proc/self/statm", "r");
    if (!file || fscanf(file, "%ld %ld", &all, &resident) != 2) exit(1);
    fclose(file);
    return resident;
}
// Before the C library's malloc, or another, makes a key of its own.
__attribute__((constructor)) static void first(void) { pthread_key_create(&early, of_early); }
int main(void) {
    use();
    pthread_key_create(&late, of_late);
    long before = 0;
    for (long n = 0; n < 400; n++) {
        pthread_t thread;
        pthread_create(&thread, 0, work, (void *)(n % 3));
        pthread_join(thread, 0);
        for (int i = 0; i < 60; i++) free(kept[i]);
        if (n == 30) before = pages();
    }
    printf("%ld rounds, grew by less than 32 MiB: %d\n", ran, pages() - before < 8192);
    return 0;
}
