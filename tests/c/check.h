/* What the C tests share: a check that says what went wrong, and memory. */
#ifndef USVM_TESTS_CHECK_H
#define USVM_TESTS_CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <usvm.h>

#define CHECK(condition)                                                                                               \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: not so: %s (last error: %s)\n", __FILE__, __LINE__, #condition, last_message());   \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define OK(call)                                                                                                       \
    do {                                                                                                               \
        usvm_result_t result_ = (call);                                                                                \
        if (result_ != USVM_SUCCESS) {                                                                                 \
            fprintf(stderr, "%s:%d: %s: %s: %s\n", __FILE__, __LINE__, #call, usvm_result_name(result_),               \
                    last_message());                                                                                   \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

static inline const char *last_message(void) {
    const char *message = NULL;
    usvm_last_error(&message, NULL);
    return message;
}

/* A space on device 0, with usvm initialised for it. */
static inline usvm_space_t open_space(const char *options) {
    usvm_config_t config = {sizeof config, options, 0, 0};
    usvm_device_t device;
    usvm_space_t space;
    OK(usvm_init(&config));
    OK(usvm_device_get(0, &device));
    OK(usvm_space_create(device, NULL, &space));
    return space;
}

static inline void close_space(usvm_space_t space) {
    OK(usvm_space_destroy(space));
    OK(usvm_shutdown());
}

static inline uint64_t bytes_of(usvm_space_t space, const void *ptr, size_t len, usvm_attr_t attr) {
    uint64_t value = ~(uint64_t)0;
    OK(usvm_range_get_attribute(space, ptr, len, attr, &value, sizeof value));
    return value;
}

static inline usvm_location_t place_of(usvm_space_t space, const void *ptr, size_t len, usvm_attr_t attr) {
    usvm_location_t value = {USVM_LOCATION_FORCE_32, 9};
    OK(usvm_range_get_attribute(space, ptr, len, attr, &value, sizeof value));
    return value;
}

static inline uint32_t flag_of(usvm_space_t space, const void *ptr, size_t len, usvm_attr_t attr) {
    uint32_t value = 99;
    OK(usvm_range_get_attribute(space, ptr, len, attr, &value, sizeof value));
    return value;
}

#ifdef MAP_ANONYMOUS
/* Memory far from where the kernel puts what nobody placed: what is unmapped of it stays unmapped. */
static inline void *map_apart(size_t len) {
    void *wanted = (void *)((uintptr_t)16 << 40);
    void *at = mmap(wanted, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at == wanted);
    return at;
}
#endif

#endif
