// Guard regions (MADV_GUARD_INSTALL, Linux 6.13): what they are installed over is gone, and reads as zeroes when they are
// removed. Where the kernel does not know them, nothing happens.
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>

enum { INSTALL = 102, REMOVE = 103, LEN = 2 << 20, PAGE = 4096 };

int main(void) {
    char *p = mmap(0, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int old = 0, other = 0, refused = 0;
    for (int round = 0; round < 400; round++) {
        memset(p, round % 100 + 1, LEN);
        int from = round % 7 * 16 * PAGE, to = LEN - round % 5 * 8 * PAGE;
        if (madvise(p + from, to - from, INSTALL)) { refused++; continue; }
        if (madvise(p + from, to - from, REMOVE)) return 2;
        for (int at = 0; at < LEN; at += PAGE) {
            int inside = at >= from && at < to;
            if (p[at] != (inside ? 0 : round % 100 + 1)) inside ? old++ : other++;
        }
    }
    printf("%s, %d pages with what was there, %d others wrong\n", refused ? "not known" : "known", old, other);
    return old || other;
}
