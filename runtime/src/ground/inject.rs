//! Fault injection: makes any system call of usvm fail on purpose.
//!
//! # Overview
//! Every wrapper around a system call asks [`check`] first. Without the cargo feature `fault-injection` that is a
//! constant `Ok(())` and costs nothing. With it, `plan` says which call fails with which errno, how often and after
//! how many good ones; a test then shows that the caller falls back or gives an error, and loses no page.
//!
//! # Locking
//! None: a plan is one word for each call, so that application threads may pass through here too. `plan` speaks of
//! the whole process, `plan_here` of the calling thread alone, so that tests beside it run undisturbed; at most one plan
//! for each call exists at a time.
//!
//! # Limits
//! A plan's numbers are at most 65,535 each. Not asked for are calls that cannot fail as usvm makes them: getpid, gettid,
//! getrlimit, getauxval, close, waking a futex, the signal mask of the own thread; and those that std makes on its own
//! account (mutexes, condition variables, parking, sleeping), of which std hides every failure.

use crate::ground::error::Errno;

macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A system call (or ioctl) that usvm makes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(usize)]
        pub enum Call {
            $($(#[$doc])* $name,)*
        }

        impl Call {
            /// Every call, for tests that go through all of them.
            pub const ALL: &'static [Call] = &[$(Call::$name,)*];
        }
    };
}

calls! {
    /// open(2) of /dev/userfaultfd and USERFAULTFD_IOC_NEW.
    UffdDevice,
    /// userfaultfd(2).
    UffdOpen,
    /// UFFDIO_API.
    UffdApi,
    /// UFFDIO_REGISTER.
    Register,
    /// UFFDIO_UNREGISTER.
    Unregister,
    /// UFFDIO_MOVE.
    Move,
    /// UFFDIO_COPY.
    Copy,
    /// UFFDIO_ZEROPAGE.
    Zeropage,
    /// UFFDIO_WRITEPROTECT.
    WriteProtect,
    /// UFFDIO_WAKE.
    Wake,
    /// UFFDIO_POISON.
    Poison,
    /// PAGEMAP_SCAN.
    PagemapScan,
    /// pread(2) of /proc/self/pagemap.
    PagemapRead,
    /// pread(2) of /proc/self/mem.
    MemoryRead,
    /// futex(2) that breaks copy-on-write.
    MakeOwn,
    /// PROCMAP_QUERY.
    ProcmapQuery,
    /// open(2) of a file under /proc, /sys or /dev.
    Open,
    /// mmap(2).
    Mmap,
    /// munmap(2).
    Munmap,
    /// mprotect(2).
    Mprotect,
    /// madvise(2).
    Madvise,
    /// mremap(2).
    Mremap,
    /// memfd_create(2).
    MemfdCreate,
    /// ftruncate(2).
    Ftruncate,
    /// fcntl(2) F_ADD_SEALS.
    Seal,
    /// read(2), pread(2).
    Read,
    /// write(2), pwrite(2).
    Write,
    /// poll(2).
    Poll,
    /// eventfd(2).
    Eventfd,
    /// Waiting on a futex(2).
    Futex,
    /// Starting a thread.
    ThreadSpawn,
    /// process_vm_readv(2), process_vm_writev(2).
    ProcessVm,
    /// munlock(2).
    Munlock,
    /// lseek(2).
    Seek,
    /// stat(2), fstat(2).
    Stat,
    /// tgkill(2) that sends nothing.
    Tgkill,
    /// fcntl(2) F_DUPFD_CLOEXEC.
    DupHigh,
    /// dup3(2).
    Dup,
    /// sched_getaffinity(2), sched_setaffinity(2).
    Affinity,
    /// mmap(2), mprotect(2) and madvise(2) for usvm's own heap.
    HeapMemory,
}

/// Fails if the plan says that this call fails now.
#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub fn check(_call: Call) -> Result<(), Errno> {
    Ok(())
}

#[cfg(feature = "fault-injection")]
pub use planned::{calls, check, clear, count, hits, plan, plan_here};

#[cfg(feature = "fault-injection")]
mod planned {
    use super::{Call, Errno};
    use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

    /// What is planned for one call: errno, calls to let pass, one in how many fails, how many fail (0 = all), 16 bits
    /// each; 0 = nothing planned.
    struct Planned {
        plan: AtomicU64,
        seen: AtomicU64,
        hits: AtomicU64,
        /// The thread it is for; 0 = all.
        thread: AtomicUsize,
    }

