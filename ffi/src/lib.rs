//! usvm's C interface, and what it shares with the preload library.

pub mod process;

/// usvm's own memory must not be migratable: service threads' allocations go to usvm's own arena.
#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);
