//! usvm under an unmodified program: the library that `usvm run` preloads.

mod opencl;
