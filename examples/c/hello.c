/* Plain malloc memory goes to the device and comes back by itself. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <usvm.h>

static void must(usvm_result_t result) {
    if (result != USVM_SUCCESS) {
        const char *message;
        usvm_last_error(&message, NULL);
        fprintf(stderr, "%s: %s\n", usvm_result_name(result), message);
        exit(1);
    }
}

int main(void) {
    usvm_device_t device;
    usvm_space_t space;
    must(usvm_init(NULL));
    must(usvm_device_get(0, &device));
    must(usvm_space_create(device, NULL, &space));

    usvm_device_info_t info = {.struct_size = sizeof info};
    must(usvm_device_get_info(device, &info));
    printf("%s, %" PRIu64 " MiB of its own\n", info.name, info.vram_bytes >> 20);

    size_t len = 16 << 20;
    unsigned char *data = malloc(len);
    if (!data)
        return 1;
    must(usvm_fill(space, data, 42, len)); /* the device writes it, in its memory */

    uint64_t there;
    must(usvm_range_get_attribute(space, data, len, USVM_ATTR_RESIDENT_DEVICE_BYTES, &there, sizeof there));
    printf("%" PRIu64 " of %zu MiB are on the device\n", there >> 20, len >> 20);

    size_t sum = 0;
    for (size_t i = 0; i < len; i++) /* the CPU reads it: it comes back */
        sum += data[i];

    usvm_stats_t stats = {.size = sizeof stats};
    must(usvm_stats_get(space, &stats));
    printf("%" PRIu64 " CPU faults brought back %" PRIu64 " MiB\n", stats.cpu_faults, stats.bytes_to_host >> 20);

    free(data);
    must(usvm_space_destroy(space));
    must(usvm_shutdown());
    puts(sum == 42 * len ? "verified" : "wrong");
    return sum != 42 * len;
}
