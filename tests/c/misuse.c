/* Every function with every wrong argument: a code, and a message that begins with the argument's name. */
#define _GNU_SOURCE
#include "check.h"
#include <errno.h>

static int wrong;

/* The call must fail with that code and a message that begins with that argument. */
#define BAD(code, argument, call)                                                                                      \
    do {                                                                                                               \
        usvm_result_t got_ = (call);                                                                                   \
        const char *said_ = last_message();                                                                            \
        if (got_ != (code) || strncmp(said_, argument, strlen(argument)) != 0) {                                       \
            fprintf(stderr, "%s:%d: %s:\n    gave %s \"%s\",\n    wanted %s about %s\n", __FILE__, __LINE__, #call,    \
                    usvm_result_name(got_), said_, usvm_result_name(code), argument);                                  \
            wrong++;                                                                                                   \
        }                                                                                                              \
    } while (0)

#define ARGUMENT USVM_ERROR_INVALID_ARGUMENT
#define HANDLE USVM_ERROR_INVALID_HANDLE

#define LEN ((size_t)1 << 20)
#define PAGES ((size_t)64 << 10)

static const usvm_location_t HOST = {USVM_LOCATION_HOST, 0};
static const usvm_location_t DEVICE = {USVM_LOCATION_DEVICE, 0};
static const usvm_location_t NOWHERE = {USVM_LOCATION_NONE, 0};

static usvm_space_t space;
static char *memory;    /* good */
static char *read_only; /* a mapping that cannot be written */
static char *unmapped;  /* nothing */
static char *closed;    /* PROT_NONE */
static void *const ODD = (void *)1;
static void *const KERNEL = (void *)0xffff800000000000u;

static void nothing(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)user, (void)addr, (void)len, (void)reason;
}

/* A pointer with every kind of bits that is no handle of this kind. */
static void *const NO_HANDLES[] = {NULL, (void *)1, (void *)0x7fffffffffff, (void *)-1, (void *)0xa0000001ffffffff};
#define EACH_BAD_HANDLE(i) for (size_t i = 0; i < sizeof NO_HANDLES / sizeof *NO_HANDLES; i++)

static void before_init(void) {
    usvm_device_t device;
    uint32_t count;
    size_t size = 0;
    usvm_notifier_t notifier;
    usvm_space_t none = (usvm_space_t)ODD;
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_shutdown());
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_device_count(&count));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_device_get(0, &device));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_space_destroy(none));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_evict(none, &count, 4));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_fence_wait((usvm_fence_t)ODD, -1));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_stats_get_json(none, NULL, &size));
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_notifier_register(none, &count, 4, nothing, NULL, &notifier));
    const char *message;
    int native = 0;
    OK(usvm_last_error(&message, &native));
    CHECK(strstr(message, "usvm_init") && native == ESHUTDOWN);
}

/* Devices that cannot be, whether usvm runs already or not. */
static void no_such_device(void) {
    usvm_config_t config = {sizeof config, "device=/dev/null", 0, 0};
    BAD(ARGUMENT, "USVM_DEVICE", usvm_init(&config));
    config.options = "vram=0";
    BAD(ARGUMENT, "USVM_VRAM", usvm_init(&config));
    config.options = "vram=4097";
    BAD(ARGUMENT, "USVM_VRAM", usvm_init(&config));
    config.options = "vram=16M;visible=17M";
    BAD(ARGUMENT, "USVM_CONF: visible", usvm_init(&config));
}

