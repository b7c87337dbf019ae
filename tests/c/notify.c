/* Notifiers: who is told of what, when, and what a callback may do. */
#define _GNU_SOURCE
#include "check.h"
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define M2 ((size_t)2 << 20)
#define LEN (2 * M2)

static usvm_space_t space;
static const usvm_location_t DEVICE = {USVM_LOCATION_DEVICE, 0};

/* What one notifier was told. */
typedef struct {
    atomic_int calls[8];
    _Atomic(void *) addr;
    atomic_size_t len;
    pthread_t thread;
    unsigned char *look_at; /* must still be readable in the callback */
    unsigned char seen;
} log_t;

static void note(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    log_t *log = user;
    if (reason != USVM_NOTIFY_MIGRATE) {
        log->addr = addr;
        log->len = len;
        log->thread = pthread_self();
        if (log->look_at)
            log->seen = *log->look_at; /* comes back from the device for this */
    }
    log->calls[reason < 8 ? reason : 0]++;
    errno = EDOM; /* is not the caller's to see */
}

static int calls(log_t *log, int reason) {
    return log->calls[reason];
}

static int all_calls(log_t *log) {
    int sum = 0;
    for (int i = 0; i < 8; i++)
        sum += i == USVM_NOTIFY_MIGRATE ? 0 : log->calls[i];
    return sum;
}

static unsigned char *map(size_t len) {
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(at != MAP_FAILED);
    return at;
}

static usvm_notifier_t watch(void *at, size_t len, usvm_notifier_callback_t callback, void *user) {
    usvm_notifier_t notifier;
    OK(usvm_notifier_register(space, at, len, callback, user, &notifier));
    return notifier;
}

/* Before the call returns, on its thread, with the old contents still there; at home or on the device. */
static void before_the_pages_go(int on_device) {
    unsigned char *at = map(LEN);
    at[LEN - 1] = 77;
    log_t log = {0};
    log.look_at = at + LEN - 1;
    usvm_notifier_t notifier = watch(at, LEN, note, &log);
    if (on_device)
        OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));

    CHECK(mprotect(at, 4096, PROT_READ) == 0);
    CHECK(calls(&log, USVM_NOTIFY_PROTECT) == 1 && log.addr == at && log.len == 4096);
    CHECK(mprotect(at, 4096, PROT_READ | PROT_WRITE) == 0);

    CHECK(madvise(at + 4096, 8192, MADV_DONTNEED) == 0);
    CHECK(calls(&log, USVM_NOTIFY_DISCARD) == 1 && log.addr == at + 4096 && log.len == 8192);
    CHECK(madvise(at, 4096, MADV_WILLNEED) == 0);
    CHECK(calls(&log, USVM_NOTIFY_DISCARD) == 1);
    if (on_device)
        OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));
    OK(usvm_discard(space, at + M2, 4096));
    CHECK(calls(&log, USVM_NOTIFY_DISCARD) == 2 && log.addr == at + M2);

    CHECK(mmap(at + 8192, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + 8192);
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) == 1 && log.addr == at + 8192 && log.len == 4096);

    log.seen = 0;
    errno = ERANGE;
    CHECK(munmap(at, LEN) == 0 && errno == ERANGE);
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) == 2 && log.addr == at && log.len == LEN);
    CHECK(log.seen == 77);
    CHECK(pthread_equal(log.thread, pthread_self()));

    /* What the kernel reported of all this was not told a second time. */
    unsigned char *other = map(4096);
    *other = 1;
    OK(usvm_prefetch(space, other, 4096, DEVICE, NULL));
    CHECK(all_calls(&log) == 6);
    OK(usvm_notifier_unregister(notifier));
    munmap(other, 4096);
}

