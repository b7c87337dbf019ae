#!/bin/sh
# Installs the C library: headers, libusvm.so and .a, usvm.pc, the CMake package.
#
#   ffi/install.sh STATICLIB PREFIX [DESTDIR]
#
# Everybody can read what is installed, whatever the umask.
set -eu

archive=$1
prefix=$2
root=${3:-}$2
here=$(dirname "$0")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -1)

# usvm.pc has it between double quotes, and knows no way to write these.
case $prefix in
*[\"\\\$\`\#]* | *"
"*)
    printf 'install.sh: the prefix %s holds one of " \\ $ ` # or a line end, which usvm.pc cannot name\n' "$prefix" >&2
    exit 1
    ;;
esac
# As sed takes it for the new text.
escaped=$(printf '%s' "$prefix" | sed 's/[&|]/\\&/g')

fill() {
    sed -e "s|@PREFIX@|$escaped|g" -e "s|@VERSION@|$version|g" "$1" >"$2"
}

install -d "$root/include" "$root/lib/pkgconfig" "$root/lib/cmake/usvm"
install -m 644 "$here"/../include/usvm*.h* "$root/include/"
"$here/link.sh" "$archive" "$root/lib"
fill "$here/usvm.pc.in" "$root/lib/pkgconfig/usvm.pc"
install -m 644 "$here/cmake/usvm-config.cmake" "$root/lib/cmake/usvm/"
fill "$here/cmake/usvm-config-version.cmake.in" "$root/lib/cmake/usvm/usvm-config-version.cmake"
chmod 755 "$root/lib/libusvm.so.$version"
chmod 644 "$root/lib/libusvm.a" "$root/lib/pkgconfig/usvm.pc" "$root/lib/cmake/usvm/usvm-config-version.cmake"
