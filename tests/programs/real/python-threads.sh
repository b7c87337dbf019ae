# heavy: CPython's own tests of threads.
. "$HERE/real/python.inc"
# What takes a second or two and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_threading_local test_thread; exit; }
regression test_threading test_queue test_threading_local
