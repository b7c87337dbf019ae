/* usvm_shutdown while other threads are in calls: these are done or say that usvm does not run, no byte is another than the
   old or the new one, everything is home, and usvm starts again. */
#define _GNU_SOURCE
#include "check.h"
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

#define THREADS 6
#define LEN ((size_t)1 << 20)
#define ROUNDS 40

static _Atomic(usvm_space_t) space;
static atomic_int round_now, at_work;
static atomic_ulong done, refused;

static int is_over(usvm_result_t result) {
    if (result == USVM_SUCCESS) {
        atomic_fetch_add(&done, 1);
        return 0;
    }
    if (result != USVM_ERROR_NOT_RUNNING && result != USVM_ERROR_INVALID_HANDLE) {
        fprintf(stderr, "%s: %s\n", usvm_result_name(result), last_message());
        abort();
    }
    CHECK(*last_message());
    atomic_fetch_add(&refused, 1);
    return 1;
}

static void *works(void *number) {
    unsigned seed = *(unsigned *)number;
    unsigned char *data = aligned_alloc(4096, LEN), value = 0;
    CHECK(data);
    memset(data, 0, LEN);
    for (int round = 1; round <= ROUNDS; round++) {
        while (atomic_load(&round_now) < round) usleep(50);
        usvm_space_t here = atomic_load(&space);
        for (int over = 0; !over;) {
            seed = seed * 1664525u + 1013904223u;
            size_t from = (seed >> 8) % LEN, len = LEN - from;
            usvm_access_t access = {data + from, len, USVM_ACCESS_READ, 0};
            usvm_location_t device = {USVM_LOCATION_DEVICE, 0};
            usvm_fence_t fence;
            switch (seed >> 28) {
            case 0: over = is_over(usvm_prefetch(here, data + from, len, device, NULL)); break;
            case 1: over = is_over(usvm_evict(here, data + from, len)); break;
            case 2:
                over = is_over(usvm_prefetch(here, data + from, len, device, &fence));
                if (!over) over = is_over(usvm_fence_wait(fence, -1)) || is_over(usvm_fence_destroy(fence));
                break;
            case 3:
                over = is_over(usvm_begin_access(here, &access, 1, &fence));
                if (!over) over = is_over(usvm_end_access(here, fence)) || is_over(usvm_fence_destroy(fence));
                break;
            case 4: data[from] = value; break;
            default: {
                unsigned char next = (unsigned char)(value + 1);
                over = is_over(usvm_fill(here, data, next, LEN));
                for (size_t i = 0; i < LEN; i += over ? 1 : 509) CHECK(data[i] == next || (over && data[i] == value));
                if (over) memset(data, next, LEN);
                value = next;
            }
            }
        }
        for (size_t i = 0; i < LEN; i++) CHECK(data[i] == value);
        atomic_fetch_sub(&at_work, 1);
    }
    free(data);
    return NULL;
}

int main(void) {
    pthread_t threads[THREADS];
    unsigned numbers[THREADS];
    for (unsigned i = 0; i < THREADS; i++) {
        numbers[i] = i * 77 + 1;
        CHECK(pthread_create(&threads[i], NULL, works, &numbers[i]) == 0);
    }
    for (int round = 1; round <= ROUNDS; round++) {
        atomic_store(&space, open_space("vram=4M"));
        atomic_store(&at_work, THREADS);
        atomic_store(&round_now, round);
        usleep((useconds_t)(round * 731 % 30000));
        OK(usvm_shutdown());
        uint32_t count;
        CHECK(usvm_device_count(&count) == USVM_ERROR_NOT_RUNNING);
        while (atomic_load(&at_work)) usleep(50);
    }
    for (int i = 0; i < THREADS; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    CHECK(atomic_load(&refused) >= THREADS * ROUNDS);
    fprintf(stderr, "%lu calls done, %lu refused\n", atomic_load(&done), atomic_load(&refused));
    puts("shutdown: good");
    return 0;
}
