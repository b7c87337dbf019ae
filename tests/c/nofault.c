/* A device without recoverable faults and with little memory: copies and fills in pieces, brackets that fit or do not. */
#include "check.h"

#define LEN ((size_t)24 << 20)

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

    usvm_free(data);
    close_space(space);
    puts("nofault: good");
    return 0;
}
