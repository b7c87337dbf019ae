# ci: CPython's own tests of mmap, ctypes and threads.
. "$HERE/real/python.inc"
regression test_mmap test_ctypes test_thread test_threading
