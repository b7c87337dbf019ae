# usvm: what there is to type.
#
#   make demo [FILE=…]        computes on ordinary heap memory with the embedded device, and checks every byte
#   make test                 all tests
#   make bench [JSON=…]       the measurements of usvm-bench micro
#   make test-programs         real programs without usvm, with it, and under chaos: a table (PROGRAMS="redis java" for some)
#   make bench-programs        the same programs, plain and preloaded in turn, N=5 times each
#   make lint                 what CI refuses: formatting, clippy, documentation
#   make test-kernel-ref      fresh traces of the real kernel's drm_gpusvm in a virtual machine (see tests/kernel-ref)

CARGO ?= cargo
FILE ?=
JSON ?= target/micro.json
PROGRAMS ?=
N ?= 5

.PHONY: all demo test test-programs bench bench-programs preload lint setup clean
all: demo

setup:
	@sh tests/setup.sh

demo: setup
	$(CARGO) run --release --quiet -p usvm-examples --bin demo -- $(FILE)

test: setup
	sh tests/run.sh

preload: setup
	$(CARGO) build --release --quiet -p usvm-preload -p usvm-preload-heap

test-programs: preload
	sh tests/programs/run.sh $(PROGRAMS)

bench-programs: preload
	sh tests/programs/run.sh --bench $(N) $(PROGRAMS)
	sh tests/programs/run.sh --heap --bench $(N) $(PROGRAMS)

bench: setup
	$(CARGO) run --release --quiet -p usvm-bench -- micro --json $(JSON)

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

clean:
	$(CARGO) clean

include tests/kernel-ref/kernel-ref.mk
