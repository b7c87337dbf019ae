//! A global allocator whose memory is laid out for shared virtual memory with GPUs.
