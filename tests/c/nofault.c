/* A device without recoverable faults and with little memory: copies and fills in pieces, brackets that fit or do not. */
#define _DEFAULT_SOURCE
#include "check.h"
#include <pthread.h>
#include <unistd.h>

#define LEN ((size_t)24 << 20)

/* Six threads want three quarters of the memory each: all but one wait, and the one can always end its access. */
static void *want_most(void *space) {
    size_t len = (size_t)12 << 20;
    unsigned char *mine = usvm_malloc(len);
    CHECK(mine != NULL);
    memset(mine, 5, len);
    usvm_access_t access = {mine, len, USVM_ACCESS_WRITE, 0};
    for (int i = 0; i < 3; i++) {
        OK(usvm_begin_access(space, &access, 1, NULL));
        usleep(20000);
        OK(usvm_end_access(space, NULL));
    }
    CHECK(mine[len - 1] == 5);
    usvm_free(mine);
    return NULL;
}

static void crowd(usvm_space_t space) {
    pthread_t threads[6];
    for (int i = 0; i < 6; i++)
        pthread_create(&threads[i], NULL, want_most, space);
    for (int i = 0; i < 6; i++)
        pthread_join(threads[i], NULL);
}

int main(void) {
    usvm_space_t space = open_space("vram=16M;faults=off");
    usvm_device_t device;
    usvm_device_info_t info;
    info.struct_size = sizeof info;
    OK(usvm_device_get(0, &device));
    OK(usvm_device_get_info(device, &info));
    CHECK((info.capabilities & USVM_DEVICE_CAP_FAULTS) == 0);

    unsigned char *data = usvm_malloc(LEN);
    CHECK(data != NULL);
    OK(usvm_fill(space, data, 4, LEN));
    for (size_t i = 0; i < LEN; i += 4096)
        data[i] = (unsigned char)(i >> 12);
    OK(usvm_copy(space, data + 12345, data, LEN - 12345));
    for (size_t i = 0; i < LEN - 12345; i += 4096)
        CHECK(data[12345 + i] == (unsigned char)(i >> 12));
    OK(usvm_copy(space, data, data + 12345, LEN - 12345));
    for (size_t i = 0; i < LEN - 12345; i += 4096)
        CHECK(data[i] == (unsigned char)(i >> 12));

    usvm_access_t all = {data, LEN, USVM_ACCESS_WRITE, 0}, some = {data, LEN / 4, USVM_ACCESS_WRITE, 0};
    CHECK(usvm_begin_access(space, &all, 1, NULL) == USVM_ERROR_OUT_OF_DEVICE_MEMORY);
    CHECK(strncmp(last_message(), "accesses", 8) == 0 && strstr(last_message(), "25165824"));
    OK(usvm_begin_access(space, &some, 1, NULL));
    OK(usvm_end_access(space, NULL));
    usvm_fence_t fence, untouched = NULL;
    fence = untouched;
    CHECK(usvm_begin_access(space, &all, 1, &fence) == USVM_ERROR_OUT_OF_DEVICE_MEMORY);
    CHECK(fence == untouched);

    crowd(space);
    usvm_free(data);
    close_space(space);
    puts("nofault: good");
    return 0;
}
