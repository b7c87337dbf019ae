# heavy: CPython's own tests of subprocesses, signals and fork.
. "$HERE/real/python.inc"
# What is short and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_posix; exit; }
regression test_subprocess test_signal test_fork1 test_os test_posix test_faulthandler