static void init(void) {
    usvm_config_t config = {sizeof config, NULL, 0, 0};
    BAD(ARGUMENT, "config", usvm_init((usvm_config_t *)ODD));
    BAD(ARGUMENT, "config", usvm_init((usvm_config_t *)unmapped));
    config.struct_size = 0;
    BAD(ARGUMENT, "config.struct_size", usvm_init(&config));
    config.struct_size = sizeof config - 1;
    BAD(ARGUMENT, "config.struct_size", usvm_init(&config));
    config.struct_size = SIZE_MAX;
    BAD(ARGUMENT, "config.struct_size", usvm_init(&config));
    struct {
        usvm_config_t config;
        char more[8];
    } newer = {{sizeof newer, NULL, 0, 0}, "x"};
    BAD(ARGUMENT, "config", usvm_init(&newer.config));
    config.struct_size = sizeof config;
    config.flags = 0x80;
    BAD(ARGUMENT, "config.flags", usvm_init(&config));
    config.flags = 0;
    config.reserved = 1;
    BAD(ARGUMENT, "config.reserved", usvm_init(&config));
    config.reserved = 0;
    const char *const options[] = {ODD, "vram", "nonsense=1", "vram=much", "\xff=1", unmapped};
    for (size_t i = 0; i < sizeof options / sizeof *options; i++) {
        config.options = options[i];
        BAD(ARGUMENT, "config.options", usvm_init(&config));
    }
    no_such_device();
    char *endless = malloc(10000);
    CHECK(endless != NULL);
    memset(endless, ';', 10000);
    config.options = endless;
    BAD(ARGUMENT, "config.options", usvm_init(&config));
    free(endless);
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_shutdown());
}

static void devices(void) {
    usvm_device_t device;
    usvm_device_info_t info;
    no_such_device();
    BAD(ARGUMENT, "count", usvm_device_count(NULL));
    BAD(ARGUMENT, "count", usvm_device_count((uint32_t *)read_only));
    BAD(ARGUMENT, "count", usvm_device_count((uint32_t *)ODD));
    BAD(ARGUMENT, "index", usvm_device_get(1, &device));
    BAD(ARGUMENT, "index", usvm_device_get(UINT32_MAX, &device));
    BAD(ARGUMENT, "device", usvm_device_get(0, NULL));
    OK(usvm_device_get(0, &device));
    EACH_BAD_HANDLE(i) {
        info.struct_size = sizeof info;
        BAD(HANDLE, "device", usvm_device_get_info((usvm_device_t)NO_HANDLES[i], &info));
    }
    BAD(HANDLE, "device", usvm_device_get_info((usvm_device_t)space, &info));
    BAD(ARGUMENT, "info", usvm_device_get_info(device, NULL));
    BAD(ARGUMENT, "info", usvm_device_get_info(device, (usvm_device_info_t *)KERNEL));
    const size_t sizes[] = {0, 8, sizeof info - 1, 5000, SIZE_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        info.struct_size = sizes[i];
        BAD(ARGUMENT, "info.struct_size", usvm_device_get_info(device, &info));
    }
    *(size_t *)(void *)memory = sizeof info;
    CHECK(mprotect(memory, 4096, PROT_READ) == 0);
    BAD(ARGUMENT, "info", usvm_device_get_info(device, (usvm_device_info_t *)(void *)memory));
    CHECK(mprotect(memory, 4096, PROT_READ | PROT_WRITE) == 0);
}

static void spaces(void) {
    usvm_device_t device;
    usvm_space_t other;
    OK(usvm_device_get(0, &device));
    EACH_BAD_HANDLE(i) BAD(HANDLE, "device", usvm_space_create((usvm_device_t)NO_HANDLES[i], NULL, &other));
    BAD(ARGUMENT, "space", usvm_space_create(device, NULL, NULL));
    BAD(ARGUMENT, "space", usvm_space_create(device, NULL, (usvm_space_t *)(void *)read_only));
    BAD(ARGUMENT, "config", usvm_space_create(device, (usvm_space_config_t *)ODD, &other));
    usvm_space_config_t config = {1, NULL};
    BAD(ARGUMENT, "config.struct_size", usvm_space_create(device, &config, &other));
    config.struct_size = sizeof config;
    config.policy = "no such policy";
    BAD(ARGUMENT, "config: policy", usvm_space_create(device, &config, &other));
    config.policy = ODD;
    BAD(ARGUMENT, "config.policy", usvm_space_create(device, &config, &other));
    EACH_BAD_HANDLE(i) {
        BAD(HANDLE, "space", usvm_space_destroy((usvm_space_t)NO_HANDLES[i]));
        BAD(HANDLE, "space", usvm_set_policy((usvm_space_t)NO_HANDLES[i], "adaptive"));
    }
    OK(usvm_space_create(device, NULL, &other));
    OK(usvm_space_destroy(other));
    BAD(HANDLE, "space", usvm_space_destroy(other));
    BAD(HANDLE, "space", usvm_fill(other, memory, 1, LEN));
    BAD(ARGUMENT, "policy", usvm_set_policy(space, NULL));
    BAD(ARGUMENT, "policy", usvm_set_policy(space, ""));
    BAD(ARGUMENT, "policy", usvm_set_policy(space, "fastest"));
}

