/* The program ends with accesses that it began and did not end: with a fence and without. */
#define _GNU_SOURCE
#include "check.h"

int main(void) {
    usvm_space_t space = open_space("vram=16M");
    size_t len = 2 << 20;
    char *data = aligned_alloc(len, 2 * len);
    CHECK(data);
    memset(data, 1, 2 * len);
    usvm_fence_t fence;
    usvm_access_t one = {data, len, USVM_ACCESS_WRITE, 0}, other = {data + len, len, USVM_ACCESS_READ, 0};
    OK(usvm_begin_access(space, &one, 1, NULL));
    OK(usvm_begin_access(space, &other, 1, &fence));
    puts("unended: good");
    return 0;
}
