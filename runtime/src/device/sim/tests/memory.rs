//! Device memory: settings, copies, allocation, small BARs.

use super::*;

#[test]
fn settings_that_make_no_sense_name_the_fix() {
    let message = |c: SimConfig| SimDevice::new(c).unwrap_err().to_string();
    assert!(message(config(0)).contains("set 4 KiB"));
    assert!(message(config(10_000)).contains("set 8192"));
    assert!(message(config(!4095)).contains("or less"));
    let bar = |v| SimConfig { cpu_visible_bytes: Some(v), ..config(MIB) };
    assert!(message(bar(2 * MIB)).contains("set 1048576 or less"));
    assert!(message(bar(5000)).contains("set 4096"));
    let offset = |v| SimConfig { cpu_offset: v, ..config(MIB) };
    assert!(message(offset(17 * SZ_4K + 1)).contains("set 69632"));
    assert!(message(offset(2 * MIB + SZ_4K)).contains("set 4096"));
    assert!(SimDevice::new(offset(17 * SZ_4K)).is_ok());
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

/// A copy-queue job faults, and serving that fault needs a copy into hidden memory: that copy must not queue
/// behind the job that waits for it.
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
    assert_eq!(m.local_ns, ((SZ_64K + 10 * 64) as f64 / 456.0).round() as u64);
}
