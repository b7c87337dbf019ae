#!/bin/sh
# Installs the C library: headers, libusvm.so and .a, usvm.pc, the CMake package.
#
#   ffi/install.sh STATICLIB PREFIX [DESTDIR]
set -eu

archive=$1
prefix=$2
root=${3:-}$2
here=$(dirname "$0")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -1)

fill() {
    sed -e "s|@PREFIX@|$prefix|g" -e "s|@VERSION@|$version|g" "$1" >"$2"
}

install -d "$root/include" "$root/lib/pkgconfig" "$root/lib/cmake/usvm"
install -m 644 "$here"/../include/usvm*.h* "$root/include/"
"$here/link.sh" "$archive" "$root/lib"
fill "$here/usvm.pc.in" "$root/lib/pkgconfig/usvm.pc"
install -m 644 "$here/cmake/usvm-config.cmake" "$root/lib/cmake/usvm/"
fill "$here/cmake/usvm-config-version.cmake.in" "$root/lib/cmake/usvm/usvm-config-version.cmake"
