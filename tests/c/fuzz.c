/* Random arguments to every function: any answer will do, as long as there is one, and memory is as it was. */
#define _GNU_SOURCE
#include "check.h"

#define LEN ((size_t)256 << 10)

static unsigned long long state;

static unsigned long long next(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static unsigned dice(unsigned sides) {
    return (unsigned)(next() >> 33) % sides;
}

static char *arena, *guarded; /* the fuzzed calls may write here; and may not there */
static void *handles[16];

static void *address(void) {
    switch (dice(8)) {
    case 0:
        return NULL;
    case 1:
        return (void *)(uintptr_t)next();
    case 2:
        return guarded + dice(LEN);
    case 3:
        return arena + 2 * LEN - dice(64); /* its end: nothing is mapped behind */
    default:
        return arena + dice(LEN);
    }
}

static size_t size(void) {
    switch (dice(6)) {
    case 0:
        return (size_t)next();
    case 1:
        return dice(64);
    case 2:
        return SIZE_MAX - dice(5000);
    default:
        return dice(LEN);
    }
}

static void *handle(void) {
    switch (dice(4)) {
    case 0:
        return (void *)(uintptr_t)next();
    case 1:
        return (void *)((uintptr_t)handles[dice(16)] ^ (uintptr_t)1 << dice(64));
    default:
        return handles[dice(16)];
    }
}

static usvm_location_t location(void) {
    usvm_location_t at = {(usvm_location_type_t)dice(5), dice(3) ? 0 : (uint32_t)next()};
    return at;
}

/* An access that mostly makes sense, so that some of them begin. */
static usvm_access_t *accesses(void) {
    usvm_access_t *list = (usvm_access_t *)(void *)arena;
    for (int i = 0; i < 4; i++) {
        usvm_access_t access = {dice(3) ? arena + LEN + dice(LEN / 2) : address(), dice(3) ? 1 + dice(LEN / 4) : size(),
                                (usvm_access_mode_t)dice(5), dice(8) == 0};
        list[i] = access;
    }
    return dice(4) ? list : address();
}

static void nothing(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)user, (void)addr, (void)len, (void)reason;
}

static void keep(void *at) {
    /* An output that was really written is a handle of the next calls. */
    handles[4 + dice(12)] = *(void **)at;
}

static void one(void) {
    void *out = dice(3) ? arena + 64 * dice(100) : address();
    int aligned = (char *)out >= arena && (char *)out < arena + LEN && (uintptr_t)out % 8 == 0;
    usvm_result_t result = USVM_ERROR_INTERNAL;
    int output = 0;
    memset(arena, (int)next(), 32);
    switch (dice(24)) {
    case 0: result = usvm_device_count(out); break;
    case 1: result = usvm_device_get(dice(3), out), output = 1; break;
    case 2: result = usvm_device_get_info(handle(), out); break;
    case 3: result = usvm_space_create(handle(), dice(2) ? NULL : address(), out), output = 1; break;
    case 4: result = dice(8) ? USVM_SUCCESS : usvm_space_destroy(handle()); break;
    case 5: result = usvm_set_policy(handle(), address()); break;
    case 6: result = usvm_advise(handle(), address(), size(), (usvm_advice_t)dice(11), location()); break;
    case 7:
    case 8: result = usvm_prefetch(handle(), address(), size(), location(), dice(2) ? NULL : out), output = 1; break;
    case 9: result = usvm_evict(handle(), address(), size()); break;
    case 10: result = usvm_discard(handle(), arena + dice(LEN), dice(LEN)); break;
    case 11:
    case 12: {
        usvm_space_t on = handle();
        void *fence = dice(2) ? NULL : out;
        result = usvm_begin_access(on, accesses(), dice(5) ? dice(6) : size(), fence);
        /* What is held, this thread must not touch before the end: where its fence went may be held itself. */
        if (result == USVM_SUCCESS && fence) {
            usvm_space_destroy(on);
            OK(usvm_space_create(handles[0], NULL, (usvm_space_t *)&handles[1]));
            handles[2] = handles[3] = handles[1];
            output = 1;
        } else if (result == USVM_SUCCESS) {
            OK(usvm_end_access(on, NULL));
        }
        break;
    }
    case 13:
    case 14: result = usvm_end_access(handle(), dice(2) ? NULL : handle()); break;
    case 15: result = usvm_fence_wait(handle(), dice(2) ? (int64_t)dice(1000000) : (int64_t)next() >> dice(64)); break;
    case 16: result = usvm_fence_destroy(handle()); break;
    case 17: result = usvm_copy(handle(), arena + dice(LEN), address(), dice(LEN)); break;
    case 18: result = usvm_fill(handle(), arena + dice(LEN), (int)next(), dice(LEN)); break;
    case 19: result = usvm_range_get_attribute(handle(), address(), size(), (usvm_attr_t)dice(15), out, dice(12)); break;
    case 20: result = usvm_notifier_register(handle(), address(), size(), dice(4) ? nothing : NULL, NULL, out), output = 1; break;
    case 21: result = usvm_notifier_unregister(handle()); break;
    case 22: result = usvm_stats_get(handle(), out); break;
    default: result = usvm_stats_get_json(handle(), address() == NULL ? NULL : arena + dice(LEN), out); break;
    }
    CHECK(result != USVM_ERROR_INTERNAL);
    CHECK(strcmp(usvm_result_name(result), "USVM_ERROR_UNKNOWN") != 0);
    if (result == USVM_SUCCESS && output && aligned)
        keep(out);
}

int main(int argc, char **argv) {
    int calls = argc > 1 ? atoi(argv[1]) : 20000;
    state = argc > 2 ? strtoull(argv[2], NULL, 10) : 20261120;
    char *area = map_apart(8 * LEN);
    guarded = area;
    arena = area + 2 * LEN;
    memset(area, 3, 4 * LEN);
    CHECK(munmap(area + 4 * LEN, 4 * LEN) == 0);
    CHECK(mprotect(guarded, 2 * LEN, PROT_READ) == 0);

    usvm_space_t space = open_space("vram=16M");
    OK(usvm_device_get(0, (usvm_device_t *)&handles[0]));
    handles[1] = handles[2] = handles[3] = space;
    for (int i = 0; i < calls; i++) {
        one();
        if (i % 64 == 0) { /* the good handles stay good */
            OK(usvm_space_create(handles[0], NULL, &space));
            handles[1] = handles[2] = handles[3] = space;
        }
    }
    OK(usvm_shutdown());
    for (size_t i = 0; i < 2 * LEN; i++)
        CHECK(guarded[i] == 3);
    puts("fuzz: good");
    return 0;
}
