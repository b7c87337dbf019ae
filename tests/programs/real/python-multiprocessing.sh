# heavy: CPython's own tests of multiprocessing and of pools of processes and threads.
. "$HERE/real/python.inc"
# What is short and computes rather than waits.
[ "$BENCH" = 0 ] || { only=ProcessPoolForkProcessPoolShutdownTest regression test_concurrent_futures; exit; }
regression test_multiprocessing_fork test_multiprocessing_spawn test_multiprocessing_forkserver test_concurrent_futures
