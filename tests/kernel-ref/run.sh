#!/bin/bash
# SPDX-License-Identifier: MIT OR Apache-2.0
# Asks the kernel's own drm_gpusvm, in a virtual machine: builds the module and the guest driver in a Debian chroot, boots,
# records traces, checks them and replays them through usvm's space. See README.md.
#
#   run.sh            fresh random traces: SEED (default: the time), OPS in all (default 100000), CONFIGS (default: all);
#                     usvm-live plays LIVE_OPS of each (default 500) in the machine, and all of them here
#   run.sh record     the traces that are kept: traces/*.trace.xz
#   run.sh bench      times of the kernel's operations and of usvm's beside them, as JSON on BENCH_OUT (default: the cache)
#   run.sh relock     resolves the packages anew with debootstrap and writes packages.lock
#   run.sh build      only builds
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
cache=${USVM_CACHE:-$(cd "$here/../.." && pwd)/.cache/kernel-ref}
# The mirror that apt uses on this machine, unless told otherwise.
mirror=${USVM_MIRROR:-$(apt-get indextargets --format '$(REPO_URI)' 2>/dev/null | grep -v security | head -n 1 | sed 's,/$,,')}
lock=$here/packages.lock
compiler=gcc-16
cargo=${CARGO:-cargo}
configs=${CONFIGS:-chunks windows edge512 migrate huge full fork small ladder narrow pages}

skip() { echo "skipped: $*"; exit 0; }
fail() { echo "kernel-ref: $*" >&2; exit 1; }
say() { echo "kernel-ref: $*"; }

# ---- what must be there ----------------------------------------------------------------------------------------------

prerequisites() {
    [ "$(id -u)" = 0 ] || skip "not root (the chroot needs it)"
    [ "$(uname -m)" = x86_64 ] || skip "not x86_64"
    local tool
    for tool in qemu-system-x86_64 objcopy dpkg-deb unshare chroot cpio xz python3 sha256sum curl flock; do
        command -v $tool >/dev/null || skip "no $tool"
    done
    unshare -m true 2>/dev/null || skip "no right to make a mount namespace"
    mkdir -p "$cache/debs"
    exec 9>"$cache/lock"
    flock -n 9 || fail "another run uses $cache"
}

with_cargo() {
    command -v "$cargo" >/dev/null || skip "no $cargo (usvm-replay is built with it)"
}

# ---- packages --------------------------------------------------------------------------------------------------------

# packages.lock: name, version, path in the mirror's pool, sha256
locked() { grep -v '^#' "$lock"; }

