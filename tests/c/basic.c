/* Each function once, as a program would use it. */
#include "check.h"

#define LEN ((size_t)8 << 20)

static const usvm_location_t HOST = {USVM_LOCATION_HOST, 0};
static const usvm_location_t DEVICE = {USVM_LOCATION_DEVICE, 0};
static const usvm_location_t NOWHERE = {USVM_LOCATION_NONE, 0};

static void check_bytes(const unsigned char *at, size_t len, int byte) {
    for (size_t i = 0; i < len; i++)
        if (at[i] != (unsigned char)byte) {
            fprintf(stderr, "byte %zu is %d, not %d\n", i, at[i], byte);
            abort();
        }
}

static void devices(void) {
    uint32_t count = 0;
    OK(usvm_device_count(&count));
    CHECK(count >= 1);
    usvm_device_t device;
    OK(usvm_device_get(0, &device));
    usvm_device_info_t info = {0};
    info.struct_size = sizeof info;
    OK(usvm_device_get_info(device, &info));
    CHECK(info.struct_size == sizeof info && strncmp(info.name, "sim", 3) == 0);
    CHECK(info.vram_bytes == (uint64_t)64 << 20 && info.vram_free_bytes <= info.vram_bytes);
    CHECK(info.cpu_visible_bytes <= info.vram_bytes && info.min_page_bytes >= 4096);
    CHECK((info.capabilities & USVM_DEVICE_CAP_SIMULATED) && (info.capabilities & USVM_DEVICE_CAP_FAULTS));
}

static void moving(usvm_space_t space, unsigned char *data, unsigned char *other) {
    memset(data, 1, LEN);
    OK(usvm_fill(space, data, 42, LEN));
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) == LEN);
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_DIRTY_BYTES) == LEN);
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_HOST_BYTES) == 0);
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_PAGE_SIZE) >= 4096);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_LOCATION).type == USVM_LOCATION_DEVICE);
    data[5] += 1;
    CHECK(data[5] == 43 && data[4] == 42);
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) < LEN);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_LOCATION).type == USVM_LOCATION_MIXED);
    data[5] -= 1;

    OK(usvm_evict(space, data, LEN));
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_LOCATION).type == USVM_LOCATION_HOST);
    check_bytes(data, LEN, 42);

    OK(usvm_copy(space, other, data, LEN));
    check_bytes(other, LEN, 42);
    for (size_t i = 0; i < 300000; i++)
        data[i] = (unsigned char)(i % 251);
    OK(usvm_copy(space, data + 1000, data, 200000));
    for (size_t i = 0; i < 200000; i++)
        CHECK(data[1000 + i] == i % 251);
    OK(usvm_copy(space, data, data + 1000, 200000));
    for (size_t i = 0; i < 200000; i++)
        CHECK(data[i] == i % 251);
    OK(usvm_fill(space, data, 300, 100));
    CHECK(data[99] == (unsigned char)300 && data[100] == 100);
    OK(usvm_fill(space, data, 0, 0));
    OK(usvm_copy(space, data, other, 0));
}

