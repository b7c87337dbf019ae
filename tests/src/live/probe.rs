//! Loads and stores that may be refused.
//!
//! # Overview
//! [`copy`] moves words with one instruction whose address is known. A SIGSEGV or SIGBUS in it ends the copy, and the
//! caller is told which signal it was; in any other place the signal does what it always does.
//!
//! # Safety
//! The instruction is in assembly, so no compiler relies on a copy that ended early: what it was to fill is written only
//! as far as it came. The handler looks at the interrupted program counter and touches nothing else.
//!
//! # Limits
//! x86-64.

use std::sync::Once;

std::arch::global_asm!(
    ".pushsection .text.usvm_live_copy, \"ax\", @progbits",
    ".globl usvm_live_copy",
    ".hidden usvm_live_copy",
    ".globl usvm_live_copy_over",
    ".hidden usvm_live_copy_over",
    ".globl usvm_live_copy_refused",
    ".hidden usvm_live_copy_refused",
    "usvm_live_copy:",
    "mov rcx, rdx",
    "rep movsq",
    "usvm_live_copy_over:",
    "xor eax, eax",
    "usvm_live_copy_refused:",
    "ret",
    ".popsection",
);

unsafe extern "C" {
    fn usvm_live_copy(to: *mut u64, from: *const u64, words: usize) -> libc::c_int;
    fn usvm_live_copy_over();
    fn usvm_live_copy_refused();
}

/// Copies words between any two addresses. The signal that ended it, if one did.
///
/// # Safety
/// What the words at `to` are part of may be changed, if they can be.
pub unsafe fn copy(to: *mut u64, from: *const u64, words: usize) -> Result<(), libc::c_int> {
    catch();
    // SAFETY: the caller vouches for the destination; an address that cannot be used is what the handler is for.
    match unsafe { usvm_live_copy(to, from, words) } {
        0 => Ok(()),
        signal => Err(signal),
    }
}

fn catch() {
    static CAUGHT: Once = Once::new();
    CAUGHT.call_once(|| {
        for signal in [libc::SIGSEGV, libc::SIGBUS] {
            // SAFETY: all zero is a valid sigaction; the handler has the type that SA_SIGINFO asks for.
            unsafe {
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = on_fault as *const () as usize;
                action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
                assert_eq!(libc::sigaction(signal, &action, std::ptr::null_mut()), 0);
            }
        }
    });
}

extern "C" fn on_fault(signal: libc::c_int, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: with SA_SIGINFO the kernel gives a ucontext_t that is this handler's to change.
    let registers = unsafe { &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let at = registers[libc::REG_RIP as usize] as usize;
    if (usvm_live_copy as *const () as usize..usvm_live_copy_over as *const () as usize).contains(&at) {
        registers[libc::REG_RAX as usize] = i64::from(signal);
        registers[libc::REG_RIP as usize] = usvm_live_copy_refused as *const () as usize as i64;
        return;
    }
    // SAFETY: a handler may restore the default, with which the instruction then faults again.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_read_is_told() {
        let (mut to, from) = ([0u64; 4], [1u64, 2, 3, 4]);
        // SAFETY: both are local arrays of four words.
        assert_eq!(unsafe { copy(to.as_mut_ptr(), from.as_ptr(), 4) }, Ok(()));
        assert_eq!(to, from);
        // SAFETY: the destination is a local word; the source is what must be refused.
        assert_eq!(unsafe { copy(to.as_mut_ptr(), 4096 as *const u64, 1) }, Err(libc::SIGSEGV));
    }
}