/* A call that takes a range, with every wrong range. */
#define BAD_RANGES(ptr_name, CALL)                                                                                     \
    do {                                                                                                               \
        EACH_BAD_HANDLE(i_) BAD(HANDLE, "space", CALL((usvm_space_t)NO_HANDLES[i_], memory, LEN));                     \
        BAD(ARGUMENT, ptr_name, CALL(space, NULL, LEN));                                                               \
        BAD(USVM_ERROR_OUTSIDE_SPACE, ptr_name, CALL(space, KERNEL, LEN));                                             \
        BAD(ARGUMENT, "len", CALL(space, memory, SIZE_MAX));                                                           \
        BAD(ARGUMENT, "len", CALL(space, memory, SIZE_MAX - (uintptr_t)memory));                                       \
        BAD(ARGUMENT, "len", CALL(space, memory, (size_t)1 << 47));                                                    \
        BAD(USVM_ERROR_NOT_MAPPED, ptr_name, CALL(space, ODD, LEN));                                                   \
        BAD(USVM_ERROR_NOT_MAPPED, ptr_name, CALL(space, unmapped, LEN));                                              \
        BAD(USVM_ERROR_NOT_MAPPED, ptr_name, CALL(space, unmapped - 4096, LEN));                                       \
    } while (0)

#define ADVISE(s, p, n) usvm_advise(s, p, n, USVM_ADVICE_SET_READ_MOSTLY, NOWHERE)
#define PREFETCH(s, p, n) usvm_prefetch(s, p, n, DEVICE, NULL)
#define FILL(s, p, n) usvm_fill(s, p, 1, n)
#define COPY_TO(s, p, n) usvm_copy(s, p, memory, n)
#define COPY_FROM(s, p, n) usvm_copy(s, memory, p, n)
#define ATTRIBUTE(s, p, n) usvm_range_get_attribute(s, p, n, USVM_ATTR_PAGE_SIZE, &answer, sizeof answer)
#define NOTIFIER(s, p, n) usvm_notifier_register(s, p, n, nothing, NULL, &notifier)

static void ranges(void) {
    uint64_t answer;
    usvm_notifier_t notifier;
    BAD_RANGES("ptr", ADVISE);
    BAD_RANGES("ptr", PREFETCH);
    BAD_RANGES("ptr", usvm_evict);
    BAD_RANGES("ptr", usvm_discard);
    BAD_RANGES("ptr", ATTRIBUTE);
    BAD_RANGES("ptr", NOTIFIER);
    BAD_RANGES("dst", FILL);
    BAD(ARGUMENT, "len", ADVISE(space, memory, 0));
    BAD(ARGUMENT, "len", PREFETCH(space, memory, 0));
    BAD(ARGUMENT, "len", usvm_evict(space, memory, 0));
    BAD(ARGUMENT, "len", usvm_discard(space, memory, 0));
    BAD(ARGUMENT, "len", ATTRIBUTE(space, memory, 0));
    BAD(ARGUMENT, "len", NOTIFIER(space, memory, 0));
    BAD(USVM_ERROR_NOT_WRITABLE, "dst", FILL(space, read_only, 4096));
    BAD(USVM_ERROR_GONE, "dst", FILL(space, closed, 4096));
    BAD(USVM_ERROR_NOT_WRITABLE, "dst", COPY_TO(space, read_only, 4096));
    BAD(USVM_ERROR_NOT_MAPPED, "dst", COPY_TO(space, unmapped, 4096));
    BAD(ARGUMENT, "dst", COPY_TO(space, NULL, 1));
    BAD(USVM_ERROR_NOT_MAPPED, "src", COPY_FROM(space, unmapped, 4096));
    BAD(USVM_ERROR_GONE, "src", COPY_FROM(space, closed, 4096));
    BAD(USVM_ERROR_OUTSIDE_SPACE, "src", COPY_FROM(space, KERNEL, 1));
    BAD(ARGUMENT, "src", COPY_FROM(space, NULL, 1));
    BAD(ARGUMENT, "len", COPY_FROM(space, memory, SIZE_MAX));
    OK(COPY_FROM(space, read_only, 4096));
}

