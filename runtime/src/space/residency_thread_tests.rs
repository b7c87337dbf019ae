//! The residency machine under threads: CPU accesses, device accesses, unmaps and evictions at once, on the fake process.
//! Nothing is lost and nothing hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::mover::Mover;
use super::ports::{Device, GpuAccess, Policy};
use super::residency_fake::{AnyPolicy, Dice, Engine, FakeDevice, FakeHost, Touch};
use super::svm::{Served, Svm, Want};
use super::{Space, SpaceConfig};
use crate::ground::addr::{SZ_4K, SZ_64K, Span};
use crate::observe::observer::Observer;
use crate::space::ports::HostMemory;

const BASE: u64 = 16 << 30;
/// Pages that every thread increments.
const COUNTED: u64 = 48;
/// Pages after these that come and go.
const FLEETING: u64 = 32;
/// How long everything may take.
const WATCHDOG: Duration = Duration::from_secs(60);

struct Party {
    host: Arc<FakeHost>,
    devices: Vec<Arc<FakeDevice>>,
    svm: Arc<Svm>,
    deadline: Instant,
    done: AtomicBool,
    /// Increments done, page by page.
    counts: Vec<AtomicU64>,
}

impl Party {
    fn new(seed: u64, stops: u64) -> Arc<Self> {
        let host = FakeHost::new(seed);
        host.map(Span::sized(BASE, (COUNTED + FLEETING) * SZ_4K));
        host.set_stops(stops);
        let devices: Vec<_> = [24, 20]
            .iter()
            .zip(1..)
            .map(|(pages, n)| FakeDevice::new(host.clone(), *pages, true, seed + n))
            .collect();
        let chunk_sizes = vec![SZ_64K, 4 * SZ_4K, SZ_4K];
        let space = Space::new(SpaceConfig { chunk_sizes, ..SpaceConfig::default() }).unwrap();
        let policy: Arc<dyn Policy> = AnyPolicy::new(seed, 3);
        let ports = devices.iter().map(|d| d.clone() as Arc<dyn Device>).collect();
        let mover = Mover::new(host.clone(), ports, policy, Arc::new(Observer::new()));
        Arc::new(Self {
            host,
            devices,
            svm: Arc::new(Svm::new(space, mover, 0)),
            deadline: Instant::now() + WATCHDOG,
            done: AtomicBool::new(false),
            counts: (0..COUNTED).map(|_| AtomicU64::new(0)).collect(),
        })
    }

    fn page(&self, page: u64) -> u64 {
        BASE + page * SZ_4K
    }

    fn still_waiting(&self, what: &str, addr: u64) {
        assert!(Instant::now() < self.deadline, "{what} of {addr:#x} hangs");
        thread::yield_now();
    }

    /// One access of the CPU, served as often as it must be. `false`: nothing is mapped there.
    fn cpu(&self, addr: u64, change: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        for attempt in 0.. {
            match self.host.change(addr, &change) {
                Touch::Value(value) => return Some(value),
                Touch::Segv => return None,
                Touch::Sigbus => panic!("{addr:#x} is poisoned"),
                Touch::Waits => match self.svm.cpu_fault(addr, attempt % 2 == 0) {
                    Served::Done => {}
                    Served::Retry(_) => self.still_waiting("a CPU access", addr),
                },
            }
        }
        None
    }

    /// One access of device work.
    fn gpu(
        &self,
        device: u32,
        addr: u64,
        access: GpuAccess,
        change: impl Fn(u64) -> Option<u64>,
    ) -> Option<u64> {
        loop {
            let pinned = match self.svm.gpu_access(device, addr, 1, Want::fault(access)) {
                Ok(pinned) => pinned,
                Err(e)
                    if matches!(e.errno(), libc::ENOENT | libc::EFAULT | libc::EPERM)
                        && self.is_fleeting(addr) =>
                {
                    return None;
                }
                Err(e) if matches!(e.errno(), libc::ENOMEM | libc::EBUSY | libc::EAGAIN) => {
                    self.still_waiting("a device access", addr);
                    continue;
                }
                Err(e) => panic!("{access:?} of {addr:#x} by device {device}: {e}"),
            };
            let seen = self.devices[device as usize].engine(addr, &change);
            self.svm.release(device, &pinned);
            match seen {
                Engine::Value(value) => return Some(value),
                Engine::Link(Touch::Waits) => drop(self.svm.cpu_fault(addr, true)),
                Engine::Link(_) if self.is_fleeting(addr) => return None,
                Engine::Link(other) => panic!("{addr:#x} over the link: {other:?}"),
                Engine::Faults => {}
            }
            self.still_waiting("a device access", addr);
        }
    }

    fn is_fleeting(&self, addr: u64) -> bool {
        addr >= self.page(COUNTED)
    }

