//! Whole devices: faults, engines that race with migrations, small BARs, loss.

mod access;
mod life;
mod memory;
mod races;

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