static void only_the_part_concerned(void) {
    unsigned char *at = map(LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(at + 4096 + 5, 8192, note, &log); /* pages 1 to 3 */
    CHECK(munmap(at, 4096) == 0);
    CHECK(munmap(at + 4 * 4096, 4096) == 0);
    CHECK(all_calls(&log) == 0);
    CHECK(munmap(at + 3 * 4096, LEN - 3 * 4096) == 0);
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) == 1 && log.addr == at + 3 * 4096 && log.len == 4096);
    CHECK(munmap(at + 4096, (size_t)-1) == -1 && errno == EINVAL); /* fails, and told all the same: harmless */
    OK(usvm_notifier_unregister(notifier));
    CHECK(munmap(at + 4096, 2 * 4096) == 0);
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) <= 2);
}

static void remapping(void) {
    unsigned char *at = map(LEN);
    memset(at, 5, LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(at, LEN, note, &log);
    OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));
    unsigned char *now = mremap(at, LEN, LEN + 16 * M2, MREMAP_MAYMOVE);
    CHECK(now != MAP_FAILED && now[LEN - 1] == 5);
    CHECK(calls(&log, USVM_NOTIFY_REMAP) == 1 && log.len == LEN);
    OK(usvm_notifier_unregister(notifier));

    memset(&log, 0, sizeof log);
    notifier = watch(now, LEN, note, &log);
    CHECK(mremap(now, LEN + 16 * M2, M2, 0) == now);
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) == 1 && log.addr == now + M2 && log.len == M2);

    unsigned char *place = map(M2);
    log_t there = {0};
    usvm_notifier_t second = watch(place, M2, note, &there);
    CHECK(mremap(now, M2, M2, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
    CHECK(calls(&log, USVM_NOTIFY_REMAP) == 1 && calls(&there, USVM_NOTIFY_UNMAP) == 1);
    CHECK(place[9] == 5);
    OK(usvm_notifier_unregister(notifier));
    OK(usvm_notifier_unregister(second));
    munmap(place, M2);
}

/* MIGRATE is told by the time the call that moved it returns, and the next access. */
static void migrating(void) {
    unsigned char *at = map(LEN);
    memset(at, 1, LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(at, LEN, note, &log);
    OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));
    int before = calls(&log, USVM_NOTIFY_MIGRATE);
    CHECK(before >= 1 && all_calls(&log) == 0);
    at[3] = 4; /* comes back by a CPU fault */
    unsigned char *other = map(4096);
    *other = 1;
    usvm_access_t access = {other, 4096, USVM_ACCESS_READ, 0};
    OK(usvm_begin_access(space, &access, 1, NULL));
    CHECK(calls(&log, USVM_NOTIFY_MIGRATE) > before);
    OK(usvm_end_access(space, NULL));
    before = calls(&log, USVM_NOTIFY_MIGRATE);
    usvm_fence_t fence;
    OK(usvm_prefetch(space, at, LEN, DEVICE, &fence));
    OK(usvm_fence_wait(fence, -1));
    CHECK(calls(&log, USVM_NOTIFY_MIGRATE) > before);
    before = calls(&log, USVM_NOTIFY_MIGRATE);
    OK(usvm_evict(space, at, LEN));
    CHECK(calls(&log, USVM_NOTIFY_MIGRATE) > before);
    OK(usvm_fence_destroy(fence));
    OK(usvm_notifier_unregister(notifier));
    munmap(at, LEN);
    munmap(other, 4096);
}

/* What does not pass the wrappers is told late, but before the next access begins. */
static void behind_the_back(void) {
    unsigned char *at = map(LEN);
    memset(at, 1, LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(at, LEN, note, &log);
    OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));
    CHECK(syscall(SYS_munmap, at, LEN) == 0);
    unsigned char *other = map(4096);
    *other = 1;
    usvm_access_t access = {other, 4096, USVM_ACCESS_READ, 0};
    OK(usvm_begin_access(space, &access, 1, NULL));
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) >= 1);
    OK(usvm_end_access(space, NULL));
    OK(usvm_notifier_unregister(notifier));
    munmap(other, 4096);

    /* free of a block that the C library maps by itself */
    unsigned char *block = malloc(LEN + 123);
    CHECK(block != NULL);
    memset(block, 2, LEN);
    memset(&log, 0, sizeof log);
    notifier = watch(block, LEN, note, &log);
    OK(usvm_prefetch(space, block, LEN, DEVICE, NULL));
    free(block);
    other = map(4096);
    *other = 1;
    OK(usvm_prefetch(space, other, 4096, DEVICE, NULL));
    CHECK(calls(&log, USVM_NOTIFY_UNMAP) >= 1);
    OK(usvm_notifier_unregister(notifier));
    munmap(other, 4096);
}

