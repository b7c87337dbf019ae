//! Waiting without locks: events and fences on a futex word. (Filled in by the device floor's author.)
