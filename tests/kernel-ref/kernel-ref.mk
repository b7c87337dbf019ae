# The kernel's own drm_gpusvm as the judge (tests/kernel-ref/README.md). Says `skipped: <reason>` where it cannot run.
#   make test-kernel-ref SEED=n OPS=n    fresh random traces, checked by the independent model, replayed by usvm's space, and
#                                        played live on a running usvm in the same virtual machine
#   make check-kernel-ref                the traces that are kept, without a virtual machine
#   make bench-kernel-ref                times of the kernel's operations and of usvm's, in one boot
#   make record-kernel-ref               records the kept traces anew
KERNEL_REF := $(dir $(lastword $(MAKEFILE_LIST)))

.PHONY: test-kernel-ref check-kernel-ref bench-kernel-ref record-kernel-ref
test-kernel-ref:
	SEED=$(SEED) OPS=$(OPS) CARGO="$(CARGO)" $(KERNEL_REF)run.sh fresh

check-kernel-ref:
	python3 $(KERNEL_REF)check.py $(KERNEL_REF)traces/*.trace.xz

bench-kernel-ref:
	CARGO="$(CARGO)" $(KERNEL_REF)run.sh bench

record-kernel-ref:
	$(KERNEL_REF)run.sh record
