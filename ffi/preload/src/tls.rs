//! Thread-local storage without the dynamic linker.
//!
//! # Overview
//! Code in a shared library finds its thread-local variables by `__tls_get_addr`. The dynamic linker's has a slow path
//! after any dlopen: it walks tables in the program's heap and may call malloc. A thread of usvm must do neither, for that
//! heap may be on the device and wait for this very thread. So this library has an own one, which is an addition: a
//! preloaded library's variables lie at a fixed distance from the thread pointer.
//!
//! # Safety
//! The linker fills in where the anchor lies from the thread pointer (GOTTPOFF, which also demands static storage of the
//! dynamic linker) and inside this library's block (DTPOFF). All accesses that are linked to this function are to
//! variables of this library: other libraries' are behind functions such as `__errno_location`.

core::arch::global_asm!(
    ".pushsection .tbss.usvm_tls_anchor,\"awT\",@nobits",
    ".p2align 3",
    ".hidden usvm_tls_anchor",
    ".globl usvm_tls_anchor",
    ".type usvm_tls_anchor,@object",
    ".size usvm_tls_anchor, 8",
    "usvm_tls_anchor:",
    ".zero 8",
    ".popsection",
    ".pushsection .text.usvm_tls_get_addr,\"ax\",@progbits",
    ".hidden __tls_get_addr",
    ".globl __tls_get_addr",
    ".type __tls_get_addr,@function",
    "__tls_get_addr:",
    "mov rax, qword ptr [rip + usvm_tls_anchor@GOTTPOFF]",
    "lea rcx, [usvm_tls_anchor@DTPOFF]",
    "sub rax, rcx",
    "add rax, qword ptr [rdi + 8]",
    "add rax, qword ptr fs:[0]",
    "ret",
    ".size __tls_get_addr, . - __tls_get_addr",
    ".popsection",
);