fetch_packages() {
    local name version path sha file
    while read -r name version path sha; do
        file=$cache/debs/${path##*/}
        if [ -f "$file" ]; then continue; fi
        if ! curl -fsS --retry 2 -m 600 -o "$file.part" "$mirror/$path"; then
            curl -fsSI -m 20 -o /dev/null "$mirror/dists/sid/Release" || skip "no network and no cache ($name is missing)"
            newest "$name $version"
            return
        fi
        mv "$file.part" "$file"
    done < <(locked)
    locked | awk -v d="$cache/debs" '{n=split($3,p,"/"); print $4 "  " d "/" p[n]}' >"$cache/sums"
    sha256sum --quiet -c "$cache/sums" || fail "a cached package is not the one in packages.lock: remove it"
}

# The archive has only the newest version of a package. Where a locked one is gone, today's are taken, for this cache.
newest() { # what is gone
    local advice="Set USVM_MIRROR to a mirror that keeps it (Debian keeps snapshots of its archive by date)"
    [ "$lock" != "$cache/packages.lock" ] || fail "$1 is no longer at $mirror. $advice"
    command -v debootstrap >/dev/null || fail "$1 is no longer at $mirror. $advice, or install debootstrap: then today's is taken"
    say "$1 is no longer at $mirror: taking today's packages. $advice to have those of packages.lock"
    lock=$cache/packages.lock
    relock
}

# debootstrap resolves and verifies (signatures of the archive); the lock keeps what it found.
relock() {
    command -v debootstrap >/dev/null || skip "no debootstrap"
    local dl=$cache/relock index release path name version file
    rm -rf "$dl" && mkdir -p "$dl"
    index=$(mktemp)
    curl -fsS -m 300 "$mirror/dists/sid/main/binary-amd64/Packages.xz" | xz -d >"$index"
    release=${KERNEL:-$(sed -n 's/^Package: linux-headers-\([0-9.]*+deb[0-9]*-amd64\)$/\1/p' "$index" | sort -V | tail -n 1)}
    [ -n "$release" ] || fail "sid has no amd64 kernel headers"
    say "kernel $release"
    debootstrap --download-only --variant=minbase --include="make,$compiler,libc6-dev,kmod,busybox-static,linux-headers-$release,linux-binary-$release,linux-modules-$release,linux-base-$release" \
        sid "$dl" "$mirror" >"$cache/relock.log" 2>&1 || fail "debootstrap: see $cache/relock.log"
    {
        echo "# kernel $release, compiler $compiler. Written by run.sh relock: name, version, path under the mirror, sha256."
        python3 - "$index" "$dl/debootstrap/deburis" <<'PY'
import sys
field = {}
for block in open(sys.argv[1], encoding="utf-8").read().split("\n\n"):
    f = dict(l.split(": ", 1) for l in block.split("\n") if ": " in l and l[0] != " ")
    if "Package" in f:
        field[f["Package"], f["Version"]] = f
for line in sorted(open(sys.argv[2])):
    name, version, _ = line.split()
    f = field[name, version]
    print(name, version, f["Filename"], f["SHA256"])
PY
    } >"$lock.new"
    while read -r name version path _; do
        file=$(ls "$dl/var/cache/apt/archives/${name}_"*.deb)
        cp "$file" "$cache/debs/${path##*/}"
    done < <(grep -v '^#' "$lock.new")
    mv "$lock.new" "$lock"
    rm -rf "$dl" "$index"
    fetch_packages
    say "locked $(locked | wc -l) packages"
}

release() { sed -n 's/^# kernel \([^,]*\),.*/\1/p' "$lock"; }

# Unpacked, not installed: no maintainer script runs, so the same packages give the same tree.
make_chroot() {
    local stamp deb
    stamp=$(sha256sum <"$lock" | cut -c1-64)
    root=$cache/chroot
    [ "$(cat "$root.stamp" 2>/dev/null)" = "$stamp" ] && return
    say "unpacking the chroot"
    rm -rf "$root" "$root.stamp" "$cache/build" && mkdir -p "$root"
    while read -r deb; do nice dpkg-deb -x "$deb" "$root"; done < <(awk '{print $2}' "$cache/sums")
    ln -sf mawk "$root/usr/bin/awk"
    mkdir -p "$root/mnt" "$root/proc"
    echo "$stamp" >"$root.stamp"
}

# Runs a command in the chroot, with the build directory at /mnt and a /proc of its own.
inside() {
    # shellcheck disable=SC2016
    nice unshare -m bash -c 'set -e; root=$1 build=$2; shift 2
        mount --bind "$build" "$root/mnt"; mount -t proc proc "$root/proc"; exec chroot "$root" "$@"' \
        sh "$root" "$cache/build" "$@"
}

# ---- module, driver, initramfs ---------------------------------------------------------------------------------------

build() {
    local kernel sum m file
    kernel=$(release)
    mkdir -p "$cache/build"
    sum=$(cat "$lock" "$here"/module/* "$here"/guest/* | sha256sum | cut -c1-64)
    [ "$(cat "$cache/build/stamp" 2>/dev/null)" = "$sum" ] && return
    say "building for $kernel"
    rm -rf "$cache/build" && mkdir -p "$cache/build/tree"/{bin,modules,scripts}
    cp -r "$here/module" "$here/guest" "$cache/build/"
    inside make -s -C "/usr/src/linux-headers-$kernel" M=/mnt/module CC=$compiler modules >"$cache/build/module.log" 2>&1 ||
        { cat "$cache/build/module.log" >&2; fail "the module does not build"; }
    inside sh -c "cd /mnt/guest && $compiler -std=gnu17 -D_GNU_SOURCE -O2 -Wall -Wextra -Werror -I../module -static -pthread -o driver *.c" ||
        fail "the guest driver does not build"
    cp "$root/usr/bin/busybox" "$cache/build/tree/bin/"
    ln -s busybox "$cache/build/tree/bin/sh"
    for m in virtio_blk drm drm_gpusvm_helper; do
        file=$(find "$root/usr/lib/modules/$kernel" -name "$m.ko.xz")
        xz -dc "$file" >"$cache/build/tree/modules/$m.ko"
    done
    cp "$cache/build/module/usvm_ref.ko" "$cache/build/tree/modules/"
    cp "$cache/build/guest/driver" "$here/guest/init" "$cache/build/tree/"
    chmod +x "$cache/build/tree/init"
    cp "$root/usr/lib/modules/$kernel/vmlinuz" "$cache/build/vmlinuz"
    echo "$sum" >"$cache/build/stamp"
}

# ---- the machine -----------------------------------------------------------------------------------------------------

# Waits for the machine. On a loaded host an emulated one sometimes spins or dies before its first process: then it is
# ended and the answer is 1.
watch_machine() { # process, seconds
    local waited=0
    while kill -0 "$1" 2>/dev/null; do
        if [ $waited -ge "$2" ]; then
            kill "$1"
            tail -n 30 "$dir/console.txt" >&2
            fail "the machine did not end in $2 s (console: $dir/console.txt)"
        fi
        if [ $waited -ge 180 ] && ! grep -q 'guest: up' "$dir/console.txt"; then
            kill "$1" && wait "$1" 2>/dev/null
            return 1
        fi
        sleep 1
        waited=$((waited + 1))
    done
    wait "$1" || true
    grep -q 'guest: up' "$dir/console.txt" # an emulated kernel that patched its own code under another processor's feet
}

# boot DIR: does the lines of DIR/jobs; leaves the results in DIR/out. EXTRA names a directory laid over the initramfs.
boot() {
    local dir=$1 accel="tcg,thread=multi" cpu="max,-erms,-fsrm" limit=${BOOT_LIMIT:-1800} try
    if [ "${USVM_ACCEL:-tcg}" = kvm ]; then accel=kvm cpu=host; fi
    rm -rf "$dir/tree" "$dir/out" && cp -r "$cache/build/tree" "$dir/tree" && mkdir "$dir/out"
    cp "$here"/scripts/*.ops "$dir/tree/scripts/"
    cp "$dir/jobs" "$dir/tree/jobs"
    [ -z "${EXTRA:-}" ] || cp -r "$EXTRA/." "$dir/tree/"
    (cd "$dir/tree" && find . | cpio --quiet -o -H newc) | gzip -1 >"$dir/initramfs.gz"
    for try in 1 2 3 4; do
        rm -f "$dir/out.img" && truncate -s 1600M "$dir/out.img" && : >"$dir/console.txt"
        nice -n "${BOOT_NICE:-10}" qemu-system-x86_64 -accel $accel -cpu $cpu -m 3G -smp 2 -nodefaults -display none -no-reboot \
            -kernel "$cache/build/vmlinuz" -initrd "$dir/initramfs.gz" \
            -append "console=ttyS0 loglevel=6 panic=-1 oops=panic init_on_alloc=0 nowatchdog rcupdate.rcu_cpu_stall_suppress=1 proc_mem.force_override=always ${BOOT_ARGS:-}" \
            -serial "file:$dir/console.txt" -drive "file=$dir/out.img,format=raw,if=virtio,cache=unsafe" 9>&- &
        if watch_machine $! "$limit"; then break; fi
        [ $try -lt 4 ] || fail "the machine does not start (console: $dir/console.txt)"
        say "the machine did not start (try $try): once more"
    done
    grep -q 'guest: done' "$dir/console.txt" || { tail -n 30 "$dir/console.txt" >&2; fail "the guest did not finish"; }
    tar xf "$dir/out.img" -C "$dir/out"
    rm -rf "$dir/out.img" "$dir/tree" "$dir/initramfs.gz"
    tr -d '\r' <"$dir/console.txt" | grep -E '^(guest|driver): |operations, ' || true
    if grep -E 'WARNING:|BUG:|Oops' "$dir/out/dmesg.txt"; then fail "the kernel complained: $dir/out/dmesg.txt"; fi
    if grep -q 'guest: FAILED' "$dir/console.txt"; then
        tail -n 20 "$dir"/out/*.out >&2 || true
        fail "a job failed"
    fi
}

scratch() {
    work=$cache/run
    rm -rf "$work" && mkdir -p "$work"
}

prepare() {
    prerequisites
    if [ "$cache/packages.lock" -nt "$lock" ]; then lock=$cache/packages.lock; fi
    [ -f "$lock" ] || relock
    fetch_packages
    make_chroot
    build
}

# ---- what is asked ---------------------------------------------------------------------------------------------------

random_jobs() { # seed operations
    local n=0 c
    for c in $configs; do n=$((n + 1)); done
    for c in $configs; do echo "random $c $1 $((($2 + n - 1) / n))"; done
}

# Both judges: check.py, written from the kernel's rules alone, and usvm's own space. Ends in one line.
judge() { # traces
    python3 "$here/check.py" "$@" | sed 's/^/check.py: /'
    replay "$@"
}

# The program that plays traces live, on a running usvm: one static file for the machine and for here.
build_live() {
    local target=x86_64-unknown-linux-gnu out
    say "building usvm-live"
    out=$(RUSTFLAGS="-C target-feature=+crt-static" nice "$cargo" build --release --quiet --message-format=json-render-diagnostics \
        --manifest-path "$here/../Cargo.toml" --target $target --bin usvm-live 9>&- |
        sed -n 's/.*"executable":"\([^"]*usvm-live\)".*/\1/p')
    [ -n "$out" ] || fail "usvm-live does not build"
    mkdir -p "$cache/live/bin"
    # Debug information would only fill the machine's memory.
    objcopy --strip-debug "$out" "$cache/live/bin/usvm-live" || fail "objcopy (binutils) is needed"
    EXTRA=$cache/live
}

replay() {
    nice "$cargo" run --release --quiet --manifest-path "$here/../Cargo.toml" --bin usvm-replay -- "$@" 9>&-
}

record() {
    scratch
    local s seed
    for s in "$here"/scripts/*.ops; do s=${s##*/}; echo "script ${s%.ops}"; done >"$work/jobs"
    for seed in 1 2; do random_jobs $seed "${OPS:-20000}"; done >>"$work/jobs"
    boot "$work"
    judge "$work"/out/*.trace
    rm -f "$here"/traces/*.trace.xz
    local t
    for t in "$work"/out/*.trace; do nice xz -9e -c "$t" >"$here/traces/${t##*/}.xz"; done
    du -ch "$here"/traces/*.xz | tail -n 1
    replay --write-differences
}

fresh() {
    scratch
    local seed=${SEED:-$(date +%s)} ops=${OPS:-100000}
    say "SEED=$seed OPS=$ops"
    random_jobs "$seed" "$ops" >"$work/jobs"
    # Two threads that race on emulated processors may take minutes: that script is in the kept traces.
    local s
    for s in "$here"/scripts/*.ops; do s=${s##*/}; echo "script ${s%.ops}"; done | grep -v race >>"$work/jobs"
    echo "run usvm-live --own-machine --ops ${LIVE_OPS:-500} /out/*.trace" >>"$work/jobs"
    build_live
    replay "$here"/traces/*.trace.xz | tail -n 1 | sed 's/^/kept traces: /' # before the machine, so that it is built
    boot "$work"
    grep '^live: ' "$work/out/usvm-live.out" | sed 's/^/in the machine: /'
    # Whole traces, on this machine's own kernel: an emulated processor takes twenty times as long.
    nice "$EXTRA/bin/usvm-live" "$work"/out/*.trace >"$work/live.out" || { tail -n 30 "$work/live.out" >&2; fail "usvm-live"; }
    grep '^live: ' "$work/live.out" | sed 's/^/here: /'
    judge "$work"/out/*.trace
}

# Both in one boot, in turns: the kernel's times, then usvm's, TURNS times (default 3). COPY picks usvm's way to copy (otherwise
# the kernel's own, words), SPIN_US how long service threads spin: not at all, because with two emulated processors they would
# take them from the thread that moves.
bench() {
    scratch
    local turn turns=${TURNS:-3}
    for turn in $(seq "$turns"); do
        printf '%s\n' "bench $turn" "run usvm-live bench /out/usvm-$turn.json ${COPY:-words} ${SPIN_US:-0}"
    done >"$work/jobs"
    build_live
    # Without idle=poll the host's scheduler decides how long an emulated processor takes to wake; a loaded host makes the
    # kernel distrust a clock that is right.
    BOOT_ARGS="idle=poll tsc=reliable ${BOOT_ARGS:-}" boot "$work"
    python3 "$here/bench.py" "$work/out" "${BENCH_OUT:-$cache/bench.json}"
}

case ${1:-fresh} in
relock) prerequisites; relock ;;
build) prepare ;;
record) with_cargo; prepare; record ;;
bench) with_cargo; prepare; bench ;;
fresh) with_cargo; prepare; fresh ;;
jobs) prepare; scratch; cp "$2" "$work/jobs"; boot "$work" ;; # for experiments: a file of job lines
*) fail "unknown: $1" ;;
esac
