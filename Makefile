# usvm: what there is to type.
#
#   make demo [FILE=…]        computes on ordinary heap memory with the embedded device, and checks every byte; then an
#                             unmodified OpenCL program on PoCL under usvm run
#   make test                 all tests
#   make bench [JSON=…]       the measurements of usvm-bench micro
#   make manpages             man pages and shell completions, into target/man and target/completions
#   make install              the usvm program and the C library: PREFIX=/usr/local DESTDIR=
#   make test-programs        real programs without usvm, with it, and under chaos: a table; and another with its heap
#                             (PROGRAMS="redis java" for some)
#   make bench-programs       the same programs, in N=15 pairs: plain and preloaded, and mimalloc and usvm's heap
#   make lint                 what CI refuses: formatting, clippy, documentation
#   make test-opencl-intel    OpenCL and SYCL programs on Intel's runtime for processors alone (the first time it downloads 0.9 GB)
#   make test-kernel-ref      fresh traces of the real kernel's drm_gpusvm in a virtual machine (see tests/kernel-ref)

CARGO ?= cargo
# jemalloc is built by a make of its own, which must not hear of our DESTDIR.
BUILD = env -u MAKEFLAGS -u MFLAGS -u MAKEOVERRIDES -u DESTDIR -u PREFIX $(CARGO) build --release --quiet
# Recipes take it from the environment: a name may hold anything.
FILE ?=
export FILE
JSON ?= target/micro.json
PROGRAMS ?=
N ?= 15

.PHONY: all demo test test-opencl-intel test-programs bench bench-programs preload lint setup clean
all: demo

setup:
	@sh tests/setup.sh

demo: setup
	$(CARGO) run --release --quiet -p usvm-examples --bin demo -- $${FILE:+"$$FILE"}
	@sh examples/opencl/demo.sh

test: setup
	@sh tests/opencl/venv.sh
	@sh tests/opencl/intel.sh
	sh tests/run.sh

test-opencl-intel: setup
	sh tests/opencl/intel.sh
	$(CARGO) test -p usvm-tests --test opencl_intel -- --nocapture

preload: setup
	$(BUILD) -p usvm-preload -p usvm-preload-heap

test-programs: preload
	sh tests/setup.sh programs
	@sh tests/opencl/venv.sh
	sh tests/programs/run.sh $(PROGRAMS) || failed=1; sh tests/programs/run.sh --heap $(PROGRAMS) || failed=1; exit $${failed:-0}

bench-programs: preload
	sh tests/setup.sh programs
	@sh tests/opencl/venv.sh
	sh tests/programs/run.sh --bench $(N) $(PROGRAMS)
	sh tests/programs/run.sh --heap --bench $(N) $(PROGRAMS)

bench: setup
	$(CARGO) run --release --quiet -p usvm-bench -- micro --json $(JSON)

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

# What `make install` puts into share/man/man1 and the shells' folders; the program makes all of it itself.
USVM = "$${CARGO_TARGET_DIR:-target}/release/usvm"
.PHONY: manpages
manpages:
	$(BUILD) -p usvm-ffi --bin usvm
	mkdir -p target/man target/completions
	$(USVM) man target/man
	$(USVM) completions bash >target/completions/usvm.bash
	$(USVM) completions zsh >target/completions/_usvm
	$(USVM) completions fish >target/completions/usvm.fish

# The usvm program with its preload libraries, man pages and completions; the C library: libusvm.so and .a, headers,
# usvm.pc, CMake package.
PREFIX ?= /usr/local
DESTDIR ?=
BUILT = $${CARGO_TARGET_DIR:-target}/release
.PHONY: install install-lib install-program
install: install-lib install-program

install-lib:
	$(BUILD) -p usvm-ffi --lib
	sh ffi/install.sh "$(BUILT)/libusvm_ffi.a" "$(PREFIX)" "$(DESTDIR)"

install-program: manpages
	$(BUILD) -p usvm-preload -p usvm-preload-heap
	install -D -t "$(DESTDIR)$(PREFIX)/bin" "$(BUILT)/usvm"
	install -D -m 644 -t "$(DESTDIR)$(PREFIX)/lib/usvm" "$(BUILT)/libusvm_preload.so" "$(BUILT)/libusvm_heap.so"
	install -D -m 644 -t "$(DESTDIR)$(PREFIX)/share/man/man1" target/man/*.1
	install -D -m 644 target/completions/usvm.bash "$(DESTDIR)$(PREFIX)/share/bash-completion/completions/usvm"
	install -D -m 644 -t "$(DESTDIR)$(PREFIX)/share/zsh/site-functions" target/completions/_usvm
	install -D -m 644 -t "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d" target/completions/usvm.fish

clean:
	$(CARGO) clean

include tests/kernel-ref/kernel-ref.mk