    /// A number of the calling thread, without a look-up that could allocate.
    fn this_thread() -> usize {
        thread_local!(static HERE: u8 = const { 0 });
        HERE.with(|here| std::ptr::from_ref(here).addr())
    }

    static PLANS: [Planned; Call::ALL.len()] = [const {
        Planned {
            plan: AtomicU64::new(0),
            seen: AtomicU64::new(0),
            hits: AtomicU64::new(0),
            thread: AtomicUsize::new(0),
        }
    }; Call::ALL.len()];

    /// From now on, after `skip` good calls, every `every`-th `call` fails with `errno`, `count` times in all (0 =
    /// for ever). Replaces the plan for this call and forgets its hits.
    pub fn plan(call: Call, errno: i32, skip: u16, every: u16, count: u16) {
        set(call, errno, [skip, every, count], 0);
    }

    /// [`plan`] for the calls of this thread only.
    pub fn plan_here(call: Call, errno: i32, skip: u16, every: u16, count: u16) {
        set(call, errno, [skip, every, count], this_thread());
    }

    fn set(call: Call, errno: i32, [skip, every, count]: [u16; 3], thread: usize) {
        let p = &PLANS[call as usize];
        p.plan.store(0, Relaxed);
        p.seen.store(0, Relaxed);
        p.hits.store(0, Relaxed);
        p.thread.store(thread, Relaxed);
        let word = (errno as u64 & 0xffff)
            | u64::from(skip) << 16
            | u64::from(every.max(1)) << 32
            | u64::from(count) << 48;
        p.plan.store(word, Relaxed);
    }

    /// From now on `call` is counted and none fails.
    pub fn count(call: Call) {
        plan(call, 0, 0, 1, 0);
    }

    /// How many times `call` was made since it was last planned or counted.
    pub fn calls(call: Call) -> u64 {
        PLANS[call as usize].seen.load(Relaxed)
    }

    /// Drops all plans.
    pub fn clear() {
        for p in &PLANS {
            p.plan.store(0, Relaxed);
        }
    }

    /// How many times `call` was made to fail since it was last planned.
    pub fn hits(call: Call) -> u64 {
        PLANS[call as usize].hits.load(Relaxed)
    }

    /// Fails if the plan says that this call fails now.
    #[inline]
    pub fn check(call: Call) -> Result<(), Errno> {
        let p = &PLANS[call as usize];
        let word = p.plan.load(Relaxed);
        if word == 0 {
            return Ok(());
        }
        fails(p, word)
    }

    #[cold]
    fn fails(p: &Planned, word: u64) -> Result<(), Errno> {
        let thread = p.thread.load(Relaxed);
        if thread != 0 && thread != this_thread() {
            return Ok(());
        }
        let [errno, skip, every, count] = [0, 16, 32, 48].map(|shift| word >> shift & 0xffff);
        let seen = p.seen.fetch_add(1, Relaxed);
        if errno == 0 || seen < skip || !(seen - skip).is_multiple_of(every) {
            return Ok(());
        }
        if count != 0 && p.hits.fetch_update(Relaxed, Relaxed, |h| (h < count).then_some(h + 1)).is_err() {
            return Ok(());
        }
        if count == 0 {
            p.hits.fetch_add(1, Relaxed);
        }
        Err(Errno(errno as i32))
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_plan_counts_as_it_says() {
            let outcome = |n: usize| (0..n).map(|_| check(Call::Dup).is_err()).collect::<Vec<_>>();
            plan(Call::Dup, libc::EIO, 2, 3, 2);
            let expected = [false, false, true, false, false, true, false, false, false, false];
            assert_eq!(outcome(10), expected);
            assert_eq!(hits(Call::Dup), 2);
            plan(Call::Dup, libc::EIO, 0, 1, 0);
            assert_eq!(check(Call::Dup), Err(Errno(libc::EIO)));
            assert_eq!(outcome(3), [true; 3]);
            assert_eq!(hits(Call::Dup), 4);
            count(Call::Dup);
            assert_eq!(outcome(3), [false; 3]);
            assert_eq!((calls(Call::Dup), hits(Call::Dup)), (3, 0));
            plan(Call::Dup, libc::EIO, 0, 1, 1);
            assert_eq!((calls(Call::Dup), outcome(2)), (0, vec![true, false]));
            count(Call::Dup);
        }
    }
}
