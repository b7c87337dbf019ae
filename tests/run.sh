#!/bin/sh
# All tests, then one line with their numbers. Tests that cannot run here say "skipped:" and why.
set -u
cd "$(dirname "$0")/.."

log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0

step() {
    echo "== $*"
    { "$@" 2>&1; echo $? >"$log.status"; } | tee -a "$log"
    read -r status <"$log.status"
    rm -f "$log.status"
    return "$status"
}

# Races are real: tests that hammer memory want the processors for themselves, so binaries run one after the other.
step cargo test --workspace --no-fail-fast || failed=1

# A program whose last line must be `verified`.
verified() {
    step "$@" || failed=1
    [ "$(tail -n 1 "$log")" = verified ] || { echo "this did not end in verified: $*"; failed=1; }
}
verified cargo run --release --quiet -p usvm-examples --bin demo
# And not if a single byte is wrong.
if step cargo run --release --quiet -p usvm-examples --bin demo -- --megabytes 8 --vram 2 --rounds 1 --spoil; then
    echo "the demo did not notice a wrong byte"
    failed=1
fi
verified sh examples/opencl/demo.sh
verified cargo run --release --quiet -p usvm-examples --bin collections
# Real programs under chaos: what differs is a failure, what is not installed is skipped.
step cargo build --release --quiet -p usvm-preload -p usvm-preload-heap || failed=1
step sh tests/programs/run.sh --ci || failed=1
if command -v python3 >/dev/null 2>&1; then
    step make --no-print-directory check-kernel-ref || failed=1
else
    echo "skipped: the recorded kernel traces need python3"
fi

# A test that runs its binary again in a process of its own has that one's line in the log, too, with the others filtered out.
passed=$(awk '/^test result:.* 0 filtered out/ { p += $4; f += $6 } END { print p + 0, "passed,", f + 0, "failed" }' "$log")
skipped=$(grep -c 'skipped:' "$log")
if [ $failed != 0 ]; then
    echo "== what failed"
    # Failed tests, panics, time that ran out, binaries that ended without a result, programs with another result.
    grep -nE "^test .*FAILED|panicked at|no end after|watchdog: not done|^  thread |process didn't exit|^ +\`-p |^error|this did not end in|did not notice| NO: " "$log" |
        grep -v 'should panic' | tail -n 60 | cut -c 1-300
fi
echo "$passed, $skipped skipped"
exit $failed