    fn count(&self, page: u64) {
        self.counts[page as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// A thread of the program: increments pages, here or on a device.
    fn work(&self, seed: u64, rounds: u64) {
        let mut dice = Dice::new(seed);
        for _ in 0..rounds {
            let page = dice.roll(COUNTED);
            let addr = self.page(page);
            let add = |value: u64| Some(value + 1);
            match dice.roll(6) {
                0..3 => assert!(self.cpu(addr, add).is_some()),
                3 => assert!(self.gpu(0, addr, GpuAccess::Write, add).is_some()),
                4 => assert!(self.gpu(1, addr, GpuAccess::Atomic, add).is_some()),
                _ => {
                    let _ = self.gpu(dice.roll(2) as u32, addr, GpuAccess::Read, |_| None);
                    continue;
                }
            }
            self.count(page);
        }
    }

    /// A thread that maps, uses and unmaps memory beside: what it wrote it reads, until it unmaps it.
    fn come_and_go(&self, seed: u64, rounds: u64) {
        let mut dice = Dice::new(seed);
        for round in 1..=rounds {
            let first = COUNTED + dice.roll(FLEETING - 8);
            let span = Span::sized(self.page(first), (1 + dice.roll(8)) * SZ_4K);
            let pages = (span.start..span.end).step_by(SZ_4K as usize);
            for addr in pages.clone() {
                self.cpu(addr, |_| Some(round));
            }
            let device = dice.roll(2) as u32;
            for addr in pages.clone() {
                assert_eq!(self.gpu(device, addr, GpuAccess::Write, |_| Some(round + 1)), Some(round));
            }
            if dice.roll(2) == 0 {
                self.host.unmap(span);
                self.host.map(span);
                self.svm.unmapped(span);
            } else {
                // Between the event and the drop the kernel lets pages move: a known gap, kept shut here.
                self.svm.freeze();
                self.svm.discarded(span, &|| ());
                self.host.zap(span);
                self.svm.thaw();
            }
            for addr in pages {
                assert_eq!(self.cpu(addr, |_| None), Some(0), "after an unmap of {addr:#x}");
            }
        }
    }

    /// A thread that gets in the way of all others.
    fn disturb(&self, seed: u64) {
        let mut dice = Dice::new(seed);
        while !self.done.load(Ordering::Acquire) {
            let first = dice.roll(COUNTED + FLEETING);
            let span =
                Span::sized(self.page(first), (1 + dice.roll(20.min(COUNTED + FLEETING - first))) * SZ_4K);
            match dice.roll(5) {
                0 => drop(self.svm.bring_home(span, crate::observe::stats::Cause::User)),
                1 => self.svm.shrink(dice.roll(8) * SZ_4K),
                2 => drop(self.svm.collect_garbage()),
                3 => self.svm.for_child(&|| (), |_, _, _| {}),
                _ => drop(self.svm.gpu_access(dice.roll(2) as u32, span.start, span.len(), Want::prefetch())),
            }
            thread::yield_now();
        }
    }
}

fn party(seed: u64, stops: u64) {
    let party = Party::new(seed, stops);
    let disturber = {
        let p = party.clone();
        thread::spawn(move || p.disturb(seed + 90))
    };
    let mut threads: Vec<_> = (0..4)
        .map(|n| {
            let p = party.clone();
            thread::spawn(move || p.work(seed * 16 + n, 3000))
        })
        .collect();
    threads.push({
        let p = party.clone();
        thread::spawn(move || p.come_and_go(seed + 50, 1500))
    });
    while !threads.iter().all(|t| t.is_finished()) {
        assert!(Instant::now() < party.deadline + Duration::from_secs(5), "threads hang");
        thread::sleep(Duration::from_millis(5));
    }
    threads.into_iter().for_each(|t| t.join().unwrap());
    party.done.store(true, Ordering::Release);
    disturber.join().unwrap();
    party.host.set_stops(0);
    party.svm.collect_garbage().unwrap();
    for page in 0..COUNTED {
        let want = party.counts[page as usize].load(Ordering::Relaxed);
        assert_eq!(party.cpu(party.page(page), |_| None), Some(want), "increments of page {page}");
    }
    let all = Span::sized(BASE, (COUNTED + FLEETING) * SZ_4K);
    party.host.unmap(all);
    party.svm.unmapped(all);
    party.svm.collect_garbage().unwrap();
    assert!(!party.host.is_registered(Span::sized(BASE, SZ_4K)));
    assert_eq!(party.host.held(), (0, 0, 0), "shadows, pages booked and registered");
    for device in &party.devices {
        assert_eq!(device.vram_free_bytes(), device.info().vram_bytes);
    }
}

#[test]
fn threads_lose_nothing_and_never_hang() {
    (1..=4).for_each(|seed| party(seed, 0));
}

#[test]
fn threads_lose_nothing_where_pages_refuse_to_move() {
    (11..=14).for_each(|seed| party(seed, 12));
}
