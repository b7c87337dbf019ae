//! Linker options of the preload library.

mod unwinder;

fn main() {
    // Its functions stay in others' tables (fork handlers, interposed calls) for the life of the process.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    unwinder::link_in();
}
