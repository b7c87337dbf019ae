#!/bin/sh
# dpnp (SYCL), Intel's OpenCL runtime for processors and the Khronos loader that it brings, from a package index into
# target/venv-dpnp: 0.9 GB to download, 2 GB there, under a minute on a good line. `make test` runs this; where it cannot
# be had, the tests that want it are skipped and say why: the reason is in target/venv-dpnp.why.
set -u
cd "$(dirname "$0")/../.."
venv=${DPNP_VENV:-target/venv-dpnp}
why=target/venv-dpnp.why
mkdir -p target
[ -x "$venv/bin/python" ] && exit 0
rm -rf "$venv.new" "$why"
trap 'rm -rf "$venv.new"' EXIT

cannot() {
    echo "$*" >"$why"
    echo "usvm: no environment with dpnp: $*" >&2
    exit 0
}

[ "$(uname -m)" = x86_64 ] || cannot "Intel's runtime is for x86-64"
free=$(df -Pk target | awk 'NR == 2 { print int($4 / 1024) }')
[ "$free" -ge 5000 ] || cannot "5000 MB are needed meanwhile, and $free are free"
# The program behind version managers' shims: an environment must not depend on them.
python=$(python3 -c 'import sys; print(sys.executable)' 2>/dev/null) || cannot "python3 is not installed"
"$python" -m venv "$venv.new" >"$why" 2>&1 || cannot "python3-venv is needed"
"$venv.new/bin/pip" install --quiet --disable-pip-version-check --no-cache-dir --no-compile --retries 2 --timeout 30 \
    dpnp==0.20.0 intel-opencl-rt==2026.2.0 >"$why" 2>&1 || cannot "pip: $(grep -v '^WARNING' "$why" | tail -n 1)"
# Wheels hold no links: what is one library under three names is there three times. And what only compilers need goes.
rm -f "$venv.new"/lib/libsycl-jit.so* "$venv.new"/lib/icx-lto.so "$venv.new"/lib/libomptarget*
for library in "$venv.new"/lib/*.so; do
    for same in "$library".*; do
        [ -f "$same" ] && cmp -s "$library" "$same" && ln -f "$library" "$same"
    done
done
mv "$venv.new" "$venv"
rm -f "$why"
