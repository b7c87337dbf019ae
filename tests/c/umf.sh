#!/bin/sh
# Brings the Unified Memory Framework (headers and libumf.so of its PyPI wheel) into DIR. Exit code 77: cannot be had here.
#
#   tests/c/umf.sh DIR
set -u
dir=$1
[ -f "$dir/include/umf.h" ] && exit 0
command -v python3 >/dev/null 2>&1 || { echo "no python3"; exit 77; }
python3 -m venv "$dir" >/dev/null 2>&1 || { echo "python3 -m venv fails (package python3-venv)"; exit 77; }
"$dir/bin/pip" install --quiet --disable-pip-version-check --timeout 20 --retries 1 --no-deps 'umf==1.2.0' >"$dir/pip.log" 2>&1 ||
    { echo "pip cannot install umf: $(tail -1 "$dir/pip.log")"; exit 77; }
ldd "$dir/lib/libumf.so" | grep -q 'not found' && { echo "libumf.so lacks$(ldd "$dir/lib/libumf.so" | sed -n 's/ => not found//p') (package libhwloc15)"; exit 77; }
exit 0
