// Calls what changes mappings, and tells how often libcounter.so was called for it. With what errno is before and after.
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <sys/mman.h>

extern int mmaps, mmap64s, mprotects, madvises, mremaps, munmaps;

int main(void) {
    size_t len = 1 << 20;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS;
    mmaps = mmap64s = mprotects = madvises = mremaps = munmaps = 0;
    errno = 77;
    char *a = mmap(0, len, PROT_READ | PROT_WRITE, flags, -1, 0);
    char *b = mmap64(0, len, PROT_READ | PROT_WRITE, flags, -1, 0);
    a[0] = b[0] = 1;
    int good = mmap(b, 4096, PROT_READ, flags | MAP_FIXED, -1, 0) == b;
    good &= mprotect(a, 4096, PROT_READ) == 0 && madvise(a, len, MADV_DONTNEED) == 0 && a[0] == 0;
    a = mremap(b + 4096, 4096, 2 * len, MREMAP_MAYMOVE);
    good &= a != MAP_FAILED && munmap(a, len) == 0 && munmap(b, len) == 0 && errno == 77;
    good &= munmap(a + 1, 4096) == -1 && errno == EINVAL;
    printf("mmap %d mmap64 %d mprotect %d madvise %d mremap %d munmap %d errno %s\n", mmaps, mmap64s, mprotects, madvises,
           mremaps, munmaps, good ? "kept" : "changed");
    return 0;
}
