// Runs a command and appends one line to a file: its wall time, and the processor time of it and of all that it waited for,
// in seconds. argv: file, "all" | "cpu" (a server's wall time says nothing) | "wall" (a client's processor time neither), command
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;
static double seconds(long s, long ns) { return (double)s + (double)ns / 1e9; }

int main(int argc, char **argv) {
    if (argc < 4) return 2;
    struct timespec from, to;
    struct rusage usage;
    pid_t child;
    int status;
    clock_gettime(CLOCK_MONOTONIC, &from);
    if ((errno = posix_spawnp(&child, argv[3], NULL, NULL, argv + 3, environ)) != 0) {
        perror(argv[3]);
        return 127;
    }
    // What the terminal sends is the command's business.
    signal(SIGINT, SIG_IGN);
    signal(SIGQUIT, SIG_IGN);
    while (wait4(child, &status, 0, &usage) < 0)
        if (errno != EINTR) return 126;
    clock_gettime(CLOCK_MONOTONIC, &to);
    double wall = seconds(to.tv_sec - from.tv_sec, to.tv_nsec - from.tv_nsec);
    double cpu = seconds(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec, (usage.ru_utime.tv_usec + usage.ru_stime.tv_usec) * 1000);
    char line[80];
    int length = snprintf(line, sizeof line, "%.6f %.6f\n", strcmp(argv[2], "cpu") ? wall : 0, strcmp(argv[2], "wall") ? cpu : 0);
    int file = open(argv[1], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (file < 0 || write(file, line, (size_t)length) != length) {
        perror(argv[1]);
        return 126;
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
