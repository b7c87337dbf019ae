// Linked with the preload library: is there anything of usvm in this process, and does usvm_init hear the environment?
// Prints "secure S: more threads T, environment heard or not".
#include <dirent.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/auxv.h>
#include <unistd.h>
extern int usvm_init(const void *);
extern void usvm_last_error(const char **, int *);
static int threads(void) {
    int n = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *e; (e = readdir(tasks));) n += e->d_name[0] != '.';
    closedir(tasks);
    return n;
}
int main(void) {
    size_t n = 1 << 18;
    uint32_t *p = malloc(n * 4), sum = 0;
    int most = 0;
    for (size_t i = 0; i < n; i++) p[i] = (uint32_t)i;
    for (int round = 0; round < 60; round++) {
        usleep(3000);
        for (size_t i = 0; i < n; i++) sum = sum * 31 + p[i]++;
        if (threads() > most) most = threads();
    }
    // An environment that cannot be read as a configuration is an error, if it is read.
    setenv("USVM_VRAM", "rubbish", 1);
    const char *why = "";
    int heard = 0, result = usvm_init(NULL);
    if (result) {
        usvm_last_error(&why, &heard);
        heard = strstr(why, "USVM_VRAM") != NULL;
        if (!heard) fprintf(stderr, "%s\n", why);
    }
    printf("secure %d: more threads %d, environment %s, sum %x\n", getauxval(AT_SECURE) != 0, most > 1, heard ? "heard" : "not heard", sum);
    fflush(stdout);
    return 0;
}