static void enums(void) {
    uint64_t answer = 5;
    const usvm_location_t kinds[] = {
        {USVM_LOCATION_MIXED, 0}, {(usvm_location_type_t)17, 0}, {USVM_LOCATION_FORCE_32, 0}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
        BAD(ARGUMENT, "location.type", usvm_prefetch(space, memory, LEN, kinds[i], NULL));
        BAD(ARGUMENT, "location.type", usvm_advise(space, memory, LEN, USVM_ADVICE_WILL_NEED, kinds[i]));
        BAD(ARGUMENT, "location.type", usvm_advise(space, memory, LEN, USVM_ADVICE_DONT_NEED, kinds[i]));
    }
    const usvm_location_t far = {USVM_LOCATION_DEVICE, 1}, second_host = {USVM_LOCATION_HOST, 1};
    BAD(ARGUMENT, "location.id", usvm_prefetch(space, memory, LEN, far, NULL));
    BAD(ARGUMENT, "location.id", usvm_prefetch(space, memory, LEN, second_host, NULL));
    BAD(ARGUMENT, "location.type", usvm_prefetch(space, memory, LEN, NOWHERE, NULL));
    BAD(ARGUMENT, "location.id", usvm_advise(space, memory, LEN, USVM_ADVICE_SET_PREFERRED_LOCATION, far));
    BAD(ARGUMENT, "location.type", usvm_advise(space, memory, LEN, USVM_ADVICE_SET_PREFERRED_LOCATION, NOWHERE));
    BAD(ARGUMENT, "location.type", usvm_advise(space, memory, LEN, USVM_ADVICE_SET_ACCESSED_BY, HOST));
    const int advices[] = {0, 9, -1, 1000, USVM_ADVICE_FORCE_32};
    for (size_t i = 0; i < sizeof advices / sizeof *advices; i++)
        BAD(ARGUMENT, "advice", usvm_advise(space, memory, LEN, (usvm_advice_t)advices[i], HOST));
    const int attrs[] = {0, 13, -1, USVM_ATTR_FORCE_32};
    for (size_t i = 0; i < sizeof attrs / sizeof *attrs; i++)
        BAD(ARGUMENT, "attr", usvm_range_get_attribute(space, memory, LEN, (usvm_attr_t)attrs[i], &answer, 8));
    CHECK(answer == 5);
    for (int attr = 1; attr <= 12; attr++) {
        usvm_attr_t known = (usvm_attr_t)attr;
        size_t right = attr == USVM_ATTR_READ_MOSTLY || attr == USVM_ATTR_NEED ? 4 : 8;
        const size_t sizes[] = {0, 1, right == 4 ? 8 : 4, right + 1, SIZE_MAX};
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++)
            BAD(ARGUMENT, "size", usvm_range_get_attribute(space, memory, LEN, known, &answer, sizes[i]));
        BAD(ARGUMENT, "value", usvm_range_get_attribute(space, memory, LEN, known, NULL, right));
        BAD(ARGUMENT, "value", usvm_range_get_attribute(space, memory, LEN, known, read_only, right));
    }
    CHECK(strcmp(usvm_result_name((usvm_result_t)77), "USVM_ERROR_UNKNOWN") == 0);
    CHECK(strcmp(usvm_result_name((usvm_result_t)-1), "USVM_ERROR_UNKNOWN") == 0);
}

