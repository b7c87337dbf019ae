//! usvm-bench.
