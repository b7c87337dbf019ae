# heavy: cargo builds and tests a crate.
need cargo
export CARGO_TARGET_DIR="$PWD/target" CARGO_NET_OFFLINE=true
rm -rf crate target
mkdir -p crate/src
cat >crate/Cargo.toml <<'T'
[package]
name = "crate-under-test"
version = "0.1.0"
edition = "2021"
[workspace]
T
cat >crate/src/lib.rs <<'R'
use std::collections::{BTreeMap, HashMap};
pub fn words(n: u64) -> BTreeMap<String, u64> {
    let mut counts: HashMap<String, u64> = HashMap::new();
    for i in 0..n { *counts.entry(format!("{}", i * i % 1009)).or_default() += i; }
    counts.into_iter().collect()
}
#[test]
fn counted() { assert_eq!(words(1000).values().sum::<u64>(), 499500); }
#[test]
fn threads() {
    let all: Vec<_> = (0..8).map(|i| std::thread::spawn(move || words(i * 1000).len())).collect();
    assert_eq!(all.into_iter().map(|t| t.join().unwrap()).max(), Some(505));
}
R
cat >crate/src/main.rs <<'R'
fn main() { println!("{:?}", crate_under_test::words(100_000).iter().take(5).collect::<Vec<_>>()); }
R
cd crate
$RUN cargo build --release --quiet --offline || exit
[ "$BENCH" = 0 ] || exit 0
$RUN "$CARGO_TARGET_DIR/release/crate-under-test"
$RUN cargo test --quiet --offline 2>/dev/null | sed 's/finished in .*//' || exit
cksum <"$CARGO_TARGET_DIR/release/crate-under-test"