static void accesses(void) {
    usvm_access_t one = {memory, LEN, USVM_ACCESS_READ, 0};
    usvm_fence_t fence;
    EACH_BAD_HANDLE(i) {
        BAD(HANDLE, "space", usvm_begin_access((usvm_space_t)NO_HANDLES[i], &one, 1, NULL));
        BAD(HANDLE, "space", usvm_end_access((usvm_space_t)NO_HANDLES[i], NULL));
    }
    BAD(ARGUMENT, "accesses", usvm_begin_access(space, NULL, 1, NULL));
    BAD(ARGUMENT, "accesses", usvm_begin_access(space, (usvm_access_t *)ODD, 1, NULL));
    BAD(ARGUMENT, "accesses", usvm_begin_access(space, (usvm_access_t *)(void *)(unmapped - 8), 1, NULL));
    BAD(ARGUMENT, "n", usvm_begin_access(space, &one, 0, NULL));
    BAD(ARGUMENT, "n", usvm_begin_access(space, &one, SIZE_MAX, NULL));
    BAD(ARGUMENT, "n", usvm_begin_access(space, &one, USVM_MAX_ACCESSES + 1, NULL));
    BAD(ARGUMENT, "fence", usvm_begin_access(space, &one, 1, (usvm_fence_t *)(void *)read_only));
    BAD(ARGUMENT, "fence", usvm_prefetch(space, memory, LEN, DEVICE, (usvm_fence_t *)(void *)read_only));

    usvm_access_t two[2] = {one, one};
    two[1].ptr = NULL;
    BAD(ARGUMENT, "accesses[1]: ptr", usvm_begin_access(space, two, 2, NULL));
    two[1].ptr = KERNEL;
    BAD(USVM_ERROR_OUTSIDE_SPACE, "accesses[1]: ptr", usvm_begin_access(space, two, 2, NULL));
    two[1].ptr = unmapped;
    BAD(USVM_ERROR_NOT_MAPPED, "accesses[1].ptr", usvm_begin_access(space, two, 2, NULL));
    two[1].ptr = closed;
    BAD(USVM_ERROR_GONE, "accesses[1].ptr", usvm_begin_access(space, two, 2, NULL));
    two[1].ptr = read_only;
    two[1].len = 4096;
    two[1].mode = USVM_ACCESS_WRITE;
    BAD(USVM_ERROR_NOT_WRITABLE, "accesses[1].ptr", usvm_begin_access(space, two, 2, NULL));
    two[1] = one;
    two[1].len = 0;
    BAD(ARGUMENT, "accesses[1]: len", usvm_begin_access(space, two, 2, NULL));
    two[1].len = SIZE_MAX;
    BAD(ARGUMENT, "accesses[1]: len", usvm_begin_access(space, two, 2, NULL));
    two[1] = one;
    const int modes[] = {0, 4, -1};
    for (size_t i = 0; i < sizeof modes / sizeof *modes; i++) {
        two[1].mode = (usvm_access_mode_t)modes[i];
        BAD(ARGUMENT, "accesses[1]: mode", usvm_begin_access(space, two, 2, NULL));
    }
    two[1] = one;
    two[1].reserved = 1;
    BAD(ARGUMENT, "accesses[1]: reserved", usvm_begin_access(space, two, 2, NULL));

    BAD(ARGUMENT, "fence", usvm_end_access(space, NULL));
    OK(usvm_prefetch(space, memory, LEN, DEVICE, &fence));
    BAD(ARGUMENT, "fence", usvm_end_access(space, fence)); /* of no access */
    OK(usvm_fence_destroy(fence));
    BAD(HANDLE, "fence", usvm_end_access(space, fence));
    OK(usvm_begin_access(space, &one, 1, &fence));
    usvm_device_t device;
    usvm_space_t other;
    OK(usvm_device_get(0, &device));
    OK(usvm_space_create(device, NULL, &other));
    BAD(ARGUMENT, "fence", usvm_end_access(other, fence)); /* of another space */
    OK(usvm_space_destroy(other));
    OK(usvm_end_access(space, fence));
    BAD(ARGUMENT, "fence", usvm_end_access(space, fence)); /* twice */
    OK(usvm_fence_destroy(fence));
    memory[0] = 1;

    usvm_access_t bad = {unmapped, LEN, USVM_ACCESS_READ, 0};
    OK(usvm_begin_access(space, &bad, 1, &fence));
    CHECK(usvm_fence_wait(fence, -1) == USVM_ERROR_NOT_MAPPED);
    CHECK(usvm_fence_wait(fence, -1) == USVM_ERROR_NOT_MAPPED);
    OK(usvm_end_access(space, fence));
    OK(usvm_fence_destroy(fence));
}

