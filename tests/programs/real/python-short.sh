# ci: CPython's own tests of mmap, ctypes and the thread primitives.
. "$HERE/real/python.inc"
regression test_mmap test_ctypes test_thread