/* What usvm's allocator gives back or moves: told before its function returns, on another thread. */
static void by_the_allocator(int on_device) {
    unsigned char *block = usvm_malloc(LEN);
    CHECK(block != NULL);
    memset(block, 6, LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(block, LEN, note, &log);
    if (on_device)
        OK(usvm_prefetch(space, block, LEN, DEVICE, NULL));
    unsigned char *fence = usvm_malloc(LEN); /* behind it: it cannot grow in place */
    CHECK(all_calls(&log) == 0);
    errno = ERANGE;
    unsigned char *moved = usvm_realloc(block, 8 * LEN);
    CHECK(errno == ERANGE && calls(&log, USVM_NOTIFY_REMAP) >= 1 && !pthread_equal(log.thread, pthread_self()));
    CHECK(fence && moved && moved != block && moved[0] == 6 && moved[LEN - 1] == 6);
    OK(usvm_notifier_unregister(notifier));

    memset(&log, 0, sizeof log);
    notifier = watch(moved, 8 * LEN, note, &log);
    if (on_device)
        OK(usvm_prefetch(space, moved, 8 * LEN, DEVICE, NULL));
    usvm_free(moved);
    usvm_free(fence);
    moved = usvm_calloc(8, LEN); /* the pages are exchanged for fresh ones by now */
    CHECK(calls(&log, USVM_NOTIFY_DISCARD) >= 1 && !pthread_equal(log.thread, pthread_self()));
    CHECK(moved != NULL && moved[0] == 0 && moved[8 * LEN - 1] == 0);
    usvm_free(moved);
    OK(usvm_notifier_unregister(notifier));
}

/* A child made past the C library has its parent's notifiers in its memory, and tells nobody. */
static void a_child_without_handlers(void) {
    unsigned char *at = map(LEN);
    memset(at, 1, LEN);
    log_t log = {0};
    usvm_notifier_t notifier = watch(at, LEN, note, &log);
    pid_t child = (pid_t)syscall(SYS_fork);
    CHECK(child >= 0);
    if (child == 0) {
        int failed = mprotect(at, 4096, PROT_READ) || madvise(at, LEN, MADV_DONTNEED) || munmap(at, LEN);
        syscall(SYS_exit_group, failed || all_calls(&log) ? 1 : 37);
    }
    int status;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 37);
    CHECK(all_calls(&log) == 0 && munmap(at, LEN) == 0 && calls(&log, USVM_NOTIFY_UNMAP) == 1);
    OK(usvm_notifier_unregister(notifier));
}

/* A callback that does all that callbacks may do. */
typedef struct {
    usvm_notifier_t self, other;
    unsigned char *spare;
    int calls, others;
} busy_t;

static void count_others(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)addr, (void)len, (void)reason;
    ((busy_t *)user)->others++;
}

static void be_busy(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    busy_t *busy = user;
    (void)len;
    if (reason == USVM_NOTIFY_MIGRATE)
        return;
    busy->calls++;
    usvm_stats_t stats;
    stats.size = sizeof stats;
    OK(usvm_stats_get(space, &stats));
    OK(usvm_fill(space, busy->spare, 8, M2)); /* goes to the device and back, inside */
    CHECK(busy->spare[77] == 8);
    OK(usvm_evict(space, addr, 4096));
    usvm_access_t access = {busy->spare, M2, USVM_ACCESS_WRITE, 0};
    OK(usvm_begin_access(space, &access, 1, NULL));
    OK(usvm_end_access(space, NULL));
    CHECK(munmap(busy->spare + M2, 4096) == 0); /* watched by the other, and by this one's own range? no: not told itself */
    char *block = malloc(100000);
    CHECK(block != NULL);
    free(block);
    OK(usvm_notifier_unregister(busy->other));
    OK(usvm_notifier_unregister(busy->self));
    CHECK(usvm_notifier_unregister(busy->self) == USVM_ERROR_INVALID_HANDLE);
}

