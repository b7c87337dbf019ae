//! OpenCL: usvm under unmodified programs, as a layer of their loader or by preloaded entry points.
//!
//! # Overview
//! | room | what it does |
//! |---|---|
//! | `layer` | the loader's interface: `OPENCL_LAYERS` |
//! | `interpose` | the same functions by `LD_PRELOAD`, for loaders without layers |
//! | `loaders` | tells the loaders of one process apart |
//! | `wrap` | the OpenCL functions with the layer in front |
//! | `faces`, `usm` | `cl_intel_unified_shared_memory`, provided or watched |
//! | `capability` | what devices say, corrected |
//! | `memory`, `objects` | blocks; kernels' arguments, queues, events |
//! | `launch` | working sets, and what is done with them |
//! | `settings`, `stats` | the environment; the counts told at exit |
//! | `dispatch`, `types` | the ABI |
//!
//! A call comes in through `layer` or `interpose`, is handled in `wrap` or `usm`, and goes on to the loader's own
//! function. Functions that are not handled are not touched.
//!
//! # Locking
//! Application and driver threads take short locks around tables; usvm's service threads never take any of them, so a
//! thread that faults while it holds one is served all the same. No lock is held over a call into a driver.
//!
//! # Limits
//! x86-64. On devices that share the host's memory launches are counted and nothing moves, unless a policy or chaos is
//! asked for. USM needs a driver with SVM.
//!
//! # Safety
//! The rooms below are called by C programs and call drivers through addresses that loaders gave for them; each says
//! what it relies on.
#![allow(unsafe_code)]

mod capability;
mod dispatch;
mod faces;
mod interpose;
mod launch;
mod layer;
mod loaders;
mod memory;
mod objects;
mod settings;
mod stats;
mod types;
mod usm;
mod wrap;
