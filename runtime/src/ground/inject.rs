//! Fault injection (placeholder until merged).
use crate::ground::error::Errno;
/// Calls.
#[derive(Clone, Copy, Debug)]
pub enum Call {
    /// Thread creation.
    ThreadSpawn,
}
/// Consults the plan.
#[inline(always)]
pub fn check(_call: Call) -> Result<(), Errno> {
    Ok(())
}
