//! System calls on memory that is on the device: the kernel faults, is served, and sees and leaves the right bytes.
//!
//! Each test first makes the device's copy the only one, with contents that only the device knew.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Seek, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use usvm::{Config, Runtime};
use usvm_tests::isolated::{kernel_faults, skipped};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const LEN: u64 = 3 << 20;

/// A runtime and memory that is on its device, with values of `seed`.
fn away(seed: u64) -> (Runtime, Mem) {
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(LEN, 1);
    to_device(&runtime, &mem, seed);
    (runtime, mem)
}

/// The memory as a slice for a system call. Nothing else uses it during the call.
fn slice(mem: &Mem, from: u64, len: u64) -> &[u8] {
    assert!(from + len <= mem.len);
    // SAFETY: inside the mapping; the test's other threads and the device leave it alone during the call.
    unsafe { std::slice::from_raw_parts(mem.ptr(from).cast(), len as usize) }
}

/// As [`slice`], to be written.
#[allow(clippy::mut_from_ref)]
fn slice_mut(mem: &Mem, from: u64, len: u64) -> &mut [u8] {
    assert!(from + len <= mem.len);
    // SAFETY: as in `slice`, and each test takes one at a time.
    unsafe { std::slice::from_raw_parts_mut(mem.ptr(from).cast(), len as usize) }
}

/// The bytes that [`Mem::fill`] makes.
fn image(seed: u64, len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|i| value(seed, i).to_le_bytes()).collect()
}

fn os(result: isize) -> usize {
    usize::try_from(result).unwrap_or_else(|_| panic!("{}", std::io::Error::last_os_error()))
}

#[test]
fn write_and_read() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("write and read", 30);
    let (runtime, mem) = away(2);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(slice(&mem, 0, LEN)).unwrap();
    let mut back = Vec::new();
    file.rewind().unwrap();
    file.read_to_end(&mut back).unwrap();
    assert!(back == image(2, LEN), "write(2) saw other bytes");
    to_device(&runtime, &mem, 3);
    file.rewind().unwrap();
    file.read_exact(slice_mut(&mem, 0, LEN)).unwrap();
    mem.check(2);
    // What read(2) stored is what the device sees.
    let at = mem.at;
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, LEN, 0, 2)).unwrap();
}

#[test]
fn pwrite_and_pread_of_a_part() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("pwrite and pread", 30);
    let (runtime, mem) = away(4);
    let file = tempfile::tempfile().unwrap();
    let (from, len) = (M2 - 3 * K4 - 8, 6 * K4);
    file.write_all_at(slice(&mem, from, len), 100).unwrap();
    let mut back = vec![0; len as usize];
    file.read_exact_at(&mut back, 100).unwrap();
    assert!(back == image(4, LEN)[from as usize..(from + len) as usize]);
    to_device(&runtime, &mem, 5);
    file.read_exact_at(slice_mut(&mem, from, len), 100).unwrap();
    mem.check_words(from, len, |i| value(4, i));
    mem.check_words(0, from, |i| value(5, i));
    mem.check_words(from + len, LEN - from - len, |i| value(5, i));
}

#[test]
fn writev_and_readv() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("writev and readv", 30);
    let (runtime, mem) = away(6);
    let mut file = tempfile::tempfile().unwrap();
    let parts = [(0, K4), (M2 - 8, 16), (M2 + K64, 5 * K4)];
    let out: Vec<_> = parts.iter().map(|&(at, len)| IoSlice::new(slice(&mem, at, len))).collect();
    let total: u64 = parts.iter().map(|p| p.1).sum();
    assert_eq!(file.write_vectored(&out).unwrap() as u64, total);
    let whole = image(6, LEN);
    let want: Vec<u8> =
        parts.iter().flat_map(|&(at, len)| whole[at as usize..(at + len) as usize].to_vec()).collect();
    let mut back = vec![0; total as usize];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == want);
    to_device(&runtime, &mem, 7);
    file.rewind().unwrap();
    let mut to: Vec<_> = parts.iter().map(|&(at, len)| IoSliceMut::new(slice_mut(&mem, at, len))).collect();
    assert_eq!(file.read_vectored(&mut to).unwrap() as u64, total);
    for (at, len) in parts {
        mem.check_words(at, len, |i| value(6, i));
    }
    mem.check_words(K4, M2 - 8 - K4, |i| value(7, i));
}

