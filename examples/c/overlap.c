/* Two buffers in turn: one is on its way to the device by a fence while the CPU still fills the other. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <usvm.h>

#define LEN ((size_t)4 << 20)
#define ROUNDS 6

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

    unsigned char *buffers[2] = {usvm_malloc(LEN), usvm_malloc(LEN)};
    unsigned char *result = usvm_malloc(LEN);
    if (!buffers[0] || !buffers[1] || !result)
        return 1;
    const usvm_location_t on_device = {USVM_LOCATION_DEVICE, 0};
    usvm_fence_t fence = NULL;
    int wrong = 0;

    for (int round = 0; round <= ROUNDS; round++) {
        unsigned char *filling = buffers[round % 2], *working = buffers[(round + 1) % 2];
        if (round < ROUNDS)
            memset(filling, round, LEN); /* while the other is on its way */
        if (fence) {
            must(usvm_fence_wait(fence, -1));
            must(usvm_fence_destroy(fence));
            must(usvm_copy(space, result, working, LEN)); /* device to device */
            wrong += result[LEN / 2] != round - 1;
        }
        fence = NULL;
        if (round < ROUNDS)
            must(usvm_prefetch(space, filling, LEN, on_device, &fence));
    }

    usvm_free(result);
    usvm_free(buffers[0]);
    usvm_free(buffers[1]);
    must(usvm_space_destroy(space));
    must(usvm_shutdown());
    puts(wrong ? "wrong" : "verified");
    return wrong != 0;
}
