/* The library loaded while the program runs, as scripting languages do: it must fit into what is left for its threads' storage. */
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

int main(int argc, char **argv) {
    void *library = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
    if (library == NULL) {
        fprintf(stderr, "%s\n", argc == 2 ? dlerror() : "usage: late LIBRARY");
        return 1;
    }
    void *(*take)(size_t);
    void (*give)(void *);
    int (*begin)(const void *);
    int (*end)(void);
    /* ISO C has no conversion from what dlsym gives; POSIX promises that the bits are right. */
    void *found[] = {dlsym(library, "usvm_malloc"), dlsym(library, "usvm_free"), dlsym(library, "usvm_init"),
                     dlsym(library, "usvm_shutdown")};
    memcpy(&take, &found[0], sizeof take);
    memcpy(&give, &found[1], sizeof give);
    memcpy(&begin, &found[2], sizeof begin);
    memcpy(&end, &found[3], sizeof end);
    if (take == NULL || give == NULL || begin == NULL || end == NULL || begin(NULL) != 0)
        return 2;
    char *block = take(3 << 20);
    if (block == NULL)
        return 3;
    memset(block, 7, 3 << 20);
    give(block);
    if (end() != 0)
        return 4;
    puts("late: good");
    return 0;
}
