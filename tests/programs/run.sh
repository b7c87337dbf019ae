#!/bin/sh
# Real programs without usvm, with it preloaded, and under chaos; what they print must be the same to the byte.
#
#   run.sh [--ci] [--heap] [--rate N] [--seed N] [program…]    the table
#   run.sh [--heap] --bench N [program…]                       N pairs of runs: plain and preloaded, with --heap mimalloc
#                                                              and usvm's heap; results also in target/programs/NAME.*.json
#
# A program is tests/programs/real/NAME.sh. It runs its commands behind $RUN and prints what must not differ. In the file:
#   # ci:            it is short enough for `make test`; otherwise # heavy:
#   # without: N     it cannot run without usvm and must then end with N; what it prints with usvm is in real/NAME.expected
#   # bench: no      no pairs of runs
#   # pairs: K      with --bench, K times as many pairs: each is short
# With --bench, $BENCH is the number of pairs, otherwise 0. Many pairs of short runs say more than few of long ones, for
# whatever slows a machine comes and goes: the work should take some tenths of a second then. What is behind $RUN is
# measured; $KEEP is a folder that stays, for what need not be made again for each run.
# A server is started behind $RUN_SERVER (its processor time counts), the client whose wall time counts behind $TIMED.
set -u
HERE=$(cd "$(dirname "$0")" && pwd)
ROOT=$(cd "$HERE/../.." && pwd)
TARGET=${CARGO_TARGET_DIR:-$ROOT/target}
LIB=${USVM_PRELOAD:-$TARGET/release/libusvm_preload.so}
HEAP=${USVM_HEAP_LIB:-$TARGET/release/libusvm_heap.so}
# What usvm does not know, it would warn of.
unset USVM_PRELOAD USVM_HEAP_LIB
MIMALLOC=${MIMALLOC:-$(ls /usr/lib/*/libmimalloc.so.2.0 2>/dev/null | head -1)}
WORK=${WORK:-$TARGET/programs}
RATE=2500 LEAST=1000 SEED=1 ONLY= MODES="off on chaos" BENCH=0 LIMIT=${LIMIT:-1500}
export HERE ROOT BENCH

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

header() { sed -n "s/^# $1: //p" "$HERE/real/$name.sh"; }

names=$*
if [ -z "$names" ]; then
    for file in "$HERE"/real/*.sh; do
        [ "$ONLY" = ci ] && ! head -1 "$file" | grep -q '^# ci:' && continue
        name=$(basename "$file" .sh)
        [ "$BENCH" -gt 0 ] && [ -n "$(header bench)$(header without)" ] && continue
        names="$names $name"
    done
fi

need() { for tool in "$@"; do command -v "$tool" >/dev/null 2>&1 || skip "$tool is not installed"; done; }
skip() { echo "skipped: $*"; exit 77; }

# How a program is started in mode $1.
prefix() {
    # What runs in the background of a script ignores SIGINT.
    clean="env --default-signal=INT,QUIT"
    stats="USVM_STATS_FILE=$WORK/$name/stats/%p"
    # As `usvm run` does.
    load="LD_PRELOAD=$LIB OPENCL_LAYERS=$LIB"
    heap="LD_PRELOAD=$HEAP:$LIB OPENCL_LAYERS=$LIB USVM_HEAP=1"
    case $1 in
        off) echo "$clean" ;;
        on) echo "$clean $load" ;;
        chaos) echo "$clean $load USVM_CHAOS=$RATE,$SEED $stats" ;;
        heap) echo "$clean $heap" ;;
        heapchaos) echo "$clean $heap USVM_CHAOS=$RATE,$SEED $stats" ;;
        mimalloc) echo "$clean LD_PRELOAD=$MIMALLOC" ;;
    esac
}

# Runs program $name in mode $1: output to $WORK/$name/$1.out, seconds to $seconds, its exit code is this one's. With
# --bench, what was measured is in $WORK/$name/spent.
once() {
    rm -rf "$WORK/$name/dir" "$WORK/$name/stats" "$WORK/$name/spent"
    KEEP=$WORK/$name/keep
    mkdir -p "$WORK/$name/dir" "$WORK/$name/stats" "$KEEP"
    begin=$(date +%s%N)
    (
        cd "$WORK/$name/dir" || exit
        RUN=$(prefix "$1") RUN_SERVER=$RUN TIMED=
        if [ "$BENCH" -gt 0 ]; then
            spent="$WORK/spent $WORK/$name/spent"
            RUN_SERVER="$spent cpu $RUN" TIMED="$spent wall" RUN="$spent all $RUN"
        fi
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

# What chaos did to the run that just ended, per second of it.
rate() { echo "$(migrations) $seconds" | awk '{ printf "%d", $1 / $2 }'; }

table() {
    printf '%-24s' program
    for mode in $MODES; do printf '%12s' "$mode"; done
    printf '%16s  %s\n' "migrations/s" identical
    failed=0
    for name in $names; do
        printf '%-24s' "$name"
        without=$(header without)
        same=yes rate=-
        for mode in $MODES; do
            once "$mode"
            code=$?
            if [ $code = 77 ]; then same="$(grep -h -m1 '^skipped:' "$WORK/$name/$mode.out")"; break; fi
            printf '%11ss' "$seconds"
            meant=0
            [ "$mode" = off ] && [ -n "$without" ] && meant=$without
            if [ $code != "$meant" ]; then
                same="NO: $mode ends with $code, not $meant: $(tail -qn 1 "$WORK/$name/$mode.out" "$WORK/$name/$mode.err" | tail -n 1)"
                break
            fi
            [ "$mode" = off ] && [ -n "$without" ] && continue
            case $mode in *chaos)
                rate=$(rate)
                # Not often enough, where it took long enough to tell: once more, in case the machine had other things to do.
                if [ "$rate" -lt $LEAST ] && [ "${seconds%.*}" -ge 2 ]; then
                    once "$mode" || same="NO: $mode ends with $?, the second time"
                    rate=$(rate)
                    [ "$rate" -ge $LEAST ] || same="NO: fewer than $LEAST migrations a second"
                fi
                # A program that nothing disturbed has shown nothing.
                [ "$rate" -gt 0 ] || same="NO: nothing migrated under chaos" ;;
            esac
            expected=$WORK/$name/off.out
            [ -z "$without" ] || expected=$HERE/real/$name.expected
            cmp -s "$expected" "$WORK/$name/$mode.out" || same="NO: diff $expected $WORK/$name/$mode.out"
        done
        printf '%16s  %s\n' "$rate" "$same"
        case $same in NO*) failed=1 ;; esac
    done
    return $failed
}

# Pairs of runs in the order A B, B A, A B, …: whatever drifts slowly hits both alike.
bench() {
    against=off with=on
    [ "$MODES" = "off on chaos" ] || against=mimalloc with=heap
    [ $against = off ] || [ -n "$MIMALLOC" ] || { echo "skipped: libmimalloc2.0 is not installed"; return 0; }
    cc -O2 -o "$WORK/spent" "$HERE/c/spent.c" || return 2
    python3 "$HERE/pairs.py" --head "$against" "$with" || return 2
    failed=0 files=
    for name in $names; do
        times=$WORK/$name.$with.times
        : >"$times"
        rm -rf "$WORK/$name/keep"
        round=0 pairs=$(header pairs)
        pairs=$((${pairs:-1} * BENCH))
        while [ $round -le $pairs ]; do
            # The first round warms up.
            order="$against $with"; [ $((round % 2)) = 1 ] && order="$with $against"
            for mode in $order; do
                once $mode
                code=$?
                if [ $code = 77 ]; then
                    printf '%-24s%s\n' "$name" "$(grep -h -m1 '^skipped:' "$WORK/$name/$mode.out")"
                    continue 3
                fi
                # A run that failed has no time.
                if [ $code != 0 ]; then
                    echo "$name: $mode ends with $code: $(tail -qn 1 "$WORK/$name/$mode.out" "$WORK/$name/$mode.err" | tail -n 1)"
                    failed=1
                    continue
                fi
                [ $round -gt 0 ] && awk -v r="$round" -v m="$mode" '{ w += $1; c += $2 } END { print r, m, w, c }' "$WORK/$name/spent" >>"$times"
            done
            round=$((round + 1))
        done
        python3 "$HERE/pairs.py" "$name" "$against" "$with" "$times" --json "$WORK/$name.$with.json" || { failed=1; continue; }
        files="$files $WORK/$name.$with.json"
    done
    # shellcheck disable=SC2086
    [ -z "$files" ] || python3 "$HERE/pairs.py" --sum $files
    return $failed
}

mkdir -p "$WORK"
if [ "$BENCH" -gt 0 ]; then bench; else table; fi
