//! What a workload is.

use usvm::device::sim::Gpu;
use usvm::{Access, GpuAccess, Runtime};

/// Makes a workload that uses about so many bytes.
pub type Make = fn(u64) -> Box<dyn Workload>;

/// Work that processor and device share.
pub trait Workload {
    /// Its name, unique and stable.
    fn name(&self) -> &'static str;

    /// What it does, in one line.
    fn about(&self) -> &'static str;

    /// Bytes that the device uses of it, in all.
    fn footprint(&self) -> u64;

    /// Makes everything as it was before the first run.
    fn reset(&mut self);

    /// Does it, on device 0 and here.
    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()>;

    /// Whether the last run's result is the one that the processor alone computes.
    fn is_right(&self) -> bool;

    /// Makes one word of the result wrong, for a test of [`Workload::is_right`].
    #[cfg(test)]
    fn spoil(&mut self);
}

/// Runs `kernel` on device 0, which uses `arrays`, and waits for it.
pub fn launch(
    runtime: &Runtime,
    arrays: &[Array],
    kernel: impl FnOnce(&mut Gpu<'_>) -> usvm::Result<()> + Send + 'static,
) -> usvm::Result<()> {
    let fence = if runtime.devices()[0].recoverable_faults {
        runtime.launch(0, kernel)
    } else {
        let accesses: Vec<Access> =
            arrays.iter().map(|a| Access { addr: a.at, len: a.len, access: GpuAccess::Write }).collect();
        runtime.launch_with(0, &accesses, kernel)
    };
    fence.wait(None).map(|_| ())
}

/// Where an array of the program is: what a kernel is told.
#[derive(Debug, Clone, Copy)]
pub struct Array {
    /// Its address, for processor and device.
    pub at: u64,
    /// Its bytes.
    pub len: u64,
}

impl Array {
    /// Of a slice that the device may change.
    pub fn of<T>(slice: &mut [T]) -> Self {
        Self { at: slice.as_mut_ptr().expose_provenance() as u64, len: size_of_val(slice) as u64 }
    }

    /// The address of element `index`, each of `size` bytes.
    pub fn place(self, index: u64, size: u64) -> u64 {
        self.at + index * size
    }
}

/// Numbers without a pattern (splitmix64).
#[derive(Debug, Clone)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One below `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

/// Plain numbers, as a kernel reads and writes them: bytes of device memory.
pub trait Number: Copy + Default {
    /// From its bytes.
    fn from_bytes(bytes: &[u8]) -> Self;
    /// Puts its bytes to `to`.
    fn put(self, to: &mut [u8]);
}

macro_rules! numbers {
    ($($ty:ident)*) => {$(
        impl Number for $ty {
            fn from_bytes(bytes: &[u8]) -> Self {
                let mut own = [0; size_of::<$ty>()];
                own.copy_from_slice(bytes);
                Self::from_ne_bytes(own)
            }

            fn put(self, to: &mut [u8]) {
                to.copy_from_slice(&self.to_ne_bytes());
            }
        }
    )*};
}

numbers!(u32 u64 f32 f64);

/// Loads numbers from `at` on, as many as `to` holds.
pub fn load<T: Number>(gpu: &mut Gpu<'_>, at: u64, to: &mut [T]) -> usvm::Result<()> {
    let mut bytes = vec![0; size_of_val(to)];
    gpu.read(at, &mut bytes)?;
    to.iter_mut().zip(bytes.chunks_exact(size_of::<T>())).for_each(|(n, b)| *n = T::from_bytes(b));
    Ok(())
}

/// Stores numbers from `at` on.
pub fn store<T: Number>(gpu: &mut Gpu<'_>, at: u64, from: &[T]) -> usvm::Result<()> {
    let mut bytes = vec![0; size_of_val(from)];
    from.iter().zip(bytes.chunks_exact_mut(size_of::<T>())).for_each(|(n, b)| n.put(b));
    gpu.write(at, &bytes)
}
