//! io_uring on memory that is on the device: plain buffers, and registered ones, whose pages are pinned.

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use io_uring::{IoUring, opcode, squeue, types};
use usvm::{Config, Runtime};
use usvm_tests::isolated::{kernel_faults, skipped};
use usvm_tests::support::*;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const LEN: u64 = 4 << 20;

fn ring() -> Option<IoUring> {
    IoUring::new(8).map_err(|e| skipped(format!("io_uring: {e}"))).ok()
}

fn run(ring: &mut IoUring, entry: &squeue::Entry) -> i32 {
    // SAFETY: the entry's buffer is in a mapping that outlives the completion, which is waited for here.
    unsafe { ring.submission().push(entry).unwrap() };
    ring.submit_and_wait(1).unwrap();
    ring.completion().next().unwrap().result()
}

fn away(seed: u64) -> (Runtime, Mem) {
    let runtime = runtime(Config::default(), &[16 << 20]);
    let mem = Mem::filled(LEN, 1);
    to_device(&runtime, &mem, seed);
    (runtime, mem)
}

fn image(seed: u64, len: u64) -> Vec<u8> {
    (0..len / 8).flat_map(|i| value(seed, i).to_le_bytes()).collect()
}

#[test]
fn plain_buffers() {
    if !kernel_faults() {
        return;
    }
    let _alone = alone("io_uring", 30);
    let Some(mut ring) = ring() else { return };
    let (runtime, mem) = away(2);
    let file = tempfile::tempfile().unwrap();
    let fd = types::Fd(file.as_raw_fd());
    let written = run(&mut ring, &opcode::Write::new(fd, mem.ptr(0).cast(), LEN as u32).build());
    assert_eq!(written, LEN as i32);
    let mut back = vec![0; LEN as usize];
    file.read_exact_at(&mut back, 0).unwrap();
    assert!(back == image(2, LEN), "io_uring saw other bytes");
    for round in 3..8 {
        to_device(&runtime, &mem, round);
        let flags = if round % 2 == 0 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        let read = run(&mut ring, &opcode::Read::new(fd, mem.ptr(0).cast(), LEN as u32).build().flags(flags));
        assert_eq!(read, LEN as i32);
        mem.check(2);
    }
    let at = mem.at;
    on_gpu(&runtime, move |gpu| gpu_check(gpu, at, LEN, 0, 2)).unwrap();
}

#[test]
fn registered_buffers_stay_where_they_are() {
    let _alone = alone("io_uring fixed", 60);
    let Some(mut ring) = ring() else { return };
    let (runtime, mem) = away(4);
    let half = LEN / 2;
    let buffer = libc::iovec { iov_base: mem.ptr(0), iov_len: half as usize };
    // SAFETY: the mapping outlives the ring.
    if let Err(e) = unsafe { ring.submitter().register_buffers(&[buffer]) } {
        skipped(format!("registered buffers: {e}"));
        return;
    }
    let file = tempfile::tempfile().unwrap();
    let fd = types::Fd(file.as_raw_fd());
    let (at, len) = (mem.at, LEN);
    for round in 5..10 {
        // The device writes; the ring's writes must see that.
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, len, 0, round)).unwrap();
        let written = run(&mut ring, &opcode::WriteFixed::new(fd, mem.ptr(0).cast(), half as u32, 0).build());
        assert_eq!(written, half as i32);
        let mut back = vec![0; half as usize];
        file.read_exact_at(&mut back, 0).unwrap();
        assert!(back == image(round, half), "the ring saw other bytes in round {round}");
        // The ring reads into it; the device and the CPU must see that.
        file.write_all_at(&image(round + 100, half), 0).unwrap();
        let read = run(&mut ring, &opcode::ReadFixed::new(fd, mem.ptr(0).cast(), half as u32, 0).build());
        assert_eq!(read, half as i32);
        on_gpu(&runtime, move |gpu| gpu_check(gpu, at, half, 0, round + 100)).unwrap();
        mem.check_words(0, half, |i| value(round + 100, i));
        mem.check_words(half, half, |i| value(round, i));
    }
    let residence = runtime.residence(at, half).unwrap();
    assert_eq!(residence.device, 0, "pinned memory is on the device");
    assert!(runtime.device(0).unwrap().stats().remote_bytes_read >= half);
    ring.submitter().unregister_buffers().unwrap();
    to_device(&runtime, &mem, 20);
    mem.check(20);
}

/// A read that was submitted and waits for its data while the device takes the memory away, changes it, and gives it
/// back: the data arrives, and nothing else changes.
#[test]
fn reads_in_flight_while_the_device_takes_the_range() {
    use std::io::Write;
    if !kernel_faults() {
        return;
    }
    let _alone = alone("io_uring in flight", 60);
    let Some(mut ring) = ring() else { return };
    let (runtime, mem) = away(2);
    const PART: u64 = 3 * K4;
    for round in 3..23u64 {
        let fixed = round % 2 == 0;
        if fixed {
            let buffer = libc::iovec { iov_base: mem.ptr(K64), iov_len: PART as usize };
            // SAFETY: the mapping outlives the ring.
            if let Err(e) = unsafe { ring.submitter().register_buffers(&[buffer]) } {
                skipped(format_args!("registered buffers: {e}"));
                continue;
            }
        }
        let (reader, mut writer) = std::io::pipe().unwrap();
        let fd = types::Fd(reader.as_raw_fd());
        let (to, len) = (mem.ptr(K64).cast(), PART as u32);
        let entry = if fixed {
            opcode::ReadFixed::new(fd, to, len, 0).build()
        } else {
            opcode::Read::new(fd, to, len).build()
        };
        let flags = if round % 4 < 2 { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
        // SAFETY: the buffer is in a mapping that outlives the completion, which is waited for below.
        unsafe { ring.submission().push(&entry.flags(flags)).unwrap() };
        ring.submit().unwrap();
        assert!(ring.completion().next().is_none(), "it must still wait");
        let (at, all) = (mem.at, mem.len);
        on_gpu(&runtime, move |gpu| gpu_fill(gpu, at, all, 0, round)).unwrap();
        if !fixed {
            assert!(runtime.residence(at, all).unwrap().device > 0, "round {round}");
        }
        writer.write_all(&image(round + 50, PART)).unwrap();
        ring.submit_and_wait(1).unwrap();
        assert_eq!(ring.completion().next().unwrap().result(), PART as i32, "round {round}");
        let from = K64 / 8;
        on_gpu(&runtime, move |gpu| {
            gpu_check(gpu, at, K64, 0, round)?;
            gpu_check(gpu, at + K64, PART, 0, round + 50)?;
            gpu_check(gpu, at + K64 + PART, all - K64 - PART, from + PART / 8, round)
        })
        .unwrap();
        mem.check_words(K64, PART, |i| value(round + 50, i - from));
        mem.check_words(0, K64, |i| value(round, i));
        if fixed {
            ring.submitter().unregister_buffers().unwrap();
        }
    }
}
