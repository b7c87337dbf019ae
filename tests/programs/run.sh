#!/bin/sh
# Real programs without usvm, with it preloaded, and under chaos; what they print must be the same to the byte.
#
#   run.sh [--ci] [--heap] [--rate N] [--seed N] [program…]    the table
#   run.sh --bench N [program…]                                paired runs: plain and preloaded, N times each
#
# A program is tests/programs/real/NAME.sh. It runs its commands behind $RUN and prints what must not differ.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
LIB=${USVM_PRELOAD:-$TARGET/release/libusvm_preload.so}
HEAP=${USVM_HEAP_LIB:-$TARGET/release/libusvm_heap.so}
MIMALLOC=${MIMALLOC:-$(ls /usr/lib/*/libmimalloc.so.2.0 2>/dev/null | head -1)}
WORK=${WORK:-$TARGET/programs}
RATE=2500 SEED=1 ONLY= MODES="off on chaos" BENCH=0 LIMIT=${LIMIT:-1500}
export HERE ROOT

while [ $# -gt 0 ]; do
    case $1 in
        --ci) ONLY=ci ;;
        --heap) MODES="off heap heapchaos" ;;
        --rate) RATE=$2; shift ;;
        --seed) SEED=$2; shift ;;
        --bench) BENCH=$2; shift ;;
        --*) echo "run.sh: unknown option $1" >&2; exit 2 ;;
        *) break ;;
    esac
    shift
done
[ -f "$LIB" ] || { echo "run.sh: $LIB is missing: cargo build --release -p usvm-preload" >&2; exit 2; }

names=$*
if [ -z "$names" ]; then
    for file in "$HERE"/real/*.sh; do
        [ "$ONLY" = ci ] && ! head -1 "$file" | grep -q '^# ci:' && continue
        names="$names $(basename "$file" .sh)"
    done
fi

need() { for tool in "$@"; do command -v "$tool" >/dev/null 2>&1 || skip "$tool is not installed"; done; }
skip() { echo "skipped: $*"; exit 77; }

# How a program is started in mode $1.
prefix() {
    # What runs in the background of a script ignores SIGINT.
    clean="env --default-signal=INT,QUIT"
    stats="USVM_STATS_FILE=$WORK/$name/stats/%p"
    case $1 in
        off) echo "$clean" ;;
        on) echo "$clean LD_PRELOAD=$LIB" ;;
        chaos) echo "$clean LD_PRELOAD=$LIB USVM_CHAOS=$RATE,$SEED $stats" ;;
        heap) echo "$clean LD_PRELOAD=$HEAP:$LIB USVM_HEAP=1" ;;
        heapchaos) echo "$clean LD_PRELOAD=$HEAP:$LIB USVM_HEAP=1 USVM_CHAOS=$RATE,$SEED $stats" ;;
        mimalloc) echo "$clean LD_PRELOAD=$MIMALLOC" ;;
    esac
}

# Runs program $name in mode $1: output to $WORK/$name/$1.out, seconds to $seconds, its exit code is this one's.
once() {
    rm -rf "$WORK/$name/dir" "$WORK/$name/stats"
    mkdir -p "$WORK/$name/dir" "$WORK/$name/stats"
    begin=$(date +%s%N)
    (
        cd "$WORK/$name/dir" || exit
        RUN=$(prefix "$1")
        export LC_ALL=C
        ulimit -c 0
        . "$HERE/real/$name.sh"
    ) >"$WORK/$name/$1.out" 2>"$WORK/$name/$1.err" &
    job=$!
    (i=0; while [ $i -lt "$LIMIT" ] && kill -0 $job 2>/dev/null; do sleep 1; i=$((i + 1)); done
     [ $i -lt "$LIMIT" ] || { echo "not done after $LIMIT s" >>"$WORK/$name/$1.out"; kill $job; }) &
    guard=$!
    wait $job
    code=$?
    kill $guard 2>/dev/null
    wait $guard 2>/dev/null
    seconds=$(echo "$begin $(date +%s%N)" | awk '{ printf "%.3f", ($2 - $1) / 1e9 }')
    return $code
}

migrations() {
    cat "$WORK/$name"/stats/* 2>/dev/null | tr ',{' '\n\n' |
        awk -F: '/"migrations_(4k|64k|2m)"/ { sum += $2 } END { print sum + 0 }'
}

table() {
    printf '%-24s' program
    for mode in $MODES; do printf '%12s' "$mode"; done
    printf '%16s  %s\n' "migrations/s" identical
    failed=0
    for name in $names; do
        printf '%-24s' "$name"
        same=yes rate=-
        for mode in $MODES; do
            once "$mode"
            code=$?
            if [ $code = 77 ]; then same="$(grep -h -m1 '^skipped:' "$WORK/$name/$mode.out")"; break; fi
            if [ "$mode $code" = "off 1" ]; then same="NO: does not run without usvm: $(tail -n 1 "$WORK/$name/off.out")"; break; fi
            echo "exit $code" >>"$WORK/$name/$mode.out"
            printf '%11ss' "$seconds"
            case $mode in *chaos) rate=$(echo "$(migrations) $seconds" | awk '{ printf "%d", $1 / $2 }') ;; esac
            cmp -s "$WORK/$name/off.out" "$WORK/$name/$mode.out" || same="NO: diff $WORK/$name/off.out $WORK/$name/$mode.out"
        done
        # A program that nothing disturbed has shown nothing.
        [ "$rate $same" = "0 yes" ] && same="NO: nothing migrated under chaos"
        printf '%16s  %s\n' "$rate" "$same"
        case $same in NO*) failed=1 ;; esac
    done
    return $failed
}

bench() {
    against=off with=on
    [ "$MODES" = "off on chaos" ] || against=mimalloc with=heap
    printf '%-24s %10s %10s %10s %10s %8s %6s\n' program "$against" p90 "$with" p90 ratio n
    for name in $names; do
        : >"$WORK/$name.times"
        round=0
        while [ $round -le "$BENCH" ]; do
            # The first round warms up; which goes first alternates.
            order="$against $with"; [ $((round % 2)) = 1 ] && order="$with $against"
            for mode in $order; do
                once $mode; [ $? = 77 ] && continue 3
                [ $round -gt 0 ] && echo "$round $mode $seconds" >>"$WORK/$name.times"
            done
            round=$((round + 1))
        done
        # The ratio is the median of the pairs' ratios.
        awk -v name="$name" -v a="$against" -v b="$with" '
            function at(list, n, part) { i = int(part * (n - 1) + 0.999); return list[i + 1] }
            function order(list, n,  i, j, t) { for (i = 2; i <= n; i++) for (j = i; j > 1 && list[j-1] > list[j]; j--) { t = list[j]; list[j] = list[j-1]; list[j-1] = t } }
            { time[$1, $2] = $3; if ($1 > n) n = $1 }
            END { for (i = 1; i <= n; i++) { x[i] = time[i, a]; y[i] = time[i, b]; r[i] = y[i] / x[i] }
                  order(x, n); order(y, n); order(r, n)
                  printf "%-24s %9.3fs %9.3fs %9.3fs %9.3fs %8.3f %6d\n", name, at(x, n, .5), at(x, n, .9), at(y, n, .5), at(y, n, .9), at(r, n, .5), n }' "$WORK/$name.times"
    done
}

mkdir -p "$WORK"
if [ "$BENCH" -gt 0 ]; then bench; else table; fi
