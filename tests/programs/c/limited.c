// How much of a limited address space malloc gives: blocks of every size, and most of the limit in all.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
int main(void) {
    struct rlimit limit;
    getrlimit(RLIMIT_AS, &limit);
    size_t all = limit.rlim_cur, sum = 0;
    for (size_t size = 1; size < all / 8; size *= 2) {
        char *block = malloc(size);
        if (!block) printf("no block of %zu\n", size);
        else memset(block, 1, size < 1 << 20 ? size : 1 << 20), free(block);
    }
    for (size_t size = 1 << 24; size >= 1 << 16; size /= 16)
        for (char *block; (block = malloc(size));) *block = 1, sum += size;
    printf("half of it: %d\n", sum >= all / 2);
    // Small blocks until nothing is left, and again when all were given back.
    void **list = 0, **block;
    long first = 0, second = 0;
    for (; (block = malloc(100)); first++) *block = list, list = block;
    for (; list; list = block) block = *list, free(list);
    for (; (block = malloc(100)); second++) *block = list, list = block;
    printf("as many again: %d\n", second >= first - first / 8);
    return 0;
}