static void placing(usvm_space_t space, unsigned char *data) {
    memset(data, 7, LEN);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_PREFETCH_LOCATION).type == USVM_LOCATION_NONE);
    OK(usvm_prefetch(space, data, LEN, DEVICE, NULL));
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) == LEN);
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_DIRTY_BYTES) == 0);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_PREFETCH_LOCATION).type == USVM_LOCATION_DEVICE);

    usvm_fence_t fence;
    OK(usvm_prefetch(space, data, LEN / 2, HOST, &fence));
    OK(usvm_fence_wait(fence, -1));
    OK(usvm_fence_wait(fence, 0));
    OK(usvm_fence_destroy(fence));
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) == LEN / 2);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_PREFETCH_LOCATION).type == USVM_LOCATION_MIXED);
    check_bytes(data, LEN, 7);

    OK(usvm_prefetch(space, data, LEN, DEVICE, &fence));
    OK(usvm_fence_destroy(fence));
    check_bytes(data, LEN, 7);

    CHECK(flag_of(space, data, LEN, USVM_ATTR_READ_MOSTLY) == 0);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_SET_READ_MOSTLY, NOWHERE));
    CHECK(flag_of(space, data, LEN, USVM_ATTR_READ_MOSTLY) == 1);
    OK(usvm_advise(space, data, 4096, USVM_ADVICE_UNSET_READ_MOSTLY, NOWHERE));
    CHECK(flag_of(space, data, LEN, USVM_ATTR_READ_MOSTLY) == 0);
    CHECK(flag_of(space, data + 4096, LEN - 4096, USVM_ATTR_READ_MOSTLY) == 1);

    CHECK(place_of(space, data, LEN, USVM_ATTR_PREFERRED_LOCATION).type == USVM_LOCATION_NONE);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_SET_PREFERRED_LOCATION, HOST));
    CHECK(place_of(space, data, LEN, USVM_ATTR_PREFERRED_LOCATION).type == USVM_LOCATION_HOST);
    OK(usvm_advise(space, data, LEN / 2, USVM_ADVICE_SET_PREFERRED_LOCATION, DEVICE));
    CHECK(place_of(space, data, LEN, USVM_ATTR_PREFERRED_LOCATION).type == USVM_LOCATION_MIXED);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_UNSET_PREFERRED_LOCATION, NOWHERE));
    CHECK(place_of(space, data, LEN, USVM_ATTR_PREFERRED_LOCATION).type == USVM_LOCATION_NONE);

    OK(usvm_advise(space, data, LEN, USVM_ADVICE_SET_ACCESSED_BY, DEVICE));
    CHECK(place_of(space, data, LEN, USVM_ATTR_ACCESSED_BY).type == USVM_LOCATION_DEVICE);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_UNSET_ACCESSED_BY, NOWHERE));
    CHECK(place_of(space, data, LEN, USVM_ATTR_ACCESSED_BY).type == USVM_LOCATION_NONE);

    CHECK(flag_of(space, data, LEN, USVM_ATTR_NEED) == 0);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_WILL_NEED, DEVICE));
    CHECK(flag_of(space, data, LEN, USVM_ATTR_NEED) == USVM_ADVICE_WILL_NEED);
    CHECK(place_of(space, data, LEN, USVM_ATTR_LAST_PREFETCH_LOCATION).type == USVM_LOCATION_DEVICE);
    OK(usvm_advise(space, data, LEN, USVM_ADVICE_DONT_NEED, NOWHERE));
    CHECK(flag_of(space, data, LEN, USVM_ATTR_NEED) == USVM_ADVICE_DONT_NEED);
    check_bytes(data, LEN, 7);
}

static void accessing(usvm_space_t space, unsigned char *data, unsigned char *other) {
    usvm_access_t accesses[2] = {{data, LEN, USVM_ACCESS_WRITE, 0}, {other, 5000, USVM_ACCESS_READ, 0}};
    OK(usvm_begin_access(space, accesses, 2, NULL));
    OK(usvm_begin_access(space, accesses, 1, NULL));
    CHECK(bytes_of(space, data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) == LEN);
    OK(usvm_end_access(space, NULL));
    OK(usvm_end_access(space, NULL));

    usvm_fence_t fence, second;
    OK(usvm_begin_access(space, accesses, 2, &fence));
    OK(usvm_begin_access(space, accesses + 1, 1, &second));
    OK(usvm_fence_wait(fence, -1));
    OK(usvm_fence_wait(second, -1));
    OK(usvm_end_access(space, fence));
    OK(usvm_fence_destroy(fence));
    OK(usvm_fence_destroy(second));
    data[0] = 1; /* would wait for ever if it were still held */

    /* What only shares its pages or its range with what is held stays usable, by the holder, too. */
    struct {
        char before[300], held[200], after[300];
        usvm_fence_t fence;
    } *mixed = malloc(sizeof *mixed);
    CHECK(mixed != NULL);
    memset(mixed, 1, sizeof *mixed);
    usvm_access_t small = {mixed->held, sizeof mixed->held, USVM_ACCESS_WRITE, 0};
    OK(usvm_begin_access(space, &small, 1, NULL));
    OK(usvm_begin_access(space, &small, 1, &mixed->fence));
    mixed->before[0] = mixed->after[0] = 2;
    char *more = malloc(5000);
    CHECK(more != NULL);
    memset(more, 1, 5000);
    free(more);
    OK(usvm_fence_wait(mixed->fence, -1));
    OK(usvm_end_access(space, mixed->fence));
    OK(usvm_end_access(space, NULL));
    OK(usvm_fence_destroy(mixed->fence));
    OK(usvm_fill(space, mixed->held, 3, sizeof mixed->held));
    CHECK(mixed->before[0] == 2 && mixed->before[299] == 1 && mixed->held[199] == 3 && mixed->after[0] == 2);
    free(mixed);
}

