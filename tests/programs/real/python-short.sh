# ci: CPython's own tests of mmap, ctypes and the thread primitives.
. "$HERE/real/python.inc"
# What takes a second or two and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_mmap test_ctypes; exit; }
regression test_mmap test_ctypes test_thread