static void fences(void) {
    EACH_BAD_HANDLE(i) {
        BAD(HANDLE, "fence", usvm_fence_wait((usvm_fence_t)NO_HANDLES[i], 0));
        BAD(HANDLE, "fence", usvm_fence_destroy((usvm_fence_t)NO_HANDLES[i]));
    }
    BAD(HANDLE, "fence", usvm_fence_wait((usvm_fence_t)space, -1));
    usvm_fence_t fence;
    OK(usvm_prefetch(space, memory, LEN, HOST, &fence));
    BAD(ARGUMENT, "timeout_ns", usvm_fence_wait(fence, -2));
    BAD(ARGUMENT, "timeout_ns", usvm_fence_wait(fence, INT64_MIN));
    OK(usvm_fence_wait(fence, INT64_MAX));
    OK(usvm_fence_destroy(fence));
    BAD(HANDLE, "fence", usvm_fence_wait(fence, -1));
    BAD(HANDLE, "fence", usvm_fence_destroy(fence));

    /* What others hold cannot be evicted: the fence is not signalled meanwhile. */
    usvm_access_t one = {memory, LEN, USVM_ACCESS_WRITE, 0};
    OK(usvm_begin_access(space, &one, 1, NULL));
    OK(usvm_prefetch(space, memory, LEN, HOST, &fence));
    BAD(USVM_ERROR_TIMEOUT, "fence", usvm_fence_wait(fence, 20 * 1000 * 1000));
    BAD(USVM_ERROR_TIMEOUT, "fence", usvm_fence_wait(fence, 0));
    OK(usvm_end_access(space, NULL));
    OK(usvm_fence_wait(fence, -1));
    OK(usvm_fence_destroy(fence));
}

static void notifiers(void) {
    usvm_notifier_t notifier;
    BAD(ARGUMENT, "callback", usvm_notifier_register(space, memory, LEN, NULL, NULL, &notifier));
    BAD(ARGUMENT, "notifier", usvm_notifier_register(space, memory, LEN, nothing, NULL, NULL));
    BAD(ARGUMENT, "notifier",
        usvm_notifier_register(space, memory, LEN, nothing, NULL, (usvm_notifier_t *)(void *)read_only));
    EACH_BAD_HANDLE(i) BAD(HANDLE, "notifier", usvm_notifier_unregister((usvm_notifier_t)NO_HANDLES[i]));
    BAD(HANDLE, "notifier", usvm_notifier_unregister((usvm_notifier_t)space));
    OK(usvm_notifier_register(space, memory, LEN, nothing, NULL, &notifier));
    OK(usvm_notifier_unregister(notifier));
    BAD(HANDLE, "notifier", usvm_notifier_unregister(notifier));
}

static void statistics(void) {
    usvm_stats_t stats;
    size_t size = 4096;
    EACH_BAD_HANDLE(i) {
        usvm_space_t no = (usvm_space_t)NO_HANDLES[i];
        stats.size = sizeof stats;
        BAD(HANDLE, "space", usvm_stats_get(no, &stats));
        BAD(HANDLE, "space", usvm_stats_get_json(no, NULL, &size));
        BAD(HANDLE, "space", usvm_stats_reset(no));
    }
    BAD(ARGUMENT, "stats", usvm_stats_get(space, NULL));
    BAD(ARGUMENT, "stats", usvm_stats_get(space, ODD));
    const uint64_t sizes[] = {0, 16, sizeof stats - 1, 5000, UINT64_MAX};
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        stats.size = sizes[i];
        BAD(ARGUMENT, "stats.size", usvm_stats_get(space, &stats));
    }
    BAD(ARGUMENT, "size", usvm_stats_get_json(space, NULL, NULL));
    BAD(ARGUMENT, "size", usvm_stats_get_json(space, NULL, ODD));
    BAD(ARGUMENT, "json", usvm_stats_get_json(space, read_only, &size));
    size = 3;
    BAD(USVM_ERROR_BUFFER_TOO_SMALL, "size", usvm_stats_get_json(space, memory, &size));
    CHECK(size > 3);
}

