/*
 * A framework that keeps device tables of its own must hear that memory goes before it goes. This one's "table" is one
 * flag; usvm_begin_access keeps the memory where it is while the device works.
 */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <usvm.h>

static void must(usvm_result_t result) {
    if (result != USVM_SUCCESS) {
        const char *message;
        usvm_last_error(&message, NULL);
        fprintf(stderr, "%s: %s\n", usvm_result_name(result), message);
        exit(1);
    }
}

static int table_is_good;

static void invalidate(void *user, void *addr, size_t len, usvm_notify_reason_t reason) {
    static const char *const words[] = {"?", "unmapped", "remapped", "discarded", "protected", "migrated"};
    (void)user;
    (void)addr;
    if (table_is_good)
        printf("  told: %zu bytes are %s\n", len, words[reason <= USVM_NOTIFY_MIGRATE ? reason : 0]);
    table_is_good = 0;
}

int main(void) {
    usvm_device_t device;
    usvm_space_t space;
    usvm_notifier_t notifier;
    const size_t len = 2 << 20;
    must(usvm_init(NULL));
    must(usvm_device_get(0, &device));
    must(usvm_space_create(device, NULL, &space));

    char *data = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED)
        return 1;
    memset(data, 1, len);
    must(usvm_notifier_register(space, data, len, invalidate, NULL, &notifier));

    puts("the device uses it");
    usvm_access_t access = {data, len, USVM_ACCESS_WRITE, 0};
    must(usvm_begin_access(space, &access, 1, NULL));
    table_is_good = 1; /* from here on nothing of it moves */
    must(usvm_fill(space, data, 2, len));
    must(usvm_end_access(space, NULL));

    puts("the CPU touches it");
    int sum = data[0] + data[len - 1];
    must(usvm_begin_access(space, &access, 1, NULL)); /* by now the table knows */
    int heard = !table_is_good;
    table_is_good = 1;
    must(usvm_end_access(space, NULL));

    puts("the program unmaps it");
    munmap(data, len);
    heard += !table_is_good;

    must(usvm_notifier_unregister(notifier));
    must(usvm_space_destroy(space));
    must(usvm_shutdown());
    puts(heard == 2 && sum == 4 ? "verified" : "wrong");
    return heard != 2 || sum != 4;
}