/// A file that takes O_DIRECT, in the target directory or here; `None` says why not.
fn direct_file() -> Option<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let folder = std::env::current_exe().unwrap();
    let path = folder.with_file_name(format!("usvm-direct-{}", std::process::id()));
    let opened =
        File::options().read(true).write(true).create_new(true).custom_flags(libc::O_DIRECT).open(&path);
    let _ = std::fs::remove_file(&path);
    opened.map_err(|e| skipped(format!("no O_DIRECT in {}: {e}", path.display()))).ok()
}

#[test]
fn direct_write_and_read() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("O_DIRECT", 30);
    let Some(file) = direct_file() else { return };
    let (runtime, mem) = away(8);
    file.write_all_at(slice(&mem, 0, LEN), 0).unwrap();
    for round in 9..14 {
        to_device(&runtime, &mem, round);
        file.read_exact_at(slice_mut(&mem, 0, LEN), 0).unwrap();
        mem.check(8);
    }
}

#[test]
fn direct_reads_while_the_device_takes_the_range_away() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("O_DIRECT race", 30);
    let Some(file) = direct_file() else { return };
    let (runtime, mem) = away(8);
    file.write_all_at(slice(&mem, 0, LEN), 0).unwrap();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Another word of each page than the file has anything to say about: the last page of each block.
            let at = mem.at;
            while !stop.load(Relaxed) {
                let touch = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                    for page in (15..LEN / K4).step_by(16) {
                        let word = at + page * K4;
                        let n = gpu.load_u64(word)?;
                        gpu.store_u64(word, n + 1)?;
                    }
                    Ok(())
                };
                on_gpu(&runtime, touch).unwrap();
            }
        });
        let _stops = Stops(&stop);
        let blocks = LEN / K64;
        for round in 0..400u64 {
            let block = (round * 7 % blocks) * K64;
            let len = K64 - K4;
            slice_mut(&mem, block, len).fill(0xEE);
            file.read_exact_at(slice_mut(&mem, block, len), block).unwrap();
            mem.check_words(block, len, |i| value(8, i));
        }
    });
}

#[test]
fn sendmsg_and_recvmsg() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("sendmsg", 30);
    let (runtime, mem) = away(10);
    let (a, b) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut sent = 0;
            while sent < LEN {
                let mut part = libc::iovec { iov_base: mem.ptr(sent), iov_len: (LEN - sent) as usize };
                // SAFETY: a zeroed header is valid, and the vector outlives the call.
                let n = unsafe {
                    let mut header: libc::msghdr = std::mem::zeroed();
                    (header.msg_iov, header.msg_iovlen) = (&mut part, 1);
                    libc::sendmsg(a.as_raw_fd(), &header, 0)
                };
                sent += os(n) as u64;
            }
        });
        let mut back = vec![0; LEN as usize];
        (&b).read_exact(&mut back).unwrap();
        assert!(back == image(10, LEN), "sendmsg saw other bytes");
    });
    to_device(&runtime, &mem, 11);
    let source = image(12, LEN);
    std::thread::scope(|scope| {
        scope.spawn(|| (&a).write_all(&source).unwrap());
        let mut got = 0;
        while got < LEN {
            let mut part = libc::iovec { iov_base: mem.ptr(got), iov_len: (LEN - got) as usize };
            // SAFETY: as above; the kernel writes inside the mapping only.
            let n = unsafe {
                let mut header: libc::msghdr = std::mem::zeroed();
                (header.msg_iov, header.msg_iovlen) = (&mut part, 1);
                libc::recvmsg(b.as_raw_fd(), &mut header, 0)
            };
            got += os(n) as u64;
        }
    });
    mem.check(12);
}

