//! Fault injection: makes any system call of usvm fail on purpose. (Filled in by the host floor's author.)
