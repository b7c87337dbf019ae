//! Queues, panics, loss and the end of a device.
#![allow(unsafe_code)] // Only to fork.

use super::*;

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