static void heap(void) {
    volatile size_t huge = SIZE_MAX, half = SIZE_MAX / 2;
    const size_t no_powers[] = {0, 3, 24, 4095};
    for (size_t i = 0; i < sizeof no_powers / sizeof *no_powers; i++) {
        errno = 0;
        CHECK(usvm_aligned_alloc(no_powers[i], 8) == NULL && errno == EINVAL);
        CHECK(strncmp(last_message(), "alignment", 9) == 0);
    }
    errno = 0;
    CHECK(usvm_malloc(huge) == NULL && errno == ENOMEM && strncmp(last_message(), "size", 4) == 0);
    CHECK(usvm_malloc(half + 2) == NULL);
    errno = 0;
    CHECK(usvm_calloc(half, 3) == NULL && errno == ENOMEM && strncmp(last_message(), "count", 5) == 0);
    CHECK(usvm_calloc(half, 2) == NULL);
    CHECK(usvm_aligned_alloc(4096, huge) == NULL);
    int on_stack[100];
    void *others[] = {on_stack, malloc(100), (void *)(uintptr_t)0x123450, (void *)(uintptr_t)heap};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        errno = 0;
        CHECK(usvm_realloc(others[i], 10) == NULL && errno == EINVAL && strncmp(last_message(), "ptr", 3) == 0);
        errno = 0;
        CHECK(usvm_usable_size(others[i]) == 0 && errno == EINVAL);
        errno = 0;
        usvm_free(others[i]);
        CHECK(errno == EINVAL && strncmp(last_message(), "ptr", 3) == 0);
    }
    free(others[1]);
    CHECK(usvm_aligned_alloc((size_t)1 << 63, 8) == NULL);
    char *block = usvm_malloc(100);
    CHECK(block != NULL);
    block[99] = 5;
    CHECK(usvm_realloc(block, huge) == NULL);
    CHECK(block[99] == 5);
    usvm_free(block);
}

static void last_error(void) {
    usvm_evict(space, NULL, 1);
    const char *message = NULL;
    int native = 0;
    CHECK(usvm_last_error((const char **)(void *)read_only, &native) == ARGUMENT && native == 0);
    CHECK(usvm_last_error(&message, (int *)(void *)read_only) == ARGUMENT && message == NULL);
    OK(usvm_last_error(NULL, NULL));
    OK(usvm_last_error(&message, &native));
    CHECK(strcmp(message, "ptr: is NULL") == 0 && native == EINVAL);
    OK(usvm_evict(space, memory, 1)); /* success changes nothing */
    OK(usvm_last_error(&message, NULL));
    CHECK(strcmp(message, "ptr: is NULL") == 0);
}

static void after_shutdown(void) {
    usvm_space_t old = space;
    usvm_device_t device;
    usvm_fence_t fence;
    usvm_notifier_t notifier;
    usvm_access_t one = {memory, LEN, USVM_ACCESS_READ, 0};
    OK(usvm_device_get(0, &device));
    OK(usvm_begin_access(space, &one, 1, &fence)); /* shutdown ends it */
    OK(usvm_begin_access(space, &one, 1, NULL));
    OK(usvm_notifier_register(space, memory, LEN, nothing, NULL, &notifier));
    OK(usvm_shutdown());
    memory[5] = 1;
    BAD(USVM_ERROR_NOT_RUNNING, "", usvm_fence_wait(fence, -1));
    space = open_space(NULL);
    BAD(HANDLE, "space", usvm_fill(old, memory, 1, LEN));
    BAD(HANDLE, "fence", usvm_fence_wait(fence, -1));
    BAD(HANDLE, "notifier", usvm_notifier_unregister(notifier));
    usvm_device_info_t info;
    info.struct_size = sizeof info;
    BAD(HANDLE, "device", usvm_device_get_info(device, &info));
    close_space(space);
}

int main(void) {
    void *area = map_apart(64 * PAGES);
    memory = area;
    unmapped = memory + 32 * PAGES;
    read_only = memory + 30 * PAGES;
    closed = memory + 28 * PAGES;
    memset(memory, 1, 32 * PAGES);
    CHECK(munmap(unmapped, 32 * PAGES) == 0);
    CHECK(mprotect(read_only, PAGES, PROT_READ) == 0);
    CHECK(mprotect(closed, PAGES, PROT_NONE) == 0);

    before_init();
    init();
    space = open_space("vram=32M");
    devices();
    spaces();
    ranges();
    enums();
    accesses();
    fences();
    notifiers();
    statistics();
    heap();
    last_error();
    after_shutdown();
    CHECK(wrong == 0);
    puts("misuse: good");
    return 0;
}
