//! mremap beside other threads' mremap: the kernel tells of each in several events, with those of others in between, and
//! lets an address be taken anew before it has told that it is free. And other cases in which an event comes late.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use usvm::{Access, Config, GpuAccess, Hint, Location, Runtime};
use usvm_tests::area::*;
use usvm_tests::isolated::{isolated, kernel_faults};

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

const RW: i32 = libc::PROT_READ | libc::PROT_WRITE;
const LEN: u64 = 16 << 10;

/// How often anything was not what it had to be.
static WRONG: AtomicU64 = AtomicU64::new(0);

/// What the first word of `page` is in a thread's `round`.
fn word(thread: u64, round: u64, page: u64) -> u64 {
    thread << 48 | round << 16 | (page + 1)
}

fn fill(at: u64, thread: u64, round: u64) {
    (0..LEN / K4).for_each(|page| cpu_write(at + page * K4, &word(thread, round, page).to_ne_bytes()));
}

fn check(bytes: impl Fn(u64) -> Vec<u8>, what: &str, thread: u64, round: u64) {
    for page in 0..LEN / K4 {
        let (found, expected) = (bytes(page), word(thread, round, page).to_ne_bytes());
        if found != expected && WRONG.fetch_add(1, Relaxed) < 8 {
            eprintln!(
                "{what}: thread {thread}, round {round}, page {page}: {found:x?} instead of {expected:x?}"
            );
        }
    }
}

/// Whether a thread's block moves onto nothing, or onto memory that has contents of its own on the device.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Onto {
    Nothing,
    Contents,
}

/// A block that goes to the device and is moved by mremap, again and again; processor and device look in turn. `last` is
/// where it goes.
fn moves(rt: &Runtime, thread: u64, onto: Onto, guard: u64, last: &AtomicU64, until: Instant) {
    let device = Location::Device(0);
    let mut at = map(None, LEN, RW).unwrap();
    for round in 1.. {
        if Instant::now() > until {
            break;
        }
        fill(at, thread, round);
        let _ = rt.prefetch(at, LEN, device).wait(None);
        let to = match onto {
            Onto::Nothing => map(None, LEN + 2 * guard, libc::PROT_NONE).unwrap() + guard,
            Onto::Contents => {
                let to = map(None, LEN, RW).unwrap();
                fill(to, 63, round);
                let _ = rt.prefetch(to, LEN, device).wait(None);
                to
            }
        };
        last.store(to, Relaxed);
        remap(at, LEN, LEN, 0, Some(to)).unwrap();
        if guard > 0 && round > 1 {
            unmap(at - guard, guard);
            unmap(at + LEN, guard);
        }
        at = to;
        if guard > 0 && round % 2 == 1 {
            let seen = device_read(rt, at, LEN).unwrap();
            check(|page| seen[(page * K4) as usize..][..8].to_vec(), "device", thread, round);
        }
        check(|page| cpu_read(at + page * K4, 8), "processor", thread, round);
    }
}

/// Threads that move blocks, and some that send to the device whatever is where the blocks go.
fn movers(name: &'static str, kinds: &'static [Onto], senders: u64, guard: u64) {
    if !kernel_faults() {
        return;
    }
    isolated(name, || {
        let rt = runtime(64 << 20);
        let until = Instant::now() + Duration::from_secs(4);
        let last: Vec<AtomicU64> = kinds.iter().map(|_| AtomicU64::new(0)).collect();
        std::thread::scope(|scope| {
            for ((thread, onto), last) in (1..).zip(kinds).zip(&last) {
                let rt = &rt;
                scope.spawn(move || moves(rt, thread, *onto, guard, last, until));
            }
            for sender in 0..senders {
                let (rt, last) = (&rt, &last);
                scope.spawn(move || {
                    let mut rng = Rng::new(sender + 77);
                    while Instant::now() < until {
                        let at = last[rng.below(last.len() as u64) as usize].load(Relaxed);
                        if at != 0 {
                            let _ = rt.prefetch(at, LEN, Location::Device(0)).wait(None);
                        }
                    }
                });
            }
        });
        rt.shutdown();
        assert_eq!(WRONG.load(Relaxed), 0, "pages with other contents");
    });
}

#[test]
fn blocks_that_take_each_others_place() {
    movers("blocks_that_take_each_others_place", &[Onto::Nothing; 2], 0, 0);
}

#[test]
fn blocks_that_move_onto_contents_beside_others() {
    movers("blocks_that_move_onto_contents_beside_others", &[Onto::Contents, Onto::Nothing], 0, 0);
}

#[test]
fn a_place_that_is_sent_to_the_device_before_its_contents_land() {
    movers("a_place_that_is_sent_to_the_device_before_its_contents_land", &[Onto::Nothing; 3], 3, K64);
}

