# heavy: CPython's own tests that use much memory.
. "$HERE/real/python.inc"
# What takes a second or two and computes rather than waits.
[ "$BENCH" = 0 ] || { regression test_list test_dict test_bytes; exit; }
regression test_gc test_weakref test_memoryview test_bytes test_array test_buffer test_list test_dict test_set test_zlib test_hashlib test_pickle test_json test_re test_io test_decimal test_sqlite3
