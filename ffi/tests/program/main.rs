//! The `usvm` program from outside: its exit statuses, what it prints, and what it leaves alone. And how its library is
//! installed.
//!
//! A stand-in takes the place of the preload library, so that what is seen here is the program's doing alone.

mod doctor;
mod install;
mod look;
mod manual;
mod run;
mod stand;
mod terminal;

/// usvm's own memory must not be migratable: `look` runs a runtime.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
