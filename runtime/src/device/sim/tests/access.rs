//! What kernels may do to memory, and faults.

use super::*;

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
