/* A program that lowers its limit of open files below the numbers of usvm's descriptors, and forks: the parent's memory
   stays as it is whatever its children do about descriptors that are not theirs. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

enum { PAGES = 2048, CHILDREN = 60 };

int main(void) {
    struct rlimit few = {64, 64};
    if (setrlimit(RLIMIT_NOFILE, &few) != 0) return 2;
    unsigned char *memory = malloc(PAGES * 4096ul);
    for (int i = 0; i < PAGES; i++) memset(memory + i * 4096ul, i % 251, 4096);
    int wrong = 0;
    for (int child = 0; child < CHILDREN; child++) {
        pid_t pid = fork();
        if (pid < 0) return 3;
        if (pid == 0) {
            for (int i = 0; i < PAGES; i += 7)
                if (memory[i * 4096ul + 5] != i % 251) _exit(1);
            _exit(0);
        }
        usleep(3000);
        for (int i = child; i < PAGES; i += 3) {
            unsigned char *page = memory + i * 4096ul;
            for (int at = 0; at < 4096; at += 64) wrong += page[at] != i % 251;
            memset(page, i % 251, 4096);
        }
        int status;
        if (waitpid(pid, &status, 0) != pid || status != 0) wrong++;
    }
    printf("%d wrong\n", wrong);
    return wrong != 0;
}
