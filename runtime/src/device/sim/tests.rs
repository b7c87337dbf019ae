//! Whole devices: faults, engines that race with migrations, small BARs, loss.
#![allow(unsafe_code)] // Only to fork.

use super::*;
use crate::ground::addr::{SZ_2M, SZ_64K};
use crate::ground::sync::Event;
use std::sync::atomic::{AtomicU64, AtomicUsize};
use std::sync::{Condvar, OnceLock, Weak};
use std::time::{Duration, Instant};

const VA: u64 = 0x7000_0000_0000;
const MIB: u64 = 1 << 20;

/// Host memory that looks like a shadow.
struct Buffer(Vec<u8>);

impl Buffer {
    fn zeroed(len: u64) -> Self {
        Self(vec![0; len as usize])
    }

    /// Bytes that differ from page to page and from byte to byte.
    fn pattern(len: u64, seed: u64) -> Self {
        Self((0..len).map(|i| ((i ^ (i >> 8) ^ (i >> 16)).wrapping_mul(31) + seed) as u8).collect())
    }

    fn shadow(&mut self) -> Shadow {
        Shadow { span: Span::sized(self.0.as_mut_ptr() as u64, self.0.len() as u64) }
    }
}

fn upload(device: &SimDevice, bo: &Bo, data: &[u8]) {
    let mut host = Buffer(data.to_vec());
    device.upload(bo, &host.shadow(), 0, data.len() as u64).unwrap();
}

fn download(device: &SimDevice, bo: &Bo, len: u64) -> Vec<u8> {
    let mut host = Buffer::zeroed(len);
    device.download(bo, &host.shadow(), 0, len).unwrap();
    host.0
}

type Place = dyn Fn(&SimDevice, u64, GpuAccess) -> Result<()> + Send + Sync;

/// A fault sink that maps on demand, and remembers.
struct Demand {
    device: Weak<SimDevice>,
    place: Box<Place>,
    seen: Mutex<Vec<(u64, u64, GpuAccess)>>,
    served: AtomicUsize,
    done: AtomicUsize,
}

impl Demand {
    fn seen(&self) -> Vec<(u64, u64, GpuAccess)> {
        self.seen.lock().unwrap().clone()
    }

    fn balanced(&self) -> bool {
        self.served.load(Ordering::SeqCst) == self.done.load(Ordering::SeqCst)
    }
}