static void callbacks_call_in(void) {
    unsigned char *at = map(LEN);
    memset(at, 1, LEN);
    busy_t busy = {0};
    busy.spare = map(2 * M2);
    memset(busy.spare, 1, 2 * M2);
    OK(usvm_prefetch(space, at, LEN, DEVICE, NULL));
    busy.self = watch(at, LEN, be_busy, &busy);
    busy.other = watch(busy.spare + M2, M2, count_others, &busy);
    CHECK(munmap(at, LEN) == 0);
    CHECK(busy.calls == 1 && busy.others == 1);
    munmap(busy.spare, 2 * M2);
}

/* Unregistering waits for a callback that runs. */
static atomic_int in_slow, slow_done;

static void slow(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    (void)user, (void)addr, (void)len, (void)reason;
    in_slow = 1;
    usleep(100000);
    slow_done = 1;
}

static void *unmap_it(void *at) {
    CHECK(munmap(at, M2) == 0);
    return NULL;
}

static void unregister_waits(void) {
    unsigned char *at = map(M2);
    usvm_notifier_t notifier = watch(at, M2, slow, NULL);
    pthread_t thread;
    pthread_create(&thread, NULL, unmap_it, at);
    while (!in_slow)
        usleep(1000);
    OK(usvm_notifier_unregister(notifier));
    CHECK(slow_done == 1);
    pthread_join(thread, NULL);
}

/* Many threads map, use, unmap and watch; each must be told of its own unmapping before it returns. */
static void *mapper(void *arg) {
    unsigned seed = (unsigned)(uintptr_t)arg;
    for (int round = 0; round < 60; round++) {
        unsigned char *at = map(LEN);
        memset(at, (int)seed, 8192);
        log_t log = {0};
        usvm_notifier_t notifier = watch(at, LEN, note, &log);
        if (round % 3)
            OK(usvm_prefetch(space, at, 8192, DEVICE, NULL));
        if (round % 4 == 0)
            OK(usvm_fill(space, at, 3, 4096));
        CHECK(munmap(at, LEN) == 0);
        CHECK(calls(&log, USVM_NOTIFY_UNMAP) >= 1);
        OK(usvm_notifier_unregister(notifier));
    }
    return NULL;
}

static void many_threads(void) {
    pthread_t threads[6];
    for (uintptr_t i = 0; i < 6; i++)
        pthread_create(&threads[i], NULL, mapper, (void *)(i + 1));
    for (int i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);
}

/* Ends with its space, or with usvm. */
static void ends_with_the_rest(void) {
    unsigned char *at = map(LEN);
    log_t log = {0};
    usvm_device_t device;
    usvm_space_t own;
    OK(usvm_device_get(0, &device));
    OK(usvm_space_create(device, NULL, &own));
    usvm_notifier_t notifier;
    OK(usvm_notifier_register(own, at, LEN, note, &log, &notifier));
    OK(usvm_space_destroy(own));
    CHECK(usvm_notifier_unregister(notifier) == USVM_ERROR_INVALID_HANDLE);
    CHECK(madvise(at, 4096, MADV_DONTNEED) == 0);
    watch(at, LEN, note, &log);
    close_space(space);
    CHECK(munmap(at, LEN) == 0);
    CHECK(all_calls(&log) == 0);
}

int main(void) {
    space = open_space("vram=64M");
    before_the_pages_go(0);
    before_the_pages_go(1);
    only_the_part_concerned();
    remapping();
    migrating();
    behind_the_back();
    by_the_allocator(0);
    by_the_allocator(1);
    a_child_without_handlers();
    callbacks_call_in();
    unregister_waits();
    many_threads();
    ends_with_the_rest();
    space = open_space("vram=64M"); /* a second life */
    before_the_pages_go(1);
    migrating();
    close_space(space);
    puts("notify: good");
    return 0;
}
