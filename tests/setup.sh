#!/bin/sh
# What building and testing need: a Rust toolchain and a C compiler (for linking). Installs what Debian has when it may;
# otherwise says what to install.
set -eu

missing=""
command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
# OpenCL: a driver that runs on the processor, a loader, headers, and two programs that tests run unmodified.
ls /etc/OpenCL/vendors/pocl*.icd >/dev/null 2>&1 || missing="$missing pocl-opencl-icd"
[ -e /usr/include/CL/cl_layer.h ] || missing="$missing ocl-icd-opencl-dev opencl-headers"
command -v clinfo >/dev/null 2>&1 || missing="$missing clinfo"
command -v clpeak >/dev/null 2>&1 || missing="$missing clpeak"

if [ -n "$missing" ]; then
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
        apt-get update -q
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends $missing
    else
        echo "usvm: please install these Debian packages first:$missing" >&2
        exit 1
    fi
fi

if ! command -v cargo >/dev/null 2>&1; then
    echo "usvm: cargo is not in the PATH; install Rust (rust-version in Cargo.toml) with rustup or your distribution" >&2
    exit 1
fi
