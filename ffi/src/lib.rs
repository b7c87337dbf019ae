//! libusvm: what its shared and its static library are made of.
//!
//! # Overview
//! The functions of `include/usvm.h` are `usvm_capi`'s, but for the allocator's, which are here ([`heap`]). [`watched`] has
//! the functions of the C library that are watched for the sake of notifiers. `ffi/link.sh` makes libusvm.so and libusvm.a
//! of the static library that cargo makes of this.
//!
//! The package also has the `usvm` program, which uses nothing of this.
//!
//! # Limits
//! What Rust code of this library allocates is the C library's, or usvm's own; only `usvm_malloc` and its family are the
//! crate usvm-alloc.

pub mod heap;
pub mod watched;

/// When the library is loaded, before any thread forks beside the first use.
#[used]
#[allow(unsafe_code)]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = construct;

extern "C" fn construct() {
    usvm_capi::process::install_handlers();
}

/// usvm's own memory must not be migratable: service threads' allocations go to usvm's own arena.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
