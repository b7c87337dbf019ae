// libstdc++ opened for a library alone: its exceptions are nobody else's.
#include <dlfcn.h>
#include <stdio.h>
int main(int argc, char **argv) {
    void *lib = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
    if (!lib) { puts(dlerror()); return 1; }
    int (*tried)(void) = (int (*)(void))dlsym(lib, "tried");
    printf("%d\n", tried());
    return 0;
}