#[test]
fn vmsplice_keeps_what_was_there() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("vmsplice", 30);
    let (runtime, mem) = away(13);
    let (mut reader, writer) = std::io::pipe().unwrap();
    let part = libc::iovec { iov_base: mem.ptr(0), iov_len: K64 as usize };
    // SAFETY: one vector inside the mapping.
    let n = os(unsafe { libc::vmsplice(writer.as_raw_fd(), &part, 1, 0) });
    assert!(n > 0);
    // The pipe holds the very pages. They stay referenced, so the device must leave them or copy, and the pipe must not see
    // any page that is handed to somebody else.
    let at = mem.at;
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, LEN, 0, 13)).unwrap();
    mem.check(13);
    let mut back = vec![0; n];
    reader.read_exact(&mut back).unwrap();
    assert!(back == image(13, LEN)[..n], "the pipe saw other bytes");
    to_device(&runtime, &mem, 14);
    mem.check(14);
}

#[test]
fn futex_words_on_the_device() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("futex", 30);
    let (runtime, mem) = away(15);
    let word = &mem.words::<u32>()[5 * 1024 + 3];
    let futex = |op: i32, value: u32| {
        let limit = libc::timespec { tv_sec: 20, tv_nsec: 0 };
        // SAFETY: the word is in the mapping; the time limit outlives the call.
        unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), op, value, &limit) }
    };
    // The word's value was made by the device: FUTEX_WAIT for another value answers EAGAIN, for this one it sleeps.
    let there = value(15, (5 * 1024 + 3) / 2);
    let there = if (5 * 1024 + 3) % 2 == 0 { there as u32 } else { (there >> 32) as u32 };
    assert_eq!(futex(libc::FUTEX_WAIT, there ^ 1), -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EAGAIN));
    for round in 0..20 {
        to_device(&runtime, &mem, 15);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                while word.load(SeqCst) == there {
                    let got = futex(libc::FUTEX_WAIT, there);
                    let errno = std::io::Error::last_os_error().raw_os_error();
                    assert!(got == 0 || matches!(errno, Some(libc::EAGAIN | libc::EINTR)), "{got} {errno:?}");
                }
            });
            if round % 2 == 0 {
                std::thread::sleep(std::time::Duration::from_millis(5));
                // Away again while somebody waits on it.
                let at = mem.at;
                on_gpu(&runtime, move |gpu| gpu_check(gpu, at, LEN, 0, 15)).unwrap();
            }
            word.store(there.wrapping_add(1), SeqCst);
            assert!(futex(libc::FUTEX_WAKE, 1) >= 0);
            waiter.join().unwrap();
        });
    }
}

