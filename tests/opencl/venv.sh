#!/bin/sh
# An environment with pyopencl for the tests, in target/opencl-venv. Without Python's venv or a package index the test
# that wants it is skipped.
set -u
cd "$(dirname "$0")/../.."
venv=target/opencl-venv
[ -x "$venv/bin/python" ] && exit 0
rm -rf "$venv.new"
if python3 -m venv "$venv.new" >/dev/null 2>&1 &&
    "$venv.new/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 pyopencl==2026.1.4; then
    mv "$venv.new" "$venv"
else
    echo "usvm: no environment with pyopencl (python3-venv and a package index are needed)" >&2
    rm -rf "$venv.new"
fi
