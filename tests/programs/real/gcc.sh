# ci: gcc compiles and links, and what it made runs.
need gcc
for i in 1 2 3; do
    awk -v n="$i" 'BEGIN {
        print "#include <stdio.h>\n#include <stdlib.h>\n#include <string.h>"
        for (f = 0; f < 120; f++) printf "static unsigned long f%d(unsigned long x, const char *s) { switch (x %% 7) { case 0: return x * %dul + strlen(s); case 1: for (int i = 0; i < 9; i++) x ^= x << (i + %d) %% 13; return x; default: return x / %d + s[0]; } }\n", f, f * 37 + n, f, f % 11 + 1
        printf "unsigned long part%d(unsigned long x) {", n
        for (f = 0; f < 120; f++) printf " x += f%d(x, \"%d\");", f, f * f
        print " return x; }"
    }' >part$i.c
done
cat >main.c <<'C'
#include <stdio.h>
unsigned long part1(unsigned long), part2(unsigned long), part3(unsigned long);
int main(void) { unsigned long x = 1; for (int i = 0; i < 1000; i++) x = part1(part2(part3(x + i))); printf("%lu\n", x); }
C
[ "$BENCH" = 0 ] || { $RUN gcc -O1 -g -c part1.c; exit; }
for part in part1 part2 part3 main; do $RUN gcc -O2 -g -c $part.c -o $part.o || exit; done
$RUN gcc -O2 part1.o part2.o part3.o main.o -o program || exit
cksum part1.o part2.o part3.o main.o program
$RUN ./program
