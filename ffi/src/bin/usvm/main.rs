//! The `usvm` program.

fn main() {
    println!("usvm {}", env!("CARGO_PKG_VERSION"));
}
