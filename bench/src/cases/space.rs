//! The space's bookkeeping, without memory behind it.

use crate::case::{Case, Result, Setup};
use std::hint::black_box;
use std::time::Instant;
use usvm::ground::addr::{SZ_2M, SZ_4K, Span};
use usvm::ground::alloc::internal;
use usvm::space::ports::{AddressSpace, Vma, VmaKind};
use usvm::space::residency::Residency;
use usvm::space::{Ctx, Space, SpaceConfig};

/// Ranges present.
const RANGES: u64 = 1_000_000;
/// Look-ups timed at once: a clock read costs a good part of one.
const BATCH: u64 = 1000;

/// One endless writable anonymous mapping whose pages are never populated, so that chunks of 4 KiB come of it.
struct Endless;

impl AddressSpace for Endless {
    fn find_vma(&self, _addr: u64) -> usvm::Result<Option<Vma>> {
        let span = Span::new(SZ_2M, 1 << 46);
        Ok(Some(Vma { span, read: true, write: true, exec: false, kind: VmaKind::Anonymous }))
    }

    fn populated(&self, _span: Span) -> bool {
        false
    }
}

#[derive(Default)]
struct FindOrInsert {
    made: Option<(Space<Residency>, u64)>,
}

/// What the runtime asks with.
const CTX: Ctx = Ctx {
    read_only: false,
    devmem_possible: true,
    devmem_only: false,
    allow_mixed: false,
    check_pages_threshold: SZ_2M,
    timeslice: std::time::Duration::ZERO,
};

/// A space with all its ranges, in usvm's own memory when called as the runtime calls it.
fn filled() -> Result<Space<Residency>> {
    let space = Space::new(SpaceConfig::default())?;
    for page in 0..RANGES {
        space.find_or_insert(&Endless, SZ_2M + page * SZ_4K, space.config().limits, &CTX)?;
    }
    Ok(space)
}

/// Nanoseconds for one of [`BATCH`] calls.
fn batch(space: &Space<Residency>, seed: &mut u64) -> Result<f64> {
    let mut inserted = Vec::new();
    let begin = Instant::now();
    for call in 0..BATCH {
        *seed ^= *seed << 13;
        *seed ^= *seed >> 7;
        *seed ^= *seed << 17;
        let beyond = if call % 10 == 0 { RANGES } else { 0 };
        let addr = SZ_2M + (*seed % RANGES + beyond) * SZ_4K;
        let range = space.find_or_insert(&Endless, addr, space.config().limits, &CTX)?;
        if beyond > 0 {
            inserted.push(range);
        } else {
            black_box(&range);
        }
    }
    let took = begin.elapsed();
    for range in inserted {
        space.remove(&range);
    }
    Ok(took.as_nanos() as f64 / BATCH as f64)
}

impl Case for FindOrInsert {
    fn name(&self) -> &'static str {
        "find_or_insert_1m_ranges"
    }

    fn about(&self) -> &'static str {
        "find_or_insert among 1,000,000 ranges of 4 KiB, at random; a tenth of the calls insert"
    }

    fn unit(&self) -> &'static str {
        "ns"
    }

    fn baseline(&self) -> Option<&'static str> {
        None
    }

    fn setup(&mut self) -> Result<Setup> {
        let space = internal(filled)?;
        self.made = Some((space, 0x9e37_79b9_7f4a_7c15));
        Ok(Setup::Ready)
    }

    fn sample(&mut self) -> Result<f64> {
        let (space, seed) = self.made.as_mut().ok_or("sampled before setup")?;
        internal(|| batch(space, seed))
    }

    fn baseline_sample(&mut self) -> Result<f64> {
        Err("has no baseline".into())
    }
}

/// The cases.
pub fn all() -> Vec<Box<dyn Case>> {
    vec![Box::new(FindOrInsert::default())]
}