impl FaultSink for Demand {
    fn gpu_fault(&self, addr: u64, len: u64, access: GpuAccess) -> Result<()> {
        self.seen.lock().unwrap().push((addr, len, access));
        let device = self.device.upgrade().ok_or(Error::NotRunning("the device is gone"))?;
        (self.place)(&device, addr, access)?;
        self.served.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn fault_done(&self) {
        self.done.fetch_add(1, Ordering::SeqCst);
    }
}

fn demand(
    device: &Arc<SimDevice>,
    place: impl Fn(&SimDevice, u64, GpuAccess) -> Result<()> + Send + Sync + 'static,
) -> Arc<Demand> {
    let sink = Arc::new(Demand {
        device: Arc::downgrade(device),
        place: Box::new(place),
        seen: Mutex::default(),
        served: AtomicUsize::new(0),
        done: AtomicUsize::new(0),
    });
    device.set_fault_sink(Arc::clone(&sink) as Arc<dyn FaultSink>);
    sink
}

fn config(bytes: u64) -> SimConfig {
    SimConfig { vram_bytes: bytes, ..SimConfig::default() }
}

fn device(bytes: u64) -> Arc<SimDevice> {
    SimDevice::new(config(bytes)).unwrap()
}

fn without_faults(bytes: u64) -> Arc<SimDevice> {
    SimDevice::new(SimConfig { recoverable_faults: false, ..config(bytes) }).unwrap()
}

/// Waits, but not for ever: a test that hangs says nothing.
fn finish(fence: &Fence) -> Result<()> {
    assert!(fence.wait(Some(Duration::from_secs(30)))?, "the job hangs");
    Ok(())
}

fn run(device: &SimDevice, kernel: impl FnOnce(&mut Gpu<'_>) -> Result<()> + Send + 'static) -> Result<()> {
    finish(&device.launch(kernel))
}

/// A page of fresh memory at `va`.
fn map_fresh(device: &SimDevice, va: u64, len: u64, access: GpuAccess) -> Bo {
    let bo = device.vram_alloc(len).unwrap();
    device.clear(&bo, 0, len).unwrap();
    device.bind(Span::sized(va, len), Backing::Vram(bo.offset), access).unwrap();
    bo
}

#[test]
fn settings_that_make_no_sense_name_the_fix() {
    let message = |c: SimConfig| SimDevice::new(c).unwrap_err().to_string();
    assert!(message(config(0)).contains("set 4 KiB"));
    assert!(message(config(10_000)).contains("set 8192"));
    assert!(message(config(!4095)).contains("or less"));
    let bar = |v| SimConfig { cpu_visible_bytes: Some(v), ..config(MIB) };
    assert!(message(bar(2 * MIB)).contains("set 1048576 or less"));
    assert!(message(bar(5000)).contains("set 4096"));
    assert!(!SimConfig::of(Profile::ARC_A770, MIB).recoverable_faults);
    let info =
        SimDevice::new(SimConfig { cpu_visible_bytes: Some(0), ..config(MIB) }).unwrap().info().clone();
    assert_eq!((info.name.as_str(), info.vram_bytes, info.cpu_visible_bytes), ("sim:generic", MIB, 0));
}

#[test]
fn copies_in_and_out_of_any_part() {
    let device = device(MIB);
    let bo = device.vram_alloc(SZ_64K).unwrap();
    device.clear(&bo, 0, SZ_64K).unwrap();
    assert!(device.is_zero(&bo, 0, SZ_64K));
    let mut host = Buffer::pattern(SZ_64K, 3);
    let want = host.0.clone();
    let shadow = host.shadow();
    device.upload(&bo, &shadow, 5000, 20_000).unwrap();
    assert!(device.is_zero(&bo, 0, 5000) && device.is_zero(&bo, 25_000, SZ_64K - 25_000));
    assert!(!device.is_zero(&bo, 0, 5100));
    assert_eq!(download(&device, &bo, SZ_64K)[5000..25_000], want[5000..25_000]);
    let past_end = device.upload(&bo, &shadow, 1, SZ_64K);
    assert!(matches!(past_end, Err(Error::Invalid { argument: "shadow", .. })));
    let short = Bo { offset: bo.offset, len: 100 };
    assert!(matches!(device.upload(&short, &shadow, 99, 2), Err(Error::Invalid { argument: "bo", .. })));
    let foreign = Bo { offset: MIB, len: SZ_4K };
    assert!(device.clear(&foreign, 0, 1).is_err() && !device.is_zero(&foreign, 0, 1));
}

/// Every way to access memory, against the same done to a plain slice, on pages scattered over device memory.
#[test]
fn kernels_do_to_memory_what_they_would_do_to_a_slice() {
    const LEN: u64 = 300_000;
    let device = device(4 * MIB);
    let sink = demand(&device, |d, addr, access| {
        // Pages alternate in size and lie in no order.
        let size = if (addr / SZ_64K).is_multiple_of(2) { SZ_64K } else { SZ_4K };
        let span = Span::around(addr, size);
        map_fresh(d, span.start, span.len(), access.max(GpuAccess::Write));
        Ok(())
    });
    let base = VA + 1000;
    let result = Arc::new(OnceLock::new());
    let given = Arc::clone(&result);
    let data = Buffer::pattern(LEN, 1).0;
    let source = data.clone();
    run(&device, move |gpu| {
        gpu.write(base, &source)?;
        gpu.update(base + 77, 150_000, |tile, offset| {
            tile.iter_mut().enumerate().for_each(|(i, b)| *b ^= (offset as usize + i) as u8);
        })?;
        gpu.fill(base + 200_000, 70_001, 0xab)?;
        gpu.copy(base + 10, base + 100, 140_000)?;
        gpu.copy(base + 150_100, base + 150_000, 100_000)?;
        let aligned = base.next_multiple_of(8);
        gpu.store_u8(aligned, 1)?;
        gpu.store_u16(aligned + 2, 0x0203)?;
        gpu.store_u32(aligned + 4, 0x0405_0607)?;
        gpu.store_u64(aligned + 8, 0x0809_0a0b_0c0d_0e0f)?;
        assert_eq!(gpu.load_u8(aligned)?, 1);
        assert_eq!(gpu.load_u16(aligned + 2)?, 0x0203);
        assert_eq!(gpu.load_u32(aligned + 4)?, 0x0405_0607);
        assert_eq!(gpu.fetch_add_u32(aligned + 4, 1)?, 0x0405_0607);
        assert_eq!(gpu.fetch_or_u32(aligned + 4, 0xf000_0000)?, 0x0405_0608);
        assert_eq!(gpu.exchange_u32(aligned + 4, 9)?, 0xf405_0608);
        assert_eq!(gpu.compare_exchange_u32(aligned + 4, 8, 1)?, Err(9));
        assert_eq!(gpu.compare_exchange_u32(aligned + 4, 9, 10)?, Ok(9));
        assert_eq!(gpu.fetch_add_u64(aligned + 8, 1)?, 0x0809_0a0b_0c0d_0e0f);
        assert_eq!(gpu.fetch_or_u64(aligned + 8, 1 << 63)?, 0x0809_0a0b_0c0d_0e10);
        assert_eq!(gpu.exchange_u64(aligned + 8, u64::MAX)?, 0x8809_0a0b_0c0d_0e10);
        assert_eq!(gpu.compare_exchange_u64(aligned + 8, u64::MAX, 77)?, Ok(u64::MAX));
        assert_eq!(gpu.load_u64(aligned + 8)?, 77);
        let mut seen = vec![0; LEN as usize];
        gpu.read(base, &mut seen)?;
        let mut tiles = Vec::new();
        gpu.for_each_tile(base, LEN, |tile, offset| {
            assert_eq!(offset, tiles.len() as u64);
            tiles.extend_from_slice(tile);
        })?;
        assert!(tiles == seen, "tiles and bulk reads agree");
        given.set(seen).unwrap();
        Ok(())
    })
    .unwrap();

    let mut want = data;
    want[77..150_077].iter_mut().enumerate().for_each(|(i, b)| *b ^= i as u8);
    want[200_000..270_001].fill(0xab);
    want.copy_within(100..140_100, 10);
    want.copy_within(150_000..250_000, 150_100);
    let aligned = (base.next_multiple_of(8) - base) as usize;
    want[aligned] = 1;
    want[aligned + 2..aligned + 4].copy_from_slice(&0x0203u16.to_ne_bytes());
    want[aligned + 4..aligned + 8].copy_from_slice(&10u32.to_ne_bytes());
    want[aligned + 8..aligned + 16].copy_from_slice(&77u64.to_ne_bytes());
    assert!(result.get().unwrap() == &want);
    assert!(sink.balanced());
    for (addr, len, _) in sink.seen() {
        assert!(len > 0 && addr / SZ_4K == (addr + len - 1) / SZ_4K, "a fault speaks of one page");
    }
}

#[test]
fn addresses_that_make_no_sense_are_errors() {
    let device = device(MIB);
    demand(&device, |d, addr, access| {
        map_fresh(d, Span::around(addr, SZ_4K).start, SZ_4K, access);
        Ok(())
    });
    let outside = |r: Result<()>| assert!(matches!(r, Err(Error::OutsideSpace { .. })), "{r:?}");
    outside(run(&device, |gpu| gpu.fill((1 << 48) - 10, 11, 0)));
    outside(run(&device, |gpu| gpu.read(u64::MAX - 3, &mut [0; 10])));
    outside(run(&device, |gpu| gpu.store_u64(u64::MAX - 7, 0)));
    let unaligned = run(&device, |gpu| gpu.load_u32(VA + 2).map(drop));
    assert!(matches!(unaligned, Err(Error::Invalid { argument: "address", .. })));
    run(&device, |gpu| gpu.fill((1 << 48) - 10, 10, 0)).unwrap();
    run(&device, |gpu| gpu.copy(VA, VA, 0)).unwrap();
}

#[test]
fn without_recoverable_faults_the_job_ends_and_the_next_one_runs() {
    let device = without_faults(MIB);
    let sink = demand(&device, |_, _, _| panic!("nobody may be asked"));
    let bo = map_fresh(&device, VA, SZ_64K, GpuAccess::Read);
    let fault = |addr, access| Err(Error::DeviceFault { addr, access });
    assert_eq!(run(&device, |gpu| gpu.fill(VA + SZ_64K + 8, 4, 1)), fault(VA + SZ_64K + 8, "store"));
    assert_eq!(run(&device, |gpu| gpu.load_u8(0).map(drop)), fault(0, "load"));
    // Mapped, but for reading only.
    assert_eq!(run(&device, |gpu| gpu.store_u32(VA, 1)), fault(VA, "store"));
    assert_eq!(run(&device, |gpu| gpu.fetch_add_u32(VA, 1).map(drop)), fault(VA, "atomic"));
    assert_eq!(run(&device, |gpu| gpu.update(VA, 8, |t, _| t.fill(1))), fault(VA, "store"));
    // A read that runs out of the mapping ends at the first byte outside.
    assert_eq!(run(&device, |gpu| gpu.for_each_tile(VA, 2 * SZ_64K, |_, _| {})), fault(VA + SZ_64K, "load"));
    assert_eq!(finish(&device.copy_async(&[], VA, VA + 8, 8)), fault(VA, "store"));
    assert!(device.is_zero(&bo, 0, SZ_64K), "nothing was written");
    device.bind(Span::sized(VA, SZ_64K), Backing::Vram(bo.offset), GpuAccess::Write).unwrap();
    run(&device, |gpu| gpu.fetch_add_u32(VA, 1).map(drop)).unwrap();
    assert!(sink.seen().is_empty());
    assert_eq!(device.stats().faults, 7);
}

#[test]
fn a_write_to_a_read_only_page_faults_for_write() {
    let device = device(MIB);
    let sink = demand(&device, |d, addr, access| {
        let span = Span::around(addr, SZ_4K);
        d.bind(span, Backing::Vram(SZ_4K), access)
    });
    run(&device, |gpu| {
        gpu.load_u8(VA + 5)?;
        gpu.store_u8(VA + 6, 1)?;
        gpu.fetch_add_u32(VA + 8, 1).map(drop)
    })
    .unwrap();
    assert_eq!(sink.seen(), [(VA + 5, 1, GpuAccess::Read), (VA + 6, 1, GpuAccess::Write)]);
    assert!(sink.balanced());
}

#[test]
fn serving_gives_up_after_a_bounded_number_of_tries() {
    let device = device(MIB);
    let lies = demand(&device, |_, _, _| Ok(()));
    assert_eq!(
        run(&device, |gpu| gpu.load_u8(VA).map(drop)),
        Err(Error::Again { what: "serving a device fault", tries: 64 })
    );
    assert_eq!(lies.seen().len(), 64);
    assert!(lies.balanced(), "each served fault is let go of");

    let busy = demand(&device, |_, _, _| Err(Error::Again { what: "migrating", tries: 3 }));
    assert!(matches!(run(&device, |gpu| gpu.load_u8(VA).map(drop)), Err(Error::Again { tries: 64, .. })));
    assert!(busy.seen().len() == 64 && busy.balanced());

    let refuses = demand(&device, |_, addr, _| Err(Error::NoVma { addr }));
    assert_eq!(run(&device, |gpu| gpu.load_u8(VA + 9).map(drop)), Err(Error::NoVma { addr: VA + 9 }));
    assert!(refuses.seen().len() == 1 && refuses.balanced());

    device.clear_fault_sink();
    let nobody = run(&device, |gpu| gpu.load_u8(VA).map(drop));
    assert_eq!(nobody, Err(Error::DeviceFault { addr: VA, access: "load" }));
}

/// Anonymous pages with an address of their own.
struct Pages(Vec<u8>);

impl Pages {
    fn new(n: u64) -> Self {
        Self(vec![0; ((n + 1) * SZ_4K) as usize])
    }

    fn span(&mut self) -> Span {
        let start = (self.0.as_mut_ptr() as u64).next_multiple_of(SZ_4K);
        Span::sized(start, (self.0.len() as u64 & !(SZ_4K - 1)) - SZ_4K)
    }

    fn bytes(&mut self) -> &mut [u8] {
        let skip = self.span().start - self.0.as_ptr() as u64;
        &mut self.0[skip as usize..]
    }
}

#[test]
fn system_pages_are_read_and_written_in_place() {
    let device = without_faults(MIB);
    let mut pages = Pages::new(40);
    let span = pages.span();
    pages.bytes()[..5].copy_from_slice(b"hello");
    device.bind(span, Backing::System, GpuAccess::Atomic).unwrap();
    run(&device, move |gpu| {
        let mut word = [0; 5];
        gpu.read(span.start, &mut word)?;
        assert_eq!(&word, b"hello");
        gpu.copy(span.start + SZ_64K + 3, span.start, 5)?;
        gpu.store_u32(span.start + 8, 0xdead_beef)?;
        assert_eq!(gpu.load_u32(span.start + 8)?, 0xdead_beef);
        gpu.fill(span.start + 100_000, 50_000, 7)
    })
    .unwrap();
    assert_eq!(&pages.bytes()[SZ_64K as usize + 3..][..5], b"hello");
    assert_eq!(pages.bytes()[8..12], 0xdead_beefu32.to_ne_bytes());
    assert!(pages.bytes()[100_000..150_000].iter().all(|b| *b == 7));
    let at = span.start;
    assert_eq!(
        run(&device, move |gpu| gpu.fetch_add_u32(at, 1).map(drop)),
        Err(Error::DeviceFault { addr: at, access: "atomic" })
    );
    let stats = device.stats();
    assert_eq!((stats.remote_bytes_read, stats.remote_bytes_written), (5 + 5 + 4, 5 + 4 + 50_000));
    assert_eq!((stats.local_bytes_read, stats.local_bytes_written), (0, 0));
}

#[test]
fn atomics_need_device_memory_and_say_so() {
    let device = device(MIB);
    let mut pages = Pages::new(2);
    let span = pages.span();
    let stubborn =
        demand(&device, |d, addr, _| d.bind(Span::around(addr, SZ_4K), Backing::System, GpuAccess::Atomic));
    let at = span.start;
    let refused = run(&device, move |gpu| gpu.fetch_add_u32(at, 1).map(drop));
    assert!(matches!(refused, Err(Error::NotSupported(_))), "{refused:?}");
    assert_eq!(stubborn.seen(), [(at, 4, GpuAccess::Atomic)]);
    assert!(stubborn.balanced());
    pages.bytes()[..4].copy_from_slice(&41u32.to_ne_bytes());

    let migrates = demand(&device, |d, addr, access| {
        let page = Span::around(addr, SZ_4K);
        assert_eq!(access, GpuAccess::Atomic);
        let bo = d.vram_alloc(SZ_4K).unwrap();
        d.upload(&bo, &Shadow { span: page }, 0, SZ_4K)?;
        d.bind(page, Backing::Vram(bo.offset), access)
    });
    run(&device, move |gpu| {
        assert_eq!(gpu.load_u32(at)?, 41, "reading needs no move");
        assert_eq!(gpu.fetch_add_u32(at, 1)?, 41);
        assert_eq!(gpu.load_u32(at)?, 42);
        Ok(())
    })
    .unwrap();
    assert_eq!(migrates.seen().len(), 1);
    assert_eq!(pages.bytes()[..4], 41u32.to_ne_bytes());
}

#[test]
fn system_memory_that_went_away_is_a_fault_then_an_error() {
    // The first page of every process is unmapped.
    let gone = 16 * SZ_4K;
    let device = device(MIB);
    let sink = demand(&device, |d, addr, access| d.bind(Span::around(addr, SZ_4K), Backing::System, access));
    let result = run(&device, move |gpu| gpu.load_u64(gone).map(drop));
    assert_eq!(result, Err(Error::Gone { addr: gone }));
    assert!(sink.seen().len() > 1 && sink.balanced(), "it was asked again before giving up");

    let sink = demand(&device, |d, addr, access| d.bind(Span::around(addr, SZ_4K), Backing::Vram(0), access));
    run(&device, move |gpu| gpu.load_u64(gone).map(drop)).unwrap();
    assert_eq!(sink.seen().len(), 1, "the sink can replace the mapping");

    let hard = without_faults(MIB);
    hard.bind(Span::around(gone, SZ_4K), Backing::System, GpuAccess::Read).unwrap();
    let result = run(&hard, move |gpu| gpu.load_u64(gone).map(drop));
    assert_eq!(result, Err(Error::DeviceFault { addr: gone, access: "load" }));
}

/// Meeting points between a kernel and the test.
#[derive(Default)]
struct Steps(AtomicU64);

impl Steps {
    fn reach(&self, step: u64) {
        self.0.store(step, Ordering::SeqCst);
    }

    fn await_step(&self, step: u64) {
        let start = Instant::now();
        while self.0.load(Ordering::SeqCst) < step {
            assert!(start.elapsed() < Duration::from_secs(30), "step {step} never came");
            std::thread::yield_now();
        }
    }
}

/// The translation is in the engine's TLB when the mapping changes under it, for each size of page.
#[test]
fn a_cached_translation_is_not_used_after_unbind_or_rebind() {
    for size in [SZ_4K, SZ_64K, SZ_2M] {
        let device = without_faults(3 * SZ_2M);
        let span = Span::sized(VA, size);
        let old = map_fresh(&device, VA, size, GpuAccess::Write);
        let new = device.vram_alloc(size).unwrap();
        device.clear(&new, 0, size).unwrap();
        let steps = Arc::new(Steps::default());
        let job = {
            let steps = Arc::clone(&steps);
            device.launch(move |gpu| {
                gpu.store_u64(VA, 1)?;
                steps.reach(1);
                steps.await_step(2);
                gpu.store_u64(VA, 2)?;
                steps.reach(3);
                steps.await_step(4);
                gpu.store_u64(VA + 8, 3)
            })
        };
        steps.await_step(1);
        device.bind(span, Backing::Vram(new.offset), GpuAccess::Write).unwrap();
        steps.reach(2);
        steps.await_step(3);
        let word = |bo| u64::from_ne_bytes(download(&device, bo, 8).try_into().unwrap());
        assert_eq!((word(&old), word(&new)), (1, 2), "the store went to the new place");
        // Unbinding one page of it is enough.
        assert!(device.unbind(Span::sized(VA, SZ_4K)), "it was referenced");
        steps.reach(4);
        assert_eq!(finish(&job), Err(Error::DeviceFault { addr: VA + 8, access: "store" }));
        assert!(device.is_zero(&new, 8, size - 8));
    }
}

/// The copy engine has a TLB of its own.
#[test]
fn the_copy_engine_forgets_too() {
    let device = without_faults(MIB);
    map_fresh(&device, VA, SZ_4K, GpuAccess::Write);
    finish(&device.fill_async(&[], VA, SZ_4K, 1)).unwrap();
    device.unbind(Span::sized(VA, SZ_4K));
    let after = finish(&device.fill_async(&[], VA, SZ_4K, 2));
    assert_eq!(after, Err(Error::DeviceFault { addr: VA, access: "store" }));
}

/// No store lands after unbind returned, and all before it are seen by download.
#[test]
fn unbind_is_final() {
    let device = device(SZ_2M);
    let bo = map_fresh(&device, VA, SZ_64K, GpuAccess::Write);
    let offset = bo.offset;
    let gate = Arc::new((Mutex::new(true), Condvar::new()));
    let opened = Arc::clone(&gate);
    demand(&device, move |d, _, _| {
        let open = opened.1.wait_while(opened.0.lock().unwrap(), |open| !*open).unwrap();
        d.bind(Span::sized(VA, SZ_64K), Backing::Vram(offset), GpuAccess::Write)?;
        drop(open);
        Ok(())
    });
    let stop = Arc::new(AtomicBool::new(false));
    let (told, told_too) = (Arc::clone(&stop), Arc::clone(&stop));
    let kernel = device.launch(move |gpu| {
        let mut n = 0u64;
        while !told.load(Ordering::Relaxed) {
            n += 1;
            gpu.store_u64(VA + n % 512 * 8, n)?;
            gpu.update(VA + SZ_4K, 8192, |tile, _| tile.fill(n as u8))?;
        }
        Ok(())
    });
    let copier = {
        let device = Arc::clone(&device);
        std::thread::spawn(move || {
            while !told_too.load(Ordering::Relaxed) {
                finish(&device.copy_async(&[], VA + 32768, VA, 12288)).unwrap();
            }
        })
    };
    let mut last = 0;
    for _ in 0..300 {
        *gate.0.lock().unwrap() = false;
        device.unbind(Span::sized(VA, SZ_64K));
        let first = download(&device, &bo, SZ_64K);
        std::thread::yield_now();
        assert!(first == download(&device, &bo, SZ_64K), "something was stored after unbind returned");
        let newest =
            first[..4096].chunks(8).map(|w| u64::from_ne_bytes(w.try_into().unwrap())).max().unwrap();
        assert!(newest >= last, "a store that was there is gone");
        last = newest;
        *gate.0.lock().unwrap() = true;
        gate.1.notify_all();
    }
    stop.store(true, Ordering::Relaxed);
    finish(&kernel).unwrap();
    copier.join().unwrap();
    assert!(last > 0);
}

/// Chunks of memory that a thread moves about while two engines work on them, as migration does.
struct Movers {
    /// For each chunk its BO, and how many served faults hold it in place.
    chunks: Vec<Mutex<(Bo, u32)>>,
    held: Mutex<std::collections::HashMap<std::thread::ThreadId, usize>>,
    device: Weak<SimDevice>,
}

impl Movers {
    const CHUNK: u64 = SZ_64K;

    fn span(chunk: usize) -> Span {
        Span::sized(VA + chunk as u64 * Self::CHUNK, Self::CHUNK)
    }

    /// Moves `chunk` elsewhere, unless a fault holds it; says whether it did.
    fn relocate(&self, device: &SimDevice, chunk: usize, host: &mut Buffer) -> bool {
        let mut state = self.chunks[chunk].lock().unwrap();
        if state.1 > 0 {
            return false;
        }
        device.unbind(Self::span(chunk));
        device.download(&state.0, &host.shadow(), 0, Self::CHUNK).unwrap();
        let new = device.vram_alloc(Self::CHUNK).unwrap();
        device.upload(&new, &host.shadow(), 0, Self::CHUNK).unwrap();
        let old = std::mem::replace(&mut state.0, new);
        device.clear(&old, 0, Self::CHUNK).unwrap();
        device.vram_free(old);
        true
    }
}

impl FaultSink for Movers {
    fn gpu_fault(&self, addr: u64, _: u64, access: GpuAccess) -> Result<()> {
        let device = self.device.upgrade().ok_or(Error::NotRunning("gone"))?;
        let chunk = ((addr - VA) / Self::CHUNK) as usize;
        let mut state = self.chunks[chunk].lock().unwrap();
        device.bind(Self::span(chunk), Backing::Vram(state.0.offset), access)?;
        state.1 += 1;
        self.held.lock().unwrap().insert(std::thread::current().id(), chunk);
        Ok(())
    }

    fn fault_done(&self) {
        let chunk = self.held.lock().unwrap().remove(&std::thread::current().id()).unwrap();
        self.chunks[chunk].lock().unwrap().1 -= 1;
    }
}

/// Every increment survives, whatever moves: the counters are in chunks that wander through device memory, whose old
/// places are zeroed. The copy engine works on other words of the same chunks.
#[test]
fn nothing_is_lost_while_memory_moves_under_two_engines() {
    const CHUNKS: usize = 6;
    const MOVES: u64 = 2000;
    let bar = SimConfig { cpu_visible_bytes: Some(256 << 10), ..config(MIB) };
    let device = SimDevice::new(bar).unwrap();
    let fresh = |_| {
        let bo = device.vram_alloc(Movers::CHUNK).unwrap();
        device.clear(&bo, 0, Movers::CHUNK).unwrap();
        Mutex::new((bo, 0))
    };
    let movers = Arc::new(Movers {
        chunks: (0..CHUNKS).map(fresh).collect(),
        held: Mutex::default(),
        device: Arc::downgrade(&device),
    });
    device.set_fault_sink(Arc::clone(&movers) as Arc<dyn FaultSink>);
    let word = |n: u64| VA + (n % CHUNKS as u64) * Movers::CHUNK + (n % 61) * 8;
    let moved = Arc::new(AtomicU64::new(0));
    let total = Arc::new(AtomicU64::new(0));
    let adds = {
        let (moved, total) = (Arc::clone(&moved), Arc::clone(&total));
        device.launch(move |gpu| {
            while moved.load(Ordering::Relaxed) < MOVES {
                let n = total.fetch_add(1, Ordering::Relaxed);
                gpu.fetch_add_u64(word(n), n)?;
            }
            Ok(())
        })
    };
    // The copy engine carries a pattern from chunk to chunk, above the counters.
    let home = VA + 8192;
    let whole = 24_000;
    let pattern = Buffer::pattern(whole, 9).0;
    {
        let pattern = pattern.clone();
        // The compute queue is busy; the copy queue gets its data through the same door as everyone.
        let state = movers.chunks[0].lock().unwrap();
        device.unbind(Movers::span(0));
        let mut host = Buffer(pattern);
        let slice = Bo { offset: state.0.offset + 8192, len: whole };
        device.upload(&slice, &host.shadow(), 0, whole).unwrap();
    }
    std::thread::scope(|s| {
        s.spawn(|| {
            let mut host = Buffer::zeroed(Movers::CHUNK);
            for chunk in (0..CHUNKS).cycle() {
                if adds.is_signaled() {
                    break;
                }
                moved.fetch_add(u64::from(movers.relocate(&device, chunk, &mut host)), Ordering::Relaxed);
            }
        });
        let mut round = 0;
        while !adds.is_signaled() || round < CHUNKS as u64 * 2 {
            let at = |n: u64| home + n % CHUNKS as u64 * Movers::CHUNK;
            finish(&device.copy_async(&[], at(round + 1), at(round), whole)).unwrap();
            finish(&device.fill_async(&[], at(round), whole, 0xee)).unwrap();
            round += 1;
        }
        finish(&device.copy_async(&[], home + 24_576, home + round % CHUNKS as u64 * Movers::CHUNK, whole))
            .unwrap();
    });
    finish(&adds).unwrap();
    let mut want = std::collections::HashMap::new();
    (0..total.load(Ordering::Relaxed)).for_each(|n| *want.entry(word(n)).or_insert(0u64) += n);
    let images: Vec<Vec<u8>> =
        movers.chunks.iter().map(|c| download(&device, &c.lock().unwrap().0, Movers::CHUNK)).collect();
    for (va, sum) in want {
        let (chunk, at) = ((va - VA) / Movers::CHUNK, ((va - VA) % Movers::CHUNK) as usize);
        assert_eq!(images[chunk as usize][at..at + 8], sum.to_ne_bytes(), "the counter at {va:#x}");
    }
    assert!(images[0][8192 + 24_576..][..whole as usize] == pattern[..], "the pattern survived");
    device.clear_fault_sink();
}

#[test]
fn referenced_is_seen_again_after_it_was_taken() {
    let device = without_faults(MIB);
    let span = Span::sized(VA, SZ_64K);
    map_fresh(&device, VA, SZ_64K, GpuAccess::Write);
    assert!(!device.test_and_clear_referenced(span));
    for _ in 0..3 {
        // The second time the translation would still be in the TLB, had the bit been cleared alone.
        run(&device, |gpu| gpu.load_u8(VA + 7).map(drop)).unwrap();
        assert!(device.test_and_clear_referenced(Span::sized(VA, SZ_4K)));
        assert!(!device.test_and_clear_referenced(span));
    }
    assert!(!device.unbind(span));
    device.bind(span, Backing::Vram(0), GpuAccess::Read).unwrap();
    run(&device, |gpu| gpu.load_u8(VA).map(drop)).unwrap();
    assert!(device.unbind(span) && !device.unbind(span));
}

#[test]
fn binding_past_the_end_of_memory_is_refused() {
    let device = device(MIB);
    let bind = |offset, len| device.bind(Span::sized(VA, len), Backing::Vram(offset), GpuAccess::Read);
    assert!(matches!(bind(MIB - SZ_4K, 2 * SZ_4K), Err(Error::Invalid { argument: "backing", .. })));
    assert!(bind(u64::MAX - SZ_4K + 1, SZ_4K).is_err());
    assert!(bind(MIB - SZ_4K, SZ_4K).is_ok());
}

#[test]
fn a_small_bar_hides_memory_from_callers_but_not_from_the_device() {
    let device = SimDevice::new(SimConfig { cpu_visible_bytes: Some(SZ_64K), ..config(4 * SZ_64K) }).unwrap();
    assert_eq!(device.vram_free_visible_bytes(), SZ_64K);
    let visible = device.vram_alloc(SZ_64K).unwrap();
    assert_eq!(visible.offset, 0, "visible memory first");
    let hidden = device.vram_alloc(SZ_64K).unwrap();
    assert!(hidden.offset >= SZ_64K && device.vram_alloc_visible(SZ_4K).is_none());
    for bo in [&visible, &hidden] {
        let jobs = device.stats().submissions;
        device.clear(bo, 0, SZ_64K).unwrap();
        assert!(device.is_zero(bo, 0, SZ_64K));
        let mut host = Buffer::pattern(SZ_64K, 5);
        device.upload(bo, &host.shadow(), 100, 50_000).unwrap();
        assert!(!device.is_zero(bo, 0, SZ_64K));
        assert_eq!(download(&device, bo, SZ_64K)[100..50_100], host.0[100..50_100]);
        let by_engine = device.stats().submissions - jobs;
        assert_eq!(by_engine, if bo.offset == 0 { 0 } else { 5 }, "only hidden memory needs the engine");
        device.bind(Span::sized(VA, SZ_64K), Backing::Vram(bo.offset), GpuAccess::Write).unwrap();
        let want = host.0[100];
        run(&device, move |gpu| {
            assert_eq!(gpu.load_u8(VA + 100)?, want);
            gpu.store_u8(VA + 1, 9)
        })
        .unwrap();
        assert_eq!(download(&device, bo, 2), [0, 9]);
    }
    device.vram_free(visible);
    device.vram_free(hidden);
    // One that lies on both sides.
    let both = device.vram_alloc(4 * SZ_64K).unwrap();
    let data = Buffer::pattern(4 * SZ_64K, 2).0;
    upload(&device, &both, &data);
    assert!(download(&device, &both, 4 * SZ_64K) == data);
    device.clear(&both, SZ_64K - 10, 20).unwrap();
    assert!(device.is_zero(&both, SZ_64K - 10, 20) && !device.is_zero(&both, SZ_64K - 11, 21));
    assert!(!device.is_zero(&both, SZ_64K - 10, 22));
    device.vram_free(both);
    assert_eq!(device.vram_free_bytes(), 4 * SZ_64K);
}

/// A copy-queue job faults, and serving that fault needs a copy into hidden memory: that copy must not queue behind the
/// job that waits for it.
#[test]
fn serving_a_fault_of_the_copy_engine_needs_no_copy_engine() {
    let device = SimDevice::new(SimConfig { cpu_visible_bytes: Some(0), ..config(MIB) }).unwrap();
    let sink = demand(&device, |d, addr, access| {
        let bo = d.vram_alloc(SZ_4K).unwrap();
        upload(d, &bo, &Buffer::pattern(SZ_4K, 4).0);
        d.bind(Span::around(addr, SZ_4K), Backing::Vram(bo.offset), access)
    });
    finish(&device.copy_async(&[], VA + SZ_64K, VA, SZ_4K)).unwrap();
    assert_eq!(sink.seen().len(), 2);
}

#[test]
fn a_freed_bo_of_somebody_else_changes_nothing() {
    let device = device(MIB);
    let bo = device.vram_alloc(100).unwrap();
    let free = device.vram_free_bytes();
    assert_eq!(free, MIB - SZ_4K);
    device.vram_free(Bo { offset: bo.offset + SZ_4K, len: 100 });
    assert_eq!(device.vram_free_bytes(), free);
    assert_eq!(device.vram_largest_free(), MIB / 2);
    device.vram_free(bo);
    assert_eq!(device.vram_free_bytes(), MIB);
}

#[test]
fn a_lost_device_ends_everything_and_nothing_hangs() {
    let device = device(MIB);
    let bo = map_fresh(&device, VA, SZ_4K, GpuAccess::Write);
    let steps = Arc::new(Steps::default());
    let running = {
        let steps = Arc::clone(&steps);
        device.launch(move |gpu| {
            steps.reach(1);
            loop {
                gpu.fetch_add_u32(VA, 1)?;
            }
        })
    };
    let queued = device.launch(|_| Ok(()));
    let never = Event::new();
    let waiting = device.copy_async(&[never.fence()], VA, VA + 8, 8);
    steps.await_step(1);
    device.lose("it fell off the bus");
    device.lose("a later reason");
    let lost = Err(Error::DeviceLost { reason: "it fell off the bus".into() });
    for fence in [&running, &queued, &waiting, &device.launch(|_| Ok(()))] {
        assert_eq!(finish(fence), lost);
    }
    let mut host = Buffer::zeroed(SZ_4K);
    assert_eq!(device.upload(&bo, &host.shadow(), 0, 8), lost);
    assert_eq!(device.download(&bo, &host.shadow(), 0, 8), lost);
    assert_eq!(device.clear(&bo, 0, 8), lost);
    assert_eq!(device.bind(Span::sized(VA, SZ_4K), Backing::System, GpuAccess::Read), lost);
    assert!(!device.is_zero(&bo, 0, 8) && device.vram_alloc(SZ_4K).is_none());
    device.unbind(Span::sized(VA, SZ_4K));
    device.vram_free(bo);
    assert_eq!(device.vram_free_bytes(), MIB);
}

/// A kernel that never looks at memory again finds out at its end.
#[test]
fn a_kernel_that_outlives_its_device_is_told() {
    let device = device(MIB);
    let steps = Arc::new(Steps::default());
    let kernel = {
        let steps = Arc::clone(&steps);
        device.launch(move |_| {
            steps.reach(1);
            steps.await_step(2);
            Ok(())
        })
    };
    steps.await_step(1);
    device.lose("gone");
    steps.reach(2);
    assert_eq!(finish(&kernel), Err(Error::DeviceLost { reason: "gone".into() }));
}

#[test]
fn a_panic_is_that_kernels_error_only() {
    let device = device(MIB);
    let text = |r: Result<()>| r.unwrap_err().to_string();
    assert!(text(run(&device, |_| panic!("on {}", "purpose"))).contains("panicked: on purpose"));
    assert!(text(run(&device, |_| std::panic::panic_any(7))).contains("no message"));
    map_fresh(&device, VA, SZ_4K, GpuAccess::Write);
    assert!(run(&device, |gpu| gpu.update(VA, 8, |_, _| panic!("in a tile"))).is_err());
    run(&device, |gpu| gpu.store_u8(VA, 1)).unwrap();
    device.unbind(Span::sized(VA, SZ_4K));
}

#[test]
fn queues_keep_order_and_wait_for_each_other() {
    let device = device(MIB);
    let bo = map_fresh(&device, VA, SZ_4K, GpuAccess::Write);
    let gate = Event::new();
    let first = device.launch_after(&[gate.fence()], |gpu| gpu.fill(VA, 16, 1));
    let second = device.copy_async(std::slice::from_ref(&first), VA + 16, VA, 16);
    let third = device.launch_after(std::slice::from_ref(&second), |gpu| gpu.fill(VA, 16, 3));
    assert_eq!(third.wait(Some(Duration::from_millis(50))), Ok(false));
    assert!(!first.is_signaled() && !second.is_signaled());
    gate.signal(Ok(()));
    finish(&third).unwrap();
    assert_eq!(download(&device, &bo, 32), [[3; 16], [1; 16]].concat());

    let log = Arc::new(Mutex::new(Vec::new()));
    let fences: Vec<_> = (0..200)
        .map(|n| {
            let log = Arc::clone(&log);
            device.launch(move |_| {
                log.lock().unwrap().push(n);
                Ok(())
            })
        })
        .collect();
    fences.iter().for_each(|f| finish(f).unwrap());
    assert_eq!(*log.lock().unwrap(), (0..200).collect::<Vec<_>>());
}

#[test]
fn work_whose_dependency_failed_does_not_run() {
    let device = device(MIB);
    let ran = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&ran);
    let bad = device.launch(|_| Err(Error::Gone { addr: 1 }));
    let after = device.launch_after(&[Fence::signaled(Ok(())), bad], move |_| {
        told.store(true, Ordering::SeqCst);
        Ok(())
    });
    assert_eq!(finish(&after), Err(Error::Gone { addr: 1 }));
    assert!(!ran.load(Ordering::SeqCst));
}

#[test]
fn dropping_a_device_ends_its_jobs() {
    let device = device(MIB);
    map_fresh(&device, VA, SZ_4K, GpuAccess::Write);
    let steps = Arc::new(Steps::default());
    let told = Arc::clone(&steps);
    let running = device.launch(move |gpu| {
        told.reach(1);
        loop {
            gpu.load_u8(VA)?;
        }
    });
    let queued: Vec<_> = (0..5).map(|_| device.launch(|_| Ok(()))).collect();
    let never = Event::new();
    let waiting = device.copy_async(&[never.fence()], VA, VA, 8);
    steps.await_step(1);
    let start = Instant::now();
    drop(device);
    assert!(start.elapsed() < Duration::from_secs(4), "nobody had to be left behind");
    for fence in queued.iter().chain([&running, &waiting]) {
        assert!(matches!(fence.status(), Some(Err(Error::NotRunning(_)))), "{fence:?}");
    }
}

#[test]
fn a_job_may_drop_the_last_handle() {
    let device = device(MIB);
    let (mine, weak) = (Arc::clone(&device), Arc::downgrade(&device));
    let steps = Arc::new(Steps::default());
    let told = Arc::clone(&steps);
    let fence = device.launch(move |_| {
        told.await_step(1);
        drop(mine);
        Ok(())
    });
    drop(device);
    steps.reach(1);
    finish(&fence).unwrap();
    assert!(weak.upgrade().is_none());
}

#[test]
fn several_devices_know_nothing_of_each_other() {
    let devices = [device(MIB), without_faults(MIB)];
    for (n, d) in devices.iter().enumerate() {
        map_fresh(d, VA, SZ_4K, GpuAccess::Write);
        run(d, move |gpu| gpu.store_u8(VA, n as u8 + 1)).unwrap();
    }
    devices[0].lose("only this one");
    run(&devices[1], |gpu| {
        assert_eq!(gpu.load_u8(VA)?, 2);
        Ok(())
    })
    .unwrap();
}

#[test]
fn statistics_count_what_was_done() {
    let device =
        SimDevice::new(SimConfig { recoverable_faults: true, ..SimConfig::of(Profile::ARC_B580, MIB) })
            .unwrap();
    let sink = demand(&device, |d, addr, access| {
        map_fresh(d, Span::around(addr, SZ_64K).start, SZ_64K, access);
        Ok(())
    });
    run(&device, |gpu| {
        gpu.fill(VA, SZ_64K, 1)?;
        (0..10).try_for_each(|n| gpu.load_u32(VA + n * 4).map(drop))
    })
    .unwrap();
    let bo = Bo { offset: 0, len: SZ_64K };
    download(&device, &bo, 315);
    let s = device.stats();
    assert_eq!((s.local_bytes_written, s.local_bytes_read, s.faults), (SZ_64K, 40, 1));
    assert_eq!((s.tlb_misses, s.walks, s.tlb_hits), (2, 2, 10), "the fault's walk, then its retry");
    assert_eq!((s.bytes_cleared, s.bytes_downloaded, s.bytes_uploaded, s.submissions), (SZ_64K, 315, 0, 1));
    assert_eq!(sink.seen().len(), 1);
    let m = device.modelled();
    assert_eq!((m.download_ns, m.fault_ns, m.submit_ns, m.remote_ns), (20, 26_000, 30_000, 0));
    assert_eq!(m.local_ns, ((SZ_64K + 40) as f64 / 456.0).round() as u64);
}

/// A forked child has neither engines nor device memory, and must not hang or crash because of it.
#[test]
fn a_forked_child_is_refused() {
    let device = device(MIB);
    // SAFETY: the child only submits, drops and exits.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let refused = matches!(device.launch(|_| Ok(())).status(), Some(Err(Error::NotRunning(_))));
        drop(device);
        // SAFETY: ends the child without running anything of the test harness.
        unsafe { libc::_exit(if refused { 0 } else { 1 }) };
    }
    let mut status = -1;
    // SAFETY: waits for the child made above.
    assert_eq!(unsafe { libc::waitpid(child, &mut status, 0) }, child);
    assert_eq!(status, 0);
    run(&device, |_| Ok(())).unwrap();
}
