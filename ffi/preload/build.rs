//! Linker options of the preload library.

fn main() {
    // Its functions stay in others' tables (fork handlers, interposed calls) for the life of the process.
    println!("cargo:rustc-cdylib-link-arg=-Wl,-z,nodelete");
    println!("cargo:rerun-if-changed=build.rs");
}
