# ci: CPython's own tests of mmap, ctypes and the thread primitives.
. "$HERE/real/python.inc"
# What is short and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_mmap; exit; }
regression test_mmap test_ctypes test_thread