#[test]
fn another_process_reads_and_writes() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("process_vm", 30);
    let (runtime, mem) = away(17);
    let (mut from_child, mut to_parent) = std::io::pipe().unwrap();
    let (mut from_parent, mut to_child) = std::io::pipe().unwrap();
    let parent = std::process::id() as i32;
    let mut buffer = vec![0u8; K64 as usize];
    // SAFETY: the child calls nothing but system calls until _exit.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // Forked before the memory goes away again: what the child asks for is served in the parent.
        let mut go = [0];
        let here = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let there = libc::iovec { iov_base: mem.ptr(M2 - 4 * K4), iov_len: buffer.len() };
        let ok = from_parent.read_exact(&mut go).is_ok();
        // SAFETY: vectors of live memory, here and there.
        let n = unsafe { libc::process_vm_readv(parent, &here, 1, &there, 1, 0) };
        let ok = ok && n == buffer.len() as isize && to_parent.write_all(&buffer).is_ok();
        // SAFETY: as above.
        let n = unsafe {
            libc::process_vm_writev(parent, &here, 1, &libc::iovec { iov_base: mem.ptr(0), ..there }, 1, 0)
        };
        // SAFETY: ends the child without running anything of the test's.
        unsafe { libc::_exit(i32::from(!(ok && n == buffer.len() as isize))) };
    }
    to_device(&runtime, &mem, 18);
    // SAFETY: lets the child read this process, where a security module would mind.
    unsafe { libc::prctl(libc::PR_SET_PTRACER, child) };
    to_child.write_all(&[1]).unwrap();
    let mut back = vec![0; K64 as usize];
    from_child.read_exact(&mut back).unwrap();
    let mut status = 0;
    // SAFETY: waits for our child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    let from = (M2 - 4 * K4) / 8;
    let want: Vec<u8> = (from..from + K64 / 8).flat_map(|i| value(18, i).to_le_bytes()).collect();
    assert!(back == want, "the other process saw other bytes");
    mem.check_words(0, K64, |i| value(18, from + i));
    mem.check_words(K64, LEN - K64, |i| value(18, i));
}

#[test]
fn results_that_the_kernel_stores() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("results", 30);
    let (runtime, mem) = away(20);
    let (mut reader, mut writer) = std::io::pipe().unwrap();
    writer.write_all(b"seven!!").unwrap();
    let again = |seed| to_device(&runtime, &mem, seed);
    // SAFETY: each call stores a structure inside the mapping, at an aligned place.
    unsafe {
        assert_eq!(libc::clock_gettime(libc::CLOCK_MONOTONIC, mem.ptr(K4).cast()), 0);
        again(21);
        let time = mem.ptr(M2 - K4).cast::<libc::timespec>();
        // Not by the vDSO, too.
        assert_eq!(libc::syscall(libc::SYS_clock_gettime, libc::CLOCK_MONOTONIC, time), 0);
        assert!((*time).tv_sec > 0 && (*time).tv_nsec < 1_000_000_000);
        again(22);
        let stat = mem.ptr(3 * K4).cast::<libc::stat>();
        assert_eq!(libc::stat(c"/proc/self/exe".as_ptr(), stat), 0);
        assert!((*stat).st_size > 0 && (*stat).st_mode & libc::S_IFMT == libc::S_IFREG);
        again(23);
        let unread = mem.ptr(5 * K4).cast::<i32>();
        assert_eq!(libc::ioctl(reader.as_raw_fd(), libc::FIONREAD, unread), 0);
        assert_eq!(*unread, 7);
        again(24);
        assert_eq!(os(libc::getrandom(mem.ptr(7 * K4), 256, 0)), 256);
        let random = slice(&mem, 7 * K4, 256);
        assert!(random.iter().any(|b| *b != random[0]));
        again(25);
        // A path, too, is read from the device.
        let at = mem.at;
        on_gpu(&runtime, move |gpu| gpu.write(at + 9 * K4, b"/proc/self/exe\0")).unwrap();
        let mut local: libc::stat = std::mem::zeroed();
        assert_eq!(libc::stat(mem.ptr(9 * K4).cast(), &mut local), 0);
        assert!(local.st_size > 0);
    }
    let mut rest = [0; 7];
    reader.read_exact(&mut rest).unwrap();
    mem.check_words(K64, K64, |i| value(25, i));
}

