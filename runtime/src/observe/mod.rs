//! The observe floor: what happened, how often, and when.
//!
//! [`stats`] counts, [`latency`] keeps fault times, [`trace`] records single events for a timeline. All may be called
//! from any thread with any lock held: nothing here waits. [`live`] shows the statistics to other processes.

pub mod latency;
pub mod live;
pub mod observer;
pub mod stats;
pub mod trace;
pub mod watch;