#[test]
fn what_was_cut_off_is_zero_when_it_grows_back() {
    isolated("what_was_cut_off_is_zero_when_it_grows_back", || {
        let rt = runtime(64 << 20);
        for (len, keep, rounds) in [(K64, K4, 2000), (16 << 20, M2, 20)] {
            let (area, _) = Area::filled(len, len > K64, &mut Rng::new(3));
            for round in 0..rounds {
                (0..len / K4).for_each(|page| cpu_write(area.at + page * K4, &[7; 8]));
                rt.prefetch(area.at, len, Location::Device(0)).wait(None).unwrap();
                remap(area.at, len, keep, 0, None).unwrap();
                if remap(area.at, keep, len, 0, None).is_err() {
                    // Something else took the place.
                    map(Some(area.at), len, RW).unwrap();
                    continue;
                }
                let old =
                    (keep / K4..len / K4).filter(|page| cpu_read(area.at + page * K4, 8) != [0; 8]).count();
                assert_eq!(old, 0, "round {round}: pages of {len} bytes with what was cut off");
            }
        }
        rt.shutdown();
    });
}

#[test]
fn a_block_that_grows_onto_contents_has_zeroes_behind() {
    isolated("a_block_that_grows_onto_contents_has_zeroes_behind", || {
        let rt = runtime(64 << 20);
        for (len, huge) in [(K4, false), (K64, false), (M2, true)] {
            for is_away in [true, false] {
                let mut rng = Rng::new(5);
                let (block, mut known) = Area::filled(len, huge, &mut rng);
                let (place, mut other) = Area::filled(2 * len, huge, &mut rng);
                other.change(&rt, "the place");
                known.change(&rt, "the block");
                if !is_away {
                    cpu_peek(block.at);
                }
                rt.prefetch(place.at, 2 * len, Location::Device(0)).wait(None).unwrap();
                remap(block.at, len, 2 * len, 0, Some(place.at)).unwrap();
                let got = cpu_read(place.at, 2 * len);
                assert!(got[..len as usize] == known.bytes[..], "{len} bytes, away: {is_away}");
                assert!(got[len as usize..].iter().all(|byte| *byte == 0), "{len} bytes, away: {is_away}");
            }
        }
        rt.shutdown();
    });
}

/// A hint changes no results: what the processor writes after a bracket, the next launch sees.
#[test]
fn copies_are_not_read_after_their_bracket() {
    isolated("copies_are_not_read_after_their_bracket", || {
        let rt = runtime(64 << 20);
        let mut rng = Rng::new(7);
        for len in [K4, K64, M2] {
            let (area, piece) = Area::filled(len, false, &mut rng);
            rt.advise(area.at, len, Hint::ReadMostly(true)).unwrap();
            for round in 0..3 {
                let access = Access { addr: area.at, len, access: GpuAccess::Read };
                let before = cpu_read(area.at, len);
                let bracket = rt.begin_access(0, &[access]).unwrap();
                assert!(rt.residence(area.at, len).unwrap().shared > 0, "it is a copy");
                assert!(
                    device_read(&rt, area.at, len).unwrap() == before,
                    "{len} bytes, round {round}: inside"
                );
                rt.end_access(bracket).unwrap();
                let fresh = rng.bytes(len);
                cpu_write(area.at, &fresh);
                assert!(
                    device_read(&rt, area.at, len).unwrap() == fresh,
                    "{len} bytes, round {round}: after"
                );
            }
            drop(piece);
        }
        rt.shutdown();
    });
}

#[test]
fn chaos_shares_only_what_it_may() {
    if !kernel_faults() {
        return;
    }
    isolated("chaos_shares_only_what_it_may", || {
        let mut config = Config::default();
        config.chaos = Some(usvm::ground::config::Chaos { rate: 2500, seed: 5 });
        config.vram = Some(64 << 20);
        let rt = Runtime::start(config).unwrap();
        let (area, _) = Area::filled(M2, false, &mut Rng::new(3));
        let (at, until) = (area.at, Instant::now() + Duration::from_secs(3));
        for round in 1u64.. {
            if Instant::now() > until {
                break;
            }
            (0..M2 / K4).for_each(|page| cpu_write(at + page * K4, &(round << 32 | page).to_ne_bytes()));
            let look = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
                let is_old = |gpu: &mut usvm::device::sim::Gpu<'_>, page: u64| {
                    gpu.load_u64(at + page * K4).map(|word| u64::from(word != (round << 32 | page)))
                };
                let old = (0..M2 / K4).map(|page| is_old(gpu, page)).sum::<usvm::Result<u64>>()?;
                WRONG.fetch_add(old, Relaxed);
                Ok(())
            };
            rt.launch(0, look).wait(None).unwrap();
            assert_eq!(WRONG.load(Relaxed), 0, "round {round}: old pages");
        }
        rt.shutdown();
    });
}
