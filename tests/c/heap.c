/*
 * usvm_malloc and its family: shapes, errors, and that freeing what is on the device moves nothing.
 *
 *     heap              linked with libusvm
 *     heap preloaded    under libusvm_preload.so, too: the heap is libusvm.so's, all else the preload library's
 */
#define _GNU_SOURCE
#include "check.h"
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <sys/wait.h>
#include <unistd.h>

#define M2 ((size_t)2 << 20)

static usvm_space_t space;
static const usvm_location_t DEVICE = {USVM_LOCATION_DEVICE, 0};

static const size_t SIZES[] = {64,     1000,       4096,         32768,        32769, 100000,
                               M2 - 1, M2, M2 + 4096, 3 << 20, (size_t)9 << 20};
enum { COUNT = sizeof SIZES / sizeof *SIZES };

static usvm_stats_t now(void) {
    usvm_stats_t stats;
    stats.size = sizeof stats;
    OK(usvm_stats_get(space, &stats));
    return stats;
}

static void nothing_moved(usvm_stats_t before) {
    usvm_stats_t after = now();
    CHECK(after.bytes_to_host == before.bytes_to_host);
    CHECK(after.bytes_to_device == before.bytes_to_device);
}

/* Freed on the device, taken again and freed again there. */
static void free_moves_nothing(size_t size) {
    unsigned char *block = usvm_malloc(size);
    CHECK(block != NULL);
    memset(block, 7, size);
    usvm_stats_t home = now();
    OK(usvm_prefetch(space, block, size, DEVICE, NULL));
    usvm_stats_t there = now();
    CHECK(there.bytes_to_device >= home.bytes_to_device + size);
    /* A fault of the memset that is served late finds its page away, and fetches it. */
    for (int n = 0; n < 50 && bytes_of(space, block, size, USVM_ATTR_RESIDENT_DEVICE_BYTES) < size; n++)
        OK(usvm_prefetch(space, block, size, DEVICE, NULL));
    CHECK(bytes_of(space, block, size, USVM_ATTR_RESIDENT_DEVICE_BYTES) >= size);
    there = now();
    usvm_free(block);
    nothing_moved(there);
    unsigned char *again = usvm_malloc(size);
    CHECK(again != NULL);
    usvm_free(again);
    nothing_moved(there);
    /* And it is ordinary memory again. */
    again = usvm_calloc(1, size);
    CHECK(again != NULL);
    for (size_t i = 0; i < size; i++)
        CHECK(again[i] == 0);
    usvm_free(again);
}

static void shapes(void) {
    for (int i = 0; i < COUNT; i++) {
        unsigned char *block = usvm_malloc(SIZES[i]), *next = usvm_malloc(SIZES[i]);
        size_t usable = usvm_usable_size(block);
        CHECK((uintptr_t)block % 16 == 0 && usable >= SIZES[i] && usable < 2 * SIZES[i] + M2);
        CHECK(block + usable <= next || next + usvm_usable_size(next) <= block);
        if (SIZES[i] >= M2)
            CHECK((uintptr_t)block % M2 == 0 && usable % M2 == 0);
        memset(block, 1, usable);
        memset(next, 2, usvm_usable_size(next));
        CHECK(block[0] == 1 && block[usable - 1] == 1);
        usvm_free(block);
        usvm_free(next);
    }
    for (size_t alignment = 1; alignment <= 2 * M2; alignment *= 2)
        for (int i = 0; i < COUNT; i++) {
            unsigned char *block = usvm_aligned_alloc(alignment, SIZES[i]);
            CHECK(block != NULL && (uintptr_t)block % alignment == 0 && usvm_usable_size(block) >= SIZES[i]);
            block[0] = block[SIZES[i] - 1] = 3;
            usvm_free(block);
        }
    CHECK(usvm_usable_size(NULL) == 0);
    usvm_free(NULL);
}

