/* The library loaded while the program runs, as scripting languages do: nothing of it may need the little static storage that
 * is left for threads then, neither for those that run already nor for new ones. */
#include <dlfcn.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdio.h>
#include <string.h>

static void *(*take)(size_t);
static void (*give)(void *);
static int (*begin)(const void *);
static int (*end)(void);
static sem_t loaded;

/* ISO C has no conversion from what dlsym gives; POSIX promises that the bits are right. */
static int find(void *library) {
    void *found[] = {dlsym(library, "usvm_malloc"), dlsym(library, "usvm_free"), dlsym(library, "usvm_init"),
                     dlsym(library, "usvm_shutdown")};
    memcpy(&take, &found[0], sizeof take);
    memcpy(&give, &found[1], sizeof give);
    memcpy(&begin, &found[2], sizeof begin);
    memcpy(&end, &found[3], sizeof end);
    return take != NULL && give != NULL && begin != NULL && end != NULL;
}

static int use(void) {
    static const size_t sizes[] = {10, 5000, 40000, 3 << 20};
    for (int i = 0; i < 200; i++) {
        size_t size = sizes[i % 4];
        char *block = take(size);
        if (block == NULL)
            return 0;
        memset(block, i, i % 40 == 3 || size < 100000 ? size : 1);
        give(block);
    }
    return 1;
}

/* Runs since before the library was loaded, if wait is not NULL. */
static void *user(void *wait) {
    if (wait != NULL)
        sem_wait(wait);
    return use() ? &loaded : NULL;
}

int main(int argc, char **argv) {
    pthread_t threads[8];
    void *good;
    sem_init(&loaded, 0, 0);
    for (int i = 0; i < 4; i++)
        pthread_create(&threads[i], NULL, user, &loaded);
    void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library == NULL) {
        fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "usage: late LIBRARY");
        return 1;
    }
    if (!find(library) || begin(NULL) != 0)
        return 2;
    for (int i = 4; i < 8; i++)
        pthread_create(&threads[i], NULL, user, NULL);
    for (int i = 0; i < 4; i++)
        sem_post(&loaded);
    if (!use())
        return 3;
    for (int i = 0; i < 8; i++)
        if (pthread_join(threads[i], &good) != 0 || good == NULL)
            return 4;
    if (end() != 0)
        return 5;
    puts("late: good");
    return 0;
}
