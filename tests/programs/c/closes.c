// Closes every descriptor there may be, in every way there is, as daemons do, and goes on computing.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

static unsigned long work(unsigned long seed) {
    unsigned long sum = 0, n = 1 << 18, *p = malloc(n * sizeof *p);
    for (int round = 0; round < 6; round++)
        for (unsigned long i = 0; i < n; i++) sum = sum * 31 + (p[i] = round ? p[i] + i : seed + i);
    free(p);
    return sum;
}

// What /proc/self/fd lists, but for the descriptor that reads it.
static void list(const char *where) {
    DIR *dir = opendir(where);
    for (struct dirent *e; (e = readdir(dir));)
        if (e->d_name[0] != '.' && atoi(e->d_name) != dirfd(dir)) printf("%s ", e->d_name);
    printf("in %s\n", where);
    closedir(dir);
}

int main(void) {
    setvbuf(stdout, malloc(4096), _IOFBF, 4096);
    printf("%lx\n", work(1));
    for (int fd = 3; fd < 70000; fd++) close(fd);
    list("/proc/self/fd");
    list("/proc/self/fdinfo");
    printf("%lx\n", work(2));
    closefrom(3);
    printf("%lx\n", work(3));
    printf("close_range %d\n", close_range(3, ~0u, 0));
    printf("%lx\n", work(4));
    // What is closed is gone: the lowest numbers are free.
    int a = open("/dev/null", O_RDONLY), b = dup(a);
    printf("%d %d\n", a, b);
    // And stay free: nobody opens anything for a moment.
    int others = 0;
    for (int i = 0; i < 20000; i++) {
        int c = open("/dev/null", O_RDONLY);
        others += c != b + 1;
        close(c);
    }
    printf("%d times another number\n", others);
    // Over every number up to 200 another one.
    for (int fd = 10; fd < 200; fd++) if (dup2(a, fd) != fd) printf("dup2 %d: %s\n", fd, strerror(errno));
    printf("%lx\n", work(5));
    // No number shows a file that the program did not open, and over any of them it can put its own, or is told that one is
    // busy: what was there is still there then.
    struct rlimit most;
    getrlimit(RLIMIT_NOFILE, &most);
    int open_files = 0, busy = 0;
    struct stat about;
    for (int fd = 200; fd < (int)most.rlim_cur; fd++) open_files += fstat(fd, &about) == 0;
    for (int fd = 200; fd < (int)most.rlim_cur; fd++) {
        errno = 0;
        if ((fd % 2 ? dup2(a, fd) : dup3(a, fd, O_CLOEXEC)) == fd) close(fd);
        else if (errno == EBUSY) busy++;
        else printf("dup %d: %s\n", fd, strerror(errno));
    }
    printf("%d open files, %s busy, %lx\n", open_files, busy < 40 ? "few" : "many", work(9));
    // A daemon: two forks, a new session, /dev/null in all places.
    fflush(stdout);
    int fds[2];
    if (pipe(fds)) return 1;
    if (fork() == 0) {
        setsid();
        if (fork() == 0) {
            int out = dup(fds[1]);
            for (int fd = 0; fd < 1024; fd++) if (fd != out) close(fd);
            char line[64];
            int len = snprintf(line, sizeof line, "daemon %lx\n", work(6));
            usleep(20000);
            len += snprintf(line + len, sizeof line - len, "%lx\n", work(7));
            if (write(out, line, len) != len) _exit(1);
            exit(0);
        }
        _exit(0);
    }
    wait(0);
    close(fds[1]);
    char line[256];
    for (ssize_t got; (got = read(fds[0], line, sizeof line)) > 0;) fwrite(line, 1, got, stdout);
    struct rlimit low = {16, 16};
    setrlimit(RLIMIT_NOFILE, &low);
    printf("%lx\n", work(8));
    return 0;
}
