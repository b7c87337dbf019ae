#!/bin/sh
# What building and testing need: a Rust toolchain and a C compiler (for linking). Installs what Debian has when it may;
# otherwise says what to install.
set -eu

missing=""
command -v cc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"

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