static void counting(usvm_space_t space) {
    usvm_stats_t stats;
    stats.size = sizeof stats;
    OK(usvm_stats_get(space, &stats));
    CHECK(stats.size == sizeof stats && stats.version == USVM_STATS_VERSION);
    CHECK(stats.bytes_to_device > 0 && stats.gpu_faults > 0 && stats.cpu_faults > 0 && stats.flips > 0);

    size_t size = 0;
    OK(usvm_stats_get_json(space, NULL, &size));
    CHECK(size > 100);
    size_t small = 10;
    char tiny[10];
    CHECK(usvm_stats_get_json(space, tiny, &small) == USVM_ERROR_BUFFER_TOO_SMALL && small > 100);
    size += 200; /* the numbers may have grown meanwhile */
    char *json = malloc(size);
    CHECK(json != NULL);
    OK(usvm_stats_get_json(space, json, &size));
    CHECK(size == strlen(json) + 1 && strstr(json, "\"bytes_to_device\":") && strstr(json, "\"fault_us_p99\":"));
    free(json);

    OK(usvm_stats_reset(space));
    OK(usvm_stats_get(space, &stats));
    CHECK(stats.bytes_to_device == 0 && stats.cpu_faults == 0 && stats.flips == 0 && stats.flip_fallbacks == 0);
}

static void allocating(usvm_space_t space) {
    char *small = usvm_malloc(10), *none = usvm_malloc(0);
    CHECK(small && none && usvm_usable_size(small) >= 10 && usvm_usable_size(NULL) == 0);
    memcpy(small, "123456789", 10);
    small = usvm_realloc(small, 5 << 20);
    CHECK(small && strcmp(small, "123456789") == 0 && usvm_usable_size(small) >= 5 << 20);
    OK(usvm_fill(space, small, 'x', 5 << 20));
    small = usvm_realloc(small, 6 << 20);
    CHECK(small && small[(5 << 20) - 1] == 'x');
    small = usvm_realloc(small, 3);
    CHECK(small && small[2] == 'x');
    char *zeros = usvm_calloc(1000, 5000);
    CHECK(zeros && zeros[0] == 0 && zeros[4999999] == 0);
    char *aligned = usvm_aligned_alloc(1 << 16, 100);
    CHECK(aligned && (uintptr_t)aligned % (1 << 16) == 0);
    char *large = usvm_malloc(4 << 20);
    CHECK(large && (uintptr_t)large % (2 << 20) == 0);
    usvm_free(small);
    usvm_free(none);
    usvm_free(zeros);
    usvm_free(aligned);
    usvm_free(large);
    usvm_free(NULL);
}

int main(void) {
    CHECK(usvm_version() == USVM_VERSION);
    CHECK(strcmp(usvm_result_name(USVM_ERROR_BUSY), "USVM_ERROR_BUSY") == 0);
    CHECK(strcmp(last_message(), "") == 0);

    usvm_space_t space = open_space("vram=64M");
    unsigned char *data = usvm_aligned_alloc(2 << 20, LEN), *other = malloc(LEN);
    CHECK(data && other);
    memset(other, 3, LEN);

    devices();
    moving(space, data, other);
    placing(space, data);
    OK(usvm_set_policy(space, "gpusvm"));
    OK(usvm_set_policy(space, "adaptive"));
    accessing(space, data, other);
    counting(space);
    allocating(space);

    OK(usvm_fill(space, data, 9, LEN));
    OK(usvm_discard(space, data + 4096, LEN - 8192));
    CHECK(data[0] == 9 && data[LEN - 1] == 9);

    OK(usvm_init(NULL)); /* counted */
    OK(usvm_shutdown());
    OK(usvm_fill(space, data, 5, LEN));
    close_space(space);
    check_bytes(data, LEN, 5); /* shutdown brought it home */
    CHECK(usvm_shutdown() == USVM_ERROR_NOT_RUNNING);

    space = open_space(NULL); /* and again */
    OK(usvm_fill(space, data, 6, LEN));
    close_space(space);
    check_bytes(data, LEN, 6);
    usvm_free(data);
    free(other);
    puts("basic: good");
    return 0;
}