/* Through all sizes up and down, on the device each time. */
static void resizing(void) {
    size_t had = 1;
    unsigned char *block = usvm_realloc(NULL, had);
    CHECK(block != NULL);
    block[0] = 11;
    for (int i = 0; i < 2 * COUNT; i++) {
        size_t size = SIZES[i < COUNT ? i : 2 * COUNT - 1 - i];
        OK(usvm_prefetch(space, block, had, DEVICE, NULL));
        block = usvm_realloc(block, size);
        CHECK(block != NULL && usvm_usable_size(block) >= size);
        for (size_t k = 0; k < (had < size ? had : size); k += 61)
            CHECK(block[k] == (unsigned char)(k * 3 + 11));
        for (size_t k = 0; k < size; k++)
            block[k] = (unsigned char)(k * 3 + 11);
        had = size;
    }
    usvm_free(block);
}

/* Also where the heap and usvm_last_error are of different libraries. */
static void errors(void) {
    volatile size_t huge = SIZE_MAX - 5;
    errno = 0;
    CHECK(usvm_malloc(huge) == NULL && errno == ENOMEM && strncmp(last_message(), "size: ", 6) == 0);
    CHECK(usvm_calloc(huge, 3) == NULL && errno == ENOMEM && strncmp(last_message(), "count: ", 7) == 0);
    CHECK(usvm_aligned_alloc(24, 8) == NULL && errno == EINVAL);
    CHECK(strcmp(last_message(), "alignment: 24 is not a power of two") == 0);
    char *block = usvm_malloc(10);
    CHECK(usvm_realloc(block, huge) == NULL && errno == ENOMEM);
    usvm_free(block);
}

/* Each thread frees what its neighbour made, and what it made may be on the device by then. */
enum { THREADS = 4, EACH = 200 };
static unsigned char *_Atomic made[THREADS][EACH];

static void *maker(void *arg) {
    size_t own = (size_t)(uintptr_t)arg;
    for (int i = 0; i < EACH; i++) {
        size_t size = SIZES[(i + (int)own) % (COUNT - 1)] / 2 + 1;
        unsigned char *block = usvm_malloc(size);
        CHECK(block != NULL);
        block[0] = block[size - 1] = (unsigned char)i;
        if (i % 8 == 0)
            OK(usvm_prefetch(space, block, size, DEVICE, NULL));
        made[own][i] = block;
    }
    for (int i = 0; i < EACH; i++) {
        unsigned char *block;
        while (!(block = made[(own + 1) % THREADS][i]))
            usleep(100);
        if (i % 2)
            CHECK(block[0] == (unsigned char)i);
        usvm_free(block);
    }
    return NULL;
}

static void threads(void) {
    pthread_t all[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        CHECK(pthread_create(&all[i], NULL, maker, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(all[i], NULL);
}

static void in_a_child(void) {
    unsigned char *block = usvm_malloc(M2);
    block[M2 - 1] = 5;
    OK(usvm_prefetch(space, block, M2, DEVICE, NULL));
    pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
        unsigned char *own = usvm_calloc(3, M2);
        CHECK(own != NULL && own[3 * M2 - 1] == 0 && block[M2 - 1] == 5);
        usvm_free(own);
        usvm_free(block);
        _exit(37);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 37);
    CHECK(block[M2 - 1] == 5);
    usvm_free(block);
}

#ifdef SHARED
static void is_from(const char *function, const char *library) {
    Dl_info info;
    void *at = dlsym(RTLD_DEFAULT, function);
    CHECK(at != NULL && dladdr(at, &info) != 0);
    CHECK(strstr(info.dli_fname, library) != NULL);
}
#endif

int main(int argc, char **argv) {
    char *early = usvm_malloc(M2); /* needs no usvm_init */
    early[0] = 1;
    (void)argc, (void)argv;
#ifdef SHARED
    int preloaded = argc == 2 && strcmp(argv[1], "preloaded") == 0;
    is_from("usvm_malloc", "libusvm.so");
    is_from("usvm_init", preloaded ? "libusvm_preload.so" : "libusvm.so");
    is_from("usvm_last_error", preloaded ? "libusvm_preload.so" : "libusvm.so");
#endif
    errors();
    space = open_space("vram=64M");
    for (int i = 0; i < COUNT; i++)
        free_moves_nothing(SIZES[i]);
    shapes();
    resizing();
    errors();
    threads();
    in_a_child();
    CHECK(early[0] == 1);
    close_space(space);
    usvm_free(early);
    puts("heap: good");
    return 0;
}
