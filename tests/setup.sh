#!/bin/sh
# What building and testing need: a Rust toolchain, a C and C++ compiler (also for linking); and what some tests want and
# are skipped without. Installs what Debian has when it may; otherwise says what to install.
#
#   setup.sh [programs]      programs: also what only `make test-programs` and `make bench-programs` run
set -eu

missing=""
command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
command -v c++ >/dev/null 2>&1 || missing="$missing g++"
command -v objcopy >/dev/null 2>&1 || missing="$missing binutils"

wanted=""
# OpenCL: a driver that runs on the processor, a loader, headers, and two programs that tests run unmodified.
ls /etc/OpenCL/vendors/pocl*.icd >/dev/null 2>&1 || wanted="$wanted pocl-opencl-icd"
[ -e /usr/include/CL/cl_layer.h ] || wanted="$wanted ocl-icd-opencl-dev opencl-headers"
command -v clinfo >/dev/null 2>&1 || wanted="$wanted clinfo"
command -v clpeak >/dev/null 2>&1 || wanted="$wanted clpeak"
# The C library's tests: the ways of finding a library, and Unified Memory Framework's wheel, which needs hwloc.
command -v cmake >/dev/null 2>&1 || wanted="$wanted cmake"
command -v pkg-config >/dev/null 2>&1 || wanted="$wanted pkg-config"
# Shells that read the program's completions.
command -v zsh >/dev/null 2>&1 || wanted="$wanted zsh"
command -v fish >/dev/null 2>&1 || wanted="$wanted fish"
# Real programs that run under chaos.
command -v sqlite3 >/dev/null 2>&1 || wanted="$wanted sqlite3"
command -v redis-server >/dev/null 2>&1 || wanted="$wanted redis-server redis-tools"
/usr/bin/python3 -c 'import numpy' >/dev/null 2>&1 || wanted="$wanted python3-numpy"
python3 -c 'import ensurepip, venv' >/dev/null 2>&1 || wanted="$wanted python3-venv"
# CPython's own tests.
if ! sh -c '. "$1" && find_python' sh "$(dirname "$0")/programs/real/python.inc" >/dev/null 2>&1; then
    version=$(/usr/bin/python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo 3.11)
    wanted="$wanted libpython$version-testsuite"
fi
if [ "${1:-}" = programs ]; then
    command -v javac >/dev/null 2>&1 || wanted="$wanted default-jdk-headless"
    command -v mpicc >/dev/null 2>&1 || wanted="$wanted openmpi-bin libopenmpi-dev"
    ls /usr/lib/*/libmimalloc.so.2.0 >/dev/null 2>&1 || wanted="$wanted libmimalloc2.0"
fi
ldconfig -p 2>/dev/null | grep -q 'libhwloc\.so\.15 ' || wanted="$wanted libhwloc15"

if [ -n "$missing$wanted" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -q
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing $wanted
    elif [ -n "$missing" ]; then
        echo "usvm: please install these Debian packages first:$missing$wanted" >&2
        exit 1
    else
        echo "usvm: some tests are skipped without these Debian packages:$wanted" >&2
    fi
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "usvm: cargo is not in the PATH; install Rust (rust-version in Cargo.toml) with rustup or your distribution" >&2
    exit 1
fi
