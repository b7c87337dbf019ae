# heavy: CPython's own tests of threads.
. "$HERE/real/python.inc"
regression test_threading test_queue test_threading_local
