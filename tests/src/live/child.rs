//! A forked child that lives on and changes its copy when it is told to.
//!
//! # Safety
//! The child is a fork of a process with threads: it only reads and writes pipes, unmaps, loads and stores in the arenas,
//! and leaves by `_exit`. It allocates nothing.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::side::{Errno, Side};

/// What a child is told.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Order {
    /// `u` unmaps, `w` stores, `r` loads.
    pub what: u8,
    /// Where, in each arena.
    pub at: [u64; 2],
    /// Bytes.
    pub len: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Child {
    pid: libc::pid_t,
    orders: OwnedFd,
    answers: OwnedFd,
}

fn pipe() -> (OwnedFd, OwnedFd) {
    let mut ends = [0; 2];
    // SAFETY: `ends` has room for both.
    assert_eq!(unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
    // SAFETY: just made, and nobody else's.
    unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) }
}

fn wait(pid: libc::pid_t) {
    let mut status = 0;
    // SAFETY: our own child; `status` is a live integer.
    unsafe { libc::waitpid(pid, &mut status, 0) };
}

/// Forks a child that ends at once.
pub fn fork_and_exit() {
    // SAFETY: the child leaves at once.
    unsafe {
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(0);
        }
        assert!(pid > 0, "fork: {}", std::io::Error::last_os_error());
        wait(pid);
    }
}

impl Child {
    /// Forks one that waits for orders.
    pub fn fork() -> Self {
        let (orders_out, orders) = pipe();
        let (answers, answers_in) = pipe();
        // SAFETY: the child does only what the module says.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
        if pid == 0 {
            // SAFETY: closing our copies of the parent's ends; the values that own them are never dropped here.
            unsafe {
                libc::close(orders.as_raw_fd());
                libc::close(answers.as_raw_fd());
            }
            serve(orders_out.as_raw_fd(), answers_in.as_raw_fd());
        }
        Self { pid, orders, answers }
    }

    /// Has it done, and gives its answer: an errno or 0.
    pub fn order(&self, order: Order) -> Errno {
        let mut answer: Errno = 0;
        let (out, back) = (self.orders.as_raw_fd(), self.answers.as_raw_fd());
        // SAFETY: plain bytes of live values of these sizes.
        unsafe {
            let sent = libc::write(out, (&raw const order).cast(), size_of::<Order>());
            assert_eq!(sent, size_of::<Order>() as isize, "the child is gone");
            let got = libc::read(back, (&raw mut answer).cast(), size_of::<Errno>());
            assert_eq!(got, size_of::<Errno>() as isize, "the child is gone");
        }
        answer
    }

    /// Ends it.
    pub fn exit(self) {
        drop(self.orders);
        wait(self.pid);
    }
}

fn serve(orders: libc::c_int, answers: libc::c_int) -> ! {
    let mut order = Order { what: 0, at: [0; 2], len: 0 };
    // SAFETY: plain bytes of live values of these sizes; leaving by _exit.
    unsafe {
        while libc::read(orders, (&raw mut order).cast(), size_of::<Order>()) == size_of::<Order>() as isize {
            let mut answer = 0;
            for at in order.at {
                match order.what {
                    b'u' if libc::munmap(at as *mut _, order.len as usize) != 0 => {
                        answer = *libc::__errno_location();
                    }
                    b'w' => drop(Side::store(at, order.len, 7)),
                    b'r' => drop(Side::load(at, order.len, 0)),
                    _ => {}
                }
            }
            libc::write(answers, (&raw const answer).cast(), size_of::<Errno>());
        }
        libc::_exit(0)
    }
}
