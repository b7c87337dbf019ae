#!/bin/sh
# Makes libusvm.so and libusvm.a of what cargo built.
#
#   ffi/link.sh STATICLIB OUT
#
# STATICLIB is target/release/libusvm_ffi.a. The linker that cargo drives cannot give symbols versions (it has a version
# script of its own), so the shared library is linked here. First everything goes into one object in which only the
# header's functions and the watched ones (ffi/src/watched.rs) stay global: libusvm.a hides its insides, too, and two
# Rust libraries fit into one program.
set -eu

archive=$1
out=$2
here=$(dirname "$0")
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$here/../Cargo.toml" | head -1)
soname=libusvm.so.${version%%.*}
watched="munmap mmap mmap64 mremap madvise mprotect"

mkdir -p "$out"
whole=$out/usvm.o
${LD:-ld} -r --whole-archive "$archive" -o "$whole.tmp"
keep=""
for name in $watched; do
    keep="$keep --redefine-sym=usvm_watched_$name=$name --keep-global-symbol=$name"
done
# shellcheck disable=SC2086
${OBJCOPY:-objcopy} --strip-debug --remove-section=.llvmbc --remove-section=.llvmcmd \
    --wildcard --keep-global-symbol='usvm_*' $keep "$whole.tmp" "$whole"
rm -f "$whole.tmp"

${CC:-cc} -shared -o "$out/libusvm.so.$version" "$whole" \
    -Wl,--version-script="$here/usvm.map" -Wl,-soname,"$soname" \
    -Wl,--gc-sections -Wl,--no-undefined -Wl,-z,defs,-z,relro,-z,now,-z,nodelete \
    -lgcc_s -lpthread -ldl -lm -lc
ln -sf "libusvm.so.$version" "$out/$soname"
ln -sf "$soname" "$out/libusvm.so"

rm -f "$out/libusvm.a"
${AR:-ar} crs "$out/libusvm.a" "$whole"
rm -f "$whole"
