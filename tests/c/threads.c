/* Eight threads call everything at once, on memory of their own and on handles of each other. Every byte is checked. */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>

#define THREADS 8
#define LEN ((size_t)1 << 20)

static usvm_space_t space;
static usvm_device_t device;
static const usvm_location_t PLACES[2] = {{USVM_LOCATION_HOST, 0}, {USVM_LOCATION_DEVICE, 0}};
static _Atomic(void *) shared_fence, shared_notifier;
static atomic_uint told;
static int rounds = 300;

static unsigned dice(unsigned *state, unsigned sides) {
    *state = *state * 1664525u + 1013904223u;
    return (*state >> 8) % sides;
}

static void note(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)addr, (void)len;
    CHECK(reason >= USVM_NOTIFY_UNMAP && reason <= USVM_NOTIFY_MIGRATE);
    atomic_fetch_add((atomic_uint *)user, 1);
}

/* Work on one thread's memory, of which every byte is known. */
static void step(unsigned *seed, unsigned char *at, unsigned char *known) {
    size_t from = dice(seed, LEN - 70000), len = 1 + dice(seed, 70000), to = dice(seed, LEN - 70000);
    usvm_fence_t fence;
    switch (dice(seed, 12)) {
    case 0:
    case 1:
        OK(usvm_fill(space, at + from, (int)from, len));
        memset(known + from, (int)from, len);
        break;
    case 2:
    case 3:
        OK(usvm_copy(space, at + to, at + from, len));
        memmove(known + to, known + from, len);
        break;
    case 4:
        OK(usvm_prefetch(space, at + from, len, PLACES[dice(seed, 2)], NULL));
        break;
    case 5:
        OK(usvm_prefetch(space, at + from, len, PLACES[dice(seed, 2)], &fence));
        if (dice(seed, 2))
            OK(usvm_fence_wait(fence, -1));
        OK(usvm_fence_destroy(fence));
        break;
    case 6: {
        usvm_access_t access = {at + from, len, USVM_ACCESS_WRITE, 0};
        OK(usvm_begin_access(space, &access, 1, NULL));
        OK(usvm_end_access(space, NULL));
        break;
    }
    case 7: {
        usvm_access_t access = {at + from, len, USVM_ACCESS_READ, 0};
        OK(usvm_begin_access(space, &access, 1, &fence));
        if (dice(seed, 2))
            OK(usvm_fence_wait(fence, -1));
        if (dice(seed, 2))
            OK(usvm_end_access(space, fence));
        OK(usvm_fence_destroy(fence));
        break;
    }
    case 8:
        OK(usvm_evict(space, at + from, len));
        break;
    case 9: {
        usvm_advice_t advice = (usvm_advice_t)(1 + dice(seed, 8));
        OK(usvm_advise(space, at + from, len, advice, PLACES[1]));
        break;
    }
    case 10:
        for (int i = 1; i <= 12; i++) {
            char answer[8];
            size_t size = i == USVM_ATTR_READ_MOSTLY || i == USVM_ATTR_NEED ? 4 : 8;
            OK(usvm_range_get_attribute(space, at + from, len, (usvm_attr_t)i, answer, size));
        }
        break;
    default:
        for (size_t i = from; i < from + len; i += 997) {
            CHECK(at[i] == known[i]);
            at[i] = known[i] = (unsigned char)(i + len);
        }
    }
}

/* What others may destroy at any moment: the answers may be anything but wrong. */
static void meddle(unsigned *seed, unsigned char *at) {
    usvm_fence_t fence = shared_fence;
    usvm_notifier_t notifier = shared_notifier;
    usvm_result_t result = USVM_SUCCESS;
    switch (dice(seed, 6)) {
    case 0:
        OK(usvm_prefetch(space, at, LEN, PLACES[dice(seed, 2)], &fence));
        fence = (usvm_fence_t)atomic_exchange(&shared_fence, (void *)fence);
        if (fence)
            result = usvm_fence_destroy(fence);
        break;
    case 1:
        result = usvm_fence_wait(fence, dice(seed, 2) ? -1 : 1000);
        break;
    case 2:
        result = usvm_fence_destroy(fence);
        break;
    case 3:
        OK(usvm_notifier_register(space, at, LEN, note, &told, &notifier));
        notifier = (usvm_notifier_t)atomic_exchange(&shared_notifier, (void *)notifier);
        if (notifier)
            result = usvm_notifier_unregister(notifier);
        break;
    case 4:
        result = usvm_notifier_unregister(notifier);
        break;
    default: {
        usvm_space_t other;
        OK(usvm_space_create(device, NULL, &other));
        usvm_access_t access = {at, LEN / 4, USVM_ACCESS_READ, 0};
        OK(usvm_begin_access(other, &access, 1, dice(seed, 2) ? &fence : NULL));
        OK(usvm_space_destroy(other)); /* with the access open */
        OK(usvm_init(NULL));
        OK(usvm_set_policy(space, dice(seed, 2) ? "gpusvm" : "adaptive"));
        OK(usvm_shutdown());
    }
    }
    CHECK(result == USVM_SUCCESS || result == USVM_ERROR_INVALID_HANDLE || result == USVM_ERROR_TIMEOUT);
}

static void *hammer(void *arg) {
    unsigned seed = 77u * (unsigned)(uintptr_t)arg;
    unsigned char *known = malloc(LEN);
    unsigned char *at = dice(&seed, 2) ? usvm_malloc(LEN) : malloc(LEN);
    CHECK(known && at);
    memset(known, 9, LEN);
    memset(at, 9, LEN);
    for (int round = 0; round < rounds; round++) {
        step(&seed, at, known);
        if (dice(&seed, 4) == 0)
            meddle(&seed, at);
        if (dice(&seed, 8) == 0) {
            unsigned char *short_lived = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            CHECK(short_lived != MAP_FAILED);
            OK(usvm_fill(space, short_lived, 4, 100000));
            CHECK(short_lived[99999] == 4 && short_lived[100000] == 0);
            CHECK(munmap(short_lived, LEN) == 0);
        }
    }
    CHECK(memcmp(at, known, LEN) == 0);
    return NULL; /* the block stays: another thread may have a notifier on it */
}

int main(int argc, char **argv) {
    if (argc > 1)
        rounds = atoi(argv[1]);
    space = open_space("vram=8M");
    OK(usvm_device_get(0, &device));
    pthread_t threads[THREADS];
    for (uintptr_t i = 0; i < THREADS; i++)
        pthread_create(&threads[i], NULL, hammer, (void *)(i + 1));
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    close_space(space);
    CHECK(told > 0);
    puts("threads: good");
    return 0;
}
