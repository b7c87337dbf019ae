//! Scenarios that have a process to themselves.
//!
//! # Overview
//! [`isolated`] runs the calling test again in a new process of the same binary and there runs the body, so that a
//! runtime, limits, forks and crashes of one test do not reach another. A watchdog ends a scenario that hangs.
//!
//! # Safety
//! [`fork_child`] runs its closure in a forked child and leaves by `_exit`, so nothing of the parent is dropped twice.
//!
//! # Limits
//! A scenario has [`LIMIT`]; the parent waits a little longer and then kills.

use std::io::{self, Write as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use usvm::host::features::Features;
use usvm::host::{Host, Options};

/// How long one scenario may take.
pub const LIMIT: Duration = Duration::from_secs(60);
const SCENARIO: &str = "USVM_TEST_SCENARIO";

/// Runs `body` in a process of its own, which must end well. `name` is the calling test's path in its binary.
pub fn isolated(name: &str, body: impl FnOnce()) {
    if let Some(status) = spawned(name, body) {
        assert!(status.success(), "{name}: {status}");
    }
}

/// As [`isolated`], but gives how the process ended. `None` inside that process, after `body`.
pub fn spawned(name: &str, body: impl FnOnce()) -> Option<ExitStatus> {
    if std::env::var(SCENARIO).is_ok_and(|v| v == name) {
        watchdog(name);
        // No allocation may land in a hole that a test just made.
        // SAFETY: changes a parameter of malloc.
        unsafe { libc::mallopt(libc::M_MMAP_MAX, 0) };
        body();
        return None;
    }
    let mut child = Command::new(std::env::current_exe().expect("the test's own path"))
        .args([name, "--exact", "--nocapture", "--test-threads=1"])
        .env(SCENARIO, name)
        .stdin(Stdio::null())
        .spawn()
        .expect("the test's own binary starts");
    let deadline = Instant::now() + LIMIT + Duration::from_secs(10);
    loop {
        if let Some(status) = child.try_wait().expect("a child can be waited for") {
            return Some(status);
        }
        if Instant::now() > deadline {
            let _ = child.kill();
            panic!("{name}: the scenario hangs and its watchdog, too");
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Aborts the process after [`LIMIT`].
pub fn watchdog(name: &str) {
    let name = name.to_owned();
    let limit =
        std::env::var("USVM_TEST_LIMIT").ok().and_then(|s| s.parse().ok()).map_or(LIMIT, Duration::from_secs);
    std::thread::spawn(move || {
        std::thread::sleep(limit);
        let _ = writeln!(io::stderr(), "{name}: watchdog: not done after {limit:?}");
        crate::support::end_with_threads();
    });
}

/// Says why a test does not run here: past the test harness, which hides what a test that passes prints with println.
pub fn skipped(reason: impl std::fmt::Display) {
    writeln!(io::stderr(), "skipped: {reason}").expect("stderr can be written to");
}

/// Whether the kernel's own accesses to memory that is away are served here (system calls, locked memory, a child's
/// copies). Where they are not, says so for the test that needs them.
pub fn kernel_faults() -> bool {
    let host = Host::open(&Options::default());
    let served = host.is_ok_and(|host| host.report().has.contains(Features::KERNEL_FAULTS));
    if !served {
        skipped(
            "system calls on memory that is away need the right to kernel-mode userfaultfd (usvm doctor says more)",
        );
    }
    served
}

/// A forked child.
#[derive(Debug)]
pub struct Child(libc::pid_t);

/// Forks by libc (`raw` = false: its handlers run) or by system call. The child runs `f` and ends with 0 if it gives
/// true, with 1 if not, with 101 if it panics.
pub fn fork_child(raw: bool, f: impl FnOnce() -> bool) -> Child {
    // SAFETY: the child only runs `f` and leaves; what `f` may do in a process with one thread is the caller's choice.
    let pid = unsafe {
        if raw {
            libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) as libc::pid_t
        } else {
            libc::fork()
        }
    };
    assert!(pid >= 0, "fork: {}", io::Error::last_os_error());
    if pid == 0 {
        let code = match catch_unwind(AssertUnwindSafe(f)) {
            Ok(true) => 0,
            Ok(false) => 1,
            Err(_) => 101,
        };
        // SAFETY: ends the child.
        unsafe { libc::_exit(code) };
    }
    Child(pid)
}

impl Child {
    /// The child's exit code, or minus its signal; kills it and panics after `limit`.
    pub fn wait(self, limit: Duration) -> i32 {
        let deadline = Instant::now() + limit;
        let mut status = 0;
        loop {
            // SAFETY: waits for our own child; `status` is a live integer.
            let got = unsafe { libc::waitpid(self.0, &mut status, libc::WNOHANG) };
            assert!(got >= 0, "waitpid: {}", io::Error::last_os_error());
            if got == self.0 {
                return if libc::WIFEXITED(status) {
                    libc::WEXITSTATUS(status)
                } else {
                    -libc::WTERMSIG(status)
                };
            }
            if Instant::now() > deadline {
                // SAFETY: our own child, not waited for yet.
                unsafe { libc::kill(self.0, libc::SIGKILL) };
                panic!("child {} hangs", self.0);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Waits and asserts that the child was content.
    #[track_caller]
    pub fn good(self, what: &str) {
        let code = self.wait(Duration::from_secs(20));
        assert_eq!(code, 0, "{what}: child ended with {code}");
    }
}
