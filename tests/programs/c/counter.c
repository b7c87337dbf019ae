// Stands for a library that interposes what changes mappings, as heap profilers do: counts calls and makes them.
#define _GNU_SOURCE
#include <stdarg.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

int mmaps, mmap64s, mprotects, madvises, mremaps, munmaps;

void *mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset) {
    mmaps++;
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, offset);
}

void *mmap64(void *at, size_t len, int prot, int flags, int fd, off64_t offset) {
    mmap64s++;
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, offset);
}

int mprotect(void *at, size_t len, int prot) {
    mprotects++;
    return syscall(SYS_mprotect, at, len, prot);
}

int madvise(void *at, size_t len, int advice) {
    madvises++;
    return syscall(SYS_madvise, at, len, advice);
}

void *mremap(void *at, size_t len, size_t new_len, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    void *to = va_arg(rest, void *);
    va_end(rest);
    mremaps++;
    return (void *)syscall(SYS_mremap, at, len, new_len, flags, to);
}

int munmap(void *at, size_t len) {
    munmaps++;
    return syscall(SYS_munmap, at, len);
}
