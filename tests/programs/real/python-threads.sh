# heavy: CPython's own tests of threads.
. "$HERE/real/python.inc"
# What is short and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_threading_local; exit; }
regression test_threading test_queue test_threading_local