#[test]
fn a_new_program_gets_arguments_and_environment_from_the_device() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("execve", 30);
    let (runtime, mem) = away(26);
    let at = mem.at;
    let strings =
        ["/bin/sh\0", "-c\0", "test \"$WORD\" = from-the-device && exit 23\0", "WORD=from-the-device\0"];
    let offsets = [0, 1, 2, 3].map(|n| strings[..n].concat().len() as u64);
    on_gpu(&runtime, move |gpu| {
        gpu.write(at, strings.concat().as_bytes())?;
        let (args, env) = (at + K4, at + 2 * K4);
        for (i, offset) in offsets[..3].iter().enumerate() {
            gpu.store_u64(args + i as u64 * 8, at + offset)?;
        }
        gpu.store_u64(args + 24, 0)?;
        gpu.store_u64(env, at + offsets[3])?;
        gpu.store_u64(env + 8, 0)
    })
    .unwrap();
    // vfork shares the memory and runs no handlers: the strings are still on the device when execve reads them.
    // SAFETY: the child only calls execve and _exit; it is a separate function call's frame that is not returned from.
    let child = unsafe {
        let child = vfork_and_exec(mem.ptr(0).cast(), mem.ptr(K4).cast(), mem.ptr(2 * K4).cast());
        assert!(child > 0);
        child
    };
    let mut status = 0;
    // SAFETY: waits for our child.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 23, "{status:#x}");
}

/// # Safety
/// The pointers are those of execve(2).
unsafe fn vfork_and_exec(
    path: *const libc::c_char,
    args: *const *const libc::c_char,
    env: *const *const libc::c_char,
) -> i32 {
    // SAFETY: with CLONE_VFORK the parent sleeps until the child is another program; the child has a stack of its own.
    unsafe {
        let mut stack = vec![0u8; 64 << 10];
        let mut call = (path, args, env);
        extern "C" fn run(call: *mut libc::c_void) -> i32 {
            // SAFETY: `call` is the parent's local, which outlives the child as the parent sleeps.
            unsafe {
                let (path, args, env) = *call.cast::<(
                    *const libc::c_char,
                    *const *const libc::c_char,
                    *const *const libc::c_char,
                )>();
                libc::execve(path, args, env);
                libc::_exit(99)
            }
        }
        let top = stack.as_mut_ptr().add(stack.len() & !15).cast();
        libc::clone(run, top, libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD, (&raw mut call).cast())
    }
}

#[test]
fn a_signal_handler_on_a_stack_that_is_on_the_device() {
    if !kernel_faults() {
        return;
    }
    static SEEN: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    extern "C" fn handler(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let here = 0u8;
        SEEN.store(std::hint::black_box(&raw const here) as u64, SeqCst);
    }
    let _alone = alone("sigaltstack", 30);
    let (runtime, mem) = away(28);
    let stack = libc::stack_t { ss_sp: mem.ptr(K64), ss_flags: 0, ss_size: K64 as usize };
    // SAFETY: the stack is in the mapping and nothing else uses it; the handler only stores to a static. Both are put back
    // before the mapping goes.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
        let mut before: libc::sigaction = std::mem::zeroed();
        let mut old_stack: libc::stack_t = std::mem::zeroed();
        assert_eq!(libc::sigaltstack(&stack, &mut old_stack), 0);
        assert_eq!(libc::sigaction(libc::SIGUSR1, &action, &mut before), 0);
        for round in 0..10 {
            to_device(&runtime, &mem, 28 + round);
            assert_eq!(libc::raise(libc::SIGUSR1), 0);
            let seen = SEEN.swap(0, SeqCst);
            assert!(
                seen > mem.at + K64 && seen < mem.at + 2 * K64,
                "the handler did not run there: {seen:#x}"
            );
            mem.check_words(2 * K64, LEN - 2 * K64, |i| value(28 + round, i));
            mem.check_words(0, K64, |i| value(28 + round, i));
        }
        assert_eq!(libc::sigaction(libc::SIGUSR1, &before, std::ptr::null_mut()), 0);
        assert_eq!(libc::sigaltstack(&old_stack, std::ptr::null_mut()), 0);
    }
}

