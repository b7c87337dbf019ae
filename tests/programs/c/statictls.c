// Compiled with -DLIBRARY and -ftls-model=initial-exec: a library whose thread-local storage must be static. Otherwise the
// program that opens it late, the last argument, when other libraries have had their share (those before it are opened
// first), and uses it from several threads.
#include <stdint.h>
#ifdef LIBRARY
static __thread uint32_t local[120] = {7};
uint32_t answer(uint32_t x) {
    uint32_t s = 0;
    for (int i = 0; i < 120; i++) local[i] += x + i;
    for (int i = 0; i < 120; i++) s = s * 31 + local[i];
    return s;
}
#else
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <unistd.h>
static uint32_t (*answer)(uint32_t);
static void *ask(void *p) {
    uintptr_t s = 0;
    for (int i = 0; i < 60; i++, usleep(500)) s = s * 31 + answer((uint32_t)(uintptr_t)p + i);
    return (void *)s;
}
int main(int argc, char **argv) {
    pthread_t t[4];
    void *lib = 0;
    for (int i = 1; i < argc; i++) {
        lib = dlopen(argv[i], RTLD_NOW);
        if (!lib) { puts(dlerror()); return 1; }
    }
    answer = (uint32_t (*)(uint32_t))dlsym(lib, "answer");
    for (uintptr_t i = 0; i < 4; i++) pthread_create(&t[i], 0, ask, (void *)i);
    for (int i = 0; i < 4; i++) { void *r; pthread_join(t[i], &r); printf("%lx\n", (unsigned long)(uintptr_t)r); }
    printf("%x\n", answer(9));
}
#endif
