// dlopen and dlclose from several threads while memory migrates; argv: the folder with the libraries.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
static char path[6][400];
static void *opens(void *p) {
    uintptr_t s = 0;
    for (int i = 0; i < 60; i++) {
        void *lib = dlopen(path[(i + (intptr_t)p) % 6], i % 2 ? RTLD_NOW : RTLD_LAZY);
        if (!lib) { fprintf(stderr, "%s\n", dlerror()); exit(1); }
        uint32_t (*answer)(uint32_t) = (uint32_t (*)(uint32_t))dlsym(lib, "answer");
        uint32_t x = answer(i);
        if (i < 6) s = s * 31 + x;
        dlclose(lib);
    }
    return (void *)s;
}
int main(int argc, char **argv) {
    (void)argc;
    for (int i = 0; i < 6; i++) snprintf(path[i], sizeof path[i], "%s/libconstructor%d.so", argv[1], i);
    pthread_t t[4];
    for (intptr_t i = 0; i < 4; i++) pthread_create(&t[i], 0, opens, (void *)i);
    for (int i = 0; i < 4; i++) { void *r; pthread_join(t[i], &r); printf("%lx\n", (unsigned long)(uintptr_t)r); }
}
