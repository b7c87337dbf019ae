/* Two devices, named by the environment, that use the same memory in turn and each its own. */
#include "check.h"
#include <pthread.h>

#define LEN ((size_t)8 << 20)

static usvm_space_t spaces[2];

static usvm_location_t place(unsigned device) {
    usvm_location_t at = {USVM_LOCATION_DEVICE, device};
    return at;
}

static void check_all(const unsigned char *at, size_t len, int byte) {
    for (size_t i = 0; i < len; i++) CHECK(at[i] == byte);
}

/* What one device wrote the other reads and changes, and the CPU sees; each time the memory is where it was used last. */
static void in_turn(unsigned char *data, unsigned char *other) {
    memset(data, 1, LEN);
    for (unsigned round = 0; round < 6; round++) {
        usvm_space_t space = spaces[round % 2];
        OK(usvm_fill(space, data, 10 + round, LEN));
        usvm_location_t at = place_of(space, data, LEN, USVM_ATTR_LAST_LOCATION);
        CHECK(at.type == USVM_LOCATION_DEVICE && at.id == round % 2);
        OK(usvm_copy(spaces[(round + 1) % 2], other, data, LEN));
        check_all(other, LEN, 10 + round);
        if (round % 3 == 2) {
            check_all(data, LEN, 10 + round);
            data[round] = 0;
        }
    }
    for (unsigned device = 0; device < 2; device++) {
        OK(usvm_prefetch(spaces[device], data, LEN, place(1 - device), NULL));
        usvm_location_t at = place_of(spaces[device], data, LEN, USVM_ATTR_LAST_LOCATION);
        CHECK(at.type == USVM_LOCATION_DEVICE && at.id == 1 - device);
        CHECK(bytes_of(spaces[device], data, LEN, USVM_ATTR_RESIDENT_DEVICE_BYTES) == LEN);
    }
    usvm_location_t nowhere = {USVM_LOCATION_DEVICE, 2};
    CHECK(usvm_prefetch(spaces[0], data, LEN, nowhere, NULL) == USVM_ERROR_INVALID_ARGUMENT);
    check_all(data, 5, 15);
}

static unsigned char *half;

/* Each device on its own half of every 2 MiB, at the same time. */
static void *works(void *of) {
    size_t mine = *(unsigned *)of;
    for (int round = 0; round < 40; round++)
        for (size_t at = 0; at < LEN; at += 2 << 20)
            OK(usvm_fill(spaces[mine], half + at + (mine << 20), (int)(round * 2 + (int)mine), 1 << 20));
    return NULL;
}

static void at_once(unsigned char *data) {
    half = data;
    pthread_t threads[2];
    unsigned which[2] = {0, 1};
    for (int i = 0; i < 2; i++) CHECK(pthread_create(&threads[i], NULL, works, &which[i]) == 0);
    for (int i = 0; i < 2; i++) CHECK(pthread_join(threads[i], NULL) == 0);
    for (size_t at = 0; at < LEN; at += 1 << 20) check_all(data + at, 1 << 20, 78 + (int)(at >> 20 & 1));
}

int main(void) {
    OK(usvm_init(NULL));
    uint32_t count = 0;
    OK(usvm_device_count(&count));
    CHECK(count == 2);
    const char *names[] = {"arc-a770", "max-1550"};
    for (uint32_t i = 0; i < 2; i++) {
        usvm_device_t device;
        usvm_device_info_t info = {0};
        info.struct_size = sizeof info;
        OK(usvm_device_get(i, &device));
        OK(usvm_device_get_info(device, &info));
        CHECK(strstr(info.name, names[i]) && info.vram_bytes == (uint64_t)32 << 20);
        OK(usvm_space_create(device, NULL, &spaces[i]));
    }
    usvm_device_t third;
    CHECK(usvm_device_get(2, &third) == USVM_ERROR_INVALID_ARGUMENT);
    unsigned char *data = usvm_malloc(LEN), *other = usvm_malloc(LEN);
    CHECK(data && other);
    in_turn(data, other);
    at_once(data);
    usvm_free(data);
    usvm_free(other);
    for (int i = 0; i < 2; i++) OK(usvm_space_destroy(spaces[i]));
    OK(usvm_shutdown());
    puts("devices: good");
    return 0;
}
