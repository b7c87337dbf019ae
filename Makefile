# usvm: what there is to type.
#
#   make demo [FILE=…]        computes on ordinary heap memory with the embedded device, and checks every byte; then an
#                             unmodified OpenCL program on PoCL under usvm run
#   make test                 all tests
#   make bench [JSON=…]       the measurements of usvm-bench micro
#   make lint                 what CI refuses: formatting, clippy, documentation
#   make test-opencl-intel    OpenCL and SYCL programs on Intel's runtime for processors (downloads some 3 GB)
#   make test-kernel-ref      fresh traces of the real kernel's drm_gpusvm in a virtual machine (see tests/kernel-ref)

CARGO ?= cargo
FILE ?=
JSON ?= target/micro.json

.PHONY: all demo test test-opencl-intel bench lint setup clean
all: demo

setup:
	@sh tests/setup.sh

demo: setup
	$(CARGO) run --release --quiet -p usvm-examples --bin demo -- $(FILE)
	@sh examples/opencl/demo.sh

test: setup
	@sh tests/opencl/venv.sh
	sh tests/run.sh

test-opencl-intel: setup
	sh tests/opencl/intel.sh

bench: setup
	$(CARGO) run --release --quiet -p usvm-bench -- micro --json $(JSON)

lint: setup
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --quiet

clean:
	$(CARGO) clean

include tests/kernel-ref/kernel-ref.mk
