// Linked with libraries whose constructors allocate, make threads and mappings, before main and before or after usvm's.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
extern uint32_t answer(uint32_t);
static char *early;
__attribute__((constructor(101))) static void first(void) { early = calloc(1, 300000); early[299999] = 9; }
__attribute__((destructor)) static void last(void) { early = realloc(early, 600000); printf("%d\n", early[299999]); free(early); }
int main(void) {
    for (uint32_t i = 0; i < 40; i++, usleep(1000)) printf("%x ", answer(i));
    puts("");
}
