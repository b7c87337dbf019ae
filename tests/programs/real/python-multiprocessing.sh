# heavy: CPython's own tests of multiprocessing and of pools of processes and threads.
. "$HERE/real/python.inc"
regression test_multiprocessing_fork test_multiprocessing_spawn test_multiprocessing_forkserver test_concurrent_futures
