# heavy: CPython's own tests that use much memory.
. "$HERE/real/python.inc"
# What is short and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_dict; exit; }
find_python
sqlite=test_sqlite3
# In some of Debian's builds it is left out.
"$PYTHON" -c 'import test.test_sqlite3' 2>/dev/null || sqlite=
regression test_gc test_weakref test_memoryview test_bytes test_array test_buffer test_list test_dict test_set test_zlib test_hashlib test_pickle test_json test_re test_io test_decimal $sqlite
