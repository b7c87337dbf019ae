//! Engines that work while mappings change under them.

use super::*;

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

/// Every increment survives, whatever moves: the counters are in chunks that wander through device memory,
/// whose old places are zeroed. The copy engine works on other words of the same chunks.
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

/// An engine that takes its TLB millions of times a second still lets those in who change mappings.
#[test]
fn an_engine_at_full_speed_does_not_starve_unbind() {
    let device = without_faults(MIB);
    map_fresh(&device, VA, SZ_64K, GpuAccess::Write);
    let stop = Arc::new(AtomicBool::new(false));
    let steps = Arc::new(Steps::default());
    let kernel = {
        let (stop, steps) = (Arc::clone(&stop), Arc::clone(&steps));
        device.launch(move |gpu| {
            steps.reach(1);
            while !stop.load(Ordering::Relaxed) {
                gpu.fill(VA, SZ_64K, 1)?;
            }
            Ok(())
        })
    };
    steps.await_step(1);
    let mut took = Duration::ZERO;
    for _ in 0..300 {
        // Asleep meanwhile, so that it comes back to an engine in full swing.
        std::thread::sleep(Duration::from_micros(200));
        let start = Instant::now();
        device.unbind(Span::sized(VA + SZ_64K, SZ_4K));
        took += start.elapsed();
    }
    stop.store(true, Ordering::Relaxed);
    finish(&kernel).unwrap();
    assert!(took < Duration::from_secs(5), "300 unbinds took {took:?}");
}
