# heavy: CPython's own tests of subprocesses, signals and fork.
. "$HERE/real/python.inc"
# What takes a second or two and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_posix test_os; exit; }
regression test_subprocess test_signal test_fork1 test_os test_posix test_faulthandler
