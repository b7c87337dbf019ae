#!/bin/sh
# dpnp, Intel's OpenCL runtime for processors and the Khronos loader it brings, in target/venv-dpnp (some 3 GB); then the
# tests that want them. `make test-opencl-intel`.
set -eu
cd "$(dirname "$0")/../.."
venv=target/venv-dpnp
if ! "$venv/bin/python" -c 'import dpnp' 2>/dev/null; then
    # The program behind version managers' shims: an environment must not depend on them.
    "$(python3 -c 'import sys; print(sys.executable)')" -m venv "$venv"
    "$venv/bin/pip" install --quiet --disable-pip-version-check dpnp intel-opencl-rt
fi
exec "${CARGO:-cargo}" test -p usvm-tests --test opencl_intel -- --nocapture