/// Memory that a socket still sends from, without a copy, while the device takes it and the CPU fetches it back.
#[test]
fn zerocopy_sends_from_a_range_that_migrates() {
    if !kernel_faults() {
        return;
    }
    const MSG_ZEROCOPY: i32 = 0x400_0000;
    let _alone = alone("MSG_ZEROCOPY", 60);
    let (runtime, mem) = away(2);
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let sender = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut receiver, _) = listener.accept().unwrap();
    let on = 1i32;
    // SAFETY: a live integer of the given length.
    let set = unsafe {
        libc::setsockopt(
            sender.as_raw_fd(),
            libc::SOL_SOCKET,
            60,
            (&raw const on).cast(),
            size_of::<i32>() as u32,
        )
    };
    if set != 0 {
        skipped(format_args!("SO_ZEROCOPY: {}", std::io::Error::last_os_error()));
        return;
    }
    sender.set_nonblocking(true).unwrap();
    let at = mem.at;
    for seed in 3..9u64 {
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, LEN, 0, seed)).unwrap();
        assert!(runtime.residence(at, LEN).unwrap().device > 0);
        // As much as the socket takes: nobody receives, so most of it waits in the queue by reference.
        let mut sent = 0;
        let mut calls = 0u32;
        while sent < LEN as usize {
            let iov =
                libc::iovec { iov_base: mem.ptr(sent as u64), iov_len: (LEN as usize - sent).min(256 << 10) };
            // SAFETY: plain integers and pointers, of which zero is none.
            let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
            (msg.msg_iov, msg.msg_iovlen) = (&raw const iov as *mut _, 1);
            // SAFETY: the message and the mapping it names are live; the kernel keeps the pages it needs for longer.
            let n = unsafe { libc::sendmsg(sender.as_raw_fd(), &msg, MSG_ZEROCOPY) };
            if n < 0 {
                let e = std::io::Error::last_os_error();
                assert!(matches!(e.raw_os_error(), Some(libc::EAGAIN | libc::ENOBUFS)), "{e}");
                break;
            }
            sent += n as usize;
            calls += 1;
        }
        assert!(sent > 64 << 10, "{sent}");
        // The device reads it, which takes what can be taken; the CPU fetches it back; retained pages go.
        for _ in 0..3 {
            on_gpu(&runtime, move |gpu| gpu_check(gpu, at, LEN, 0, seed)).unwrap();
            mem.check(seed);
            runtime.prefetch(at, LEN, usvm::Location::Device(0)).wait(None).unwrap();
        }
        let mut got = vec![0; sent];
        receiver.read_exact(&mut got).unwrap();
        let want: Vec<u8> = (0..LEN / 8).flat_map(|i| value(seed, i).to_le_bytes()).take(sent).collect();
        assert!(got == want, "the receiver got other bytes with seed {seed}");
        finished(&sender, calls);
    }
    // The socket has let go of all of it.
    to_device(&runtime, &mem, 20);
    mem.check(20);
}

/// Waits until the kernel has said of `calls` sends that their memory is free.
fn finished(socket: &std::net::TcpStream, calls: u32) {
    let began = std::time::Instant::now();
    let mut done = 0;
    while done < calls {
        let mut control = [0u64; 32];
        // SAFETY: plain integers and pointers, of which zero is none.
        let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
        (msg.msg_control, msg.msg_controllen) = (control.as_mut_ptr().cast(), size_of_val(&control));
        // SAFETY: a live message with a buffer of the given length.
        let n = unsafe { libc::recvmsg(socket.as_raw_fd(), &mut msg, libc::MSG_ERRQUEUE) };
        if n < 0 {
            assert!(began.elapsed().as_secs() < 10, "{done} of {calls} sends are finished");
            std::thread::sleep(std::time::Duration::from_millis(1));
            continue;
        }
        // A struct sock_extended_err behind the header: errno, four bytes, then the first and the last send.
        // SAFETY: the kernel filled the header and what follows it.
        let (first, last) = unsafe {
            let data = libc::CMSG_DATA(libc::CMSG_FIRSTHDR(&msg)).cast::<u32>();
            (data.add(2).read_unaligned(), data.add(3).read_unaligned())
        };
        done += last.wrapping_sub(first) + 1;
    }
}
