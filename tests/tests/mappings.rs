//! The program changes mappings of memory that is, was, or never was on the device: whole and in part. Each case keeps
//! an independent copy of what must be where, and looks with both eyes.

use usvm::Runtime;
use usvm_tests::area::*;
use usvm_tests::isolated::isolated;
use usvm_tests::isolated::kernel_faults;

#[global_allocator]
static ALLOC: usvm::Routed<std::alloc::System> = usvm::Routed(std::alloc::System);

/// Sizes of a range, and whether it is made of a huge page.
const SHAPES: [(u64, bool); 4] = [(M2, true), (M2, false), (K64, false), (K4, false)];

/// Where the memory is when the call is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum When {
    /// The device never used it.
    Before,
    /// On the device, changed there.
    Away,
    /// Back from the device.
    Back,
    /// On the device after a page of it was back.
    AwayAgain,
}

/// One case: an area, what is in it, and the part that the call is about.
struct Case<'a> {
    rt: &'a Runtime,
    area: Area,
    piece: Piece,
    /// Offset and length.
    part: (u64, u64),
    rng: Rng,
    what: String,
}

impl Case<'_> {
    fn part_at(&self) -> u64 {
        self.area.at + self.part.0
    }

    /// What is before the part, in it, behind it.
    fn cut(&self) -> [Piece; 3] {
        let (from, to) = (self.part.0 as usize, (self.part.0 + self.part.1) as usize);
        let piece = |a: usize, b: usize| Piece {
            at: self.area.at + a as u64,
            bytes: self.piece.bytes[a..b].to_vec(),
        };
        [piece(0, from), piece(from, to), piece(to, self.piece.bytes.len())]
    }

    /// The device must not get at `[at, at + len)`.
    fn gone(&self, at: u64, len: u64) {
        for probe in [at, at + len - 1] {
            let seen = device_read(self.rt, probe, 1);
            assert!(seen.is_err(), "{}: the device still sees {probe:#x}: {seen:?}", self.what);
        }
    }

    fn check(&self, mut pieces: Vec<Piece>) {
        pieces.iter_mut().for_each(|p| p.check(self.rt, &self.what));
    }
}

fn parts(len: u64) -> Vec<(u64, u64)> {
    match len {
        K4 => vec![(0, K4)],
        _ => vec![(0, len), (0, len / 4), (len / 4, len / 2), (len - len / 4, len / 4)],
    }
}

/// Runs `f` on every shape, part and time.
fn every_case(name: &'static str, f: impl Fn(&Case<'_>)) {
    isolated(name, || {
        let rt = runtime(64 << 20);
        let mut seed = 1;
        for (len, huge) in SHAPES {
            for part in parts(len) {
                for when in [When::Before, When::Away, When::Back, When::AwayAgain] {
                    seed += 1;
                    let case = prepare(&rt, len, huge, part, when, seed);
                    f(&case);
                }
            }
        }
        rt.shutdown();
    });
}

fn prepare(rt: &Runtime, len: u64, huge: bool, part: (u64, u64), when: When, seed: u64) -> Case<'_> {
    let mut rng = Rng::new(seed);
    let (area, mut piece) = Area::filled(len, huge, &mut rng);
    let what = format!("{len:#x} huge {huge} part {part:x?} {when:?}");
    if when != When::Before {
        piece.change(rt, &what);
        // A page that was busy for a moment makes a range stay where it is; asked again, it goes.
        let asked = (0..20).map(|_| {
            rt.prefetch(area.at, len, usvm::Location::Device(0)).wait(None).unwrap();
            rt.residence(area.at, len).unwrap().device
        });
        assert!(asked.into_iter().any(|device| device == len), "{what}: all of it is on the device");
    }
    if matches!(when, When::Back | When::AwayAgain) {
        assert_eq!(cpu_peek(area.at + len / 2), piece.bytes[len as usize / 2]);
    }
    if when == When::AwayAgain {
        piece.change(rt, &what);
    }
    Case { rt, area, piece, part, rng, what }
}

#[test]
fn munmap() {
    every_case("munmap", |case| {
        let [before, _, behind] = case.cut();
        unmap(case.part_at(), case.part.1);
        case.gone(case.part_at(), case.part.1);
        case.check(vec![before, behind]);
        case.gone(case.part_at(), case.part.1);
    });
}

#[test]
fn a_new_mapping_at_an_old_address() {
    every_case("a_new_mapping_at_an_old_address", |case| {
        let [before, mut part, behind] = case.cut();
        unmap(case.part_at(), case.part.1);
        map(Some(part.at), part.len(), RW).unwrap();
        // The first page stays untouched: the device must see zeroes there.
        part.bytes.fill(0);
        let fresh = case.rng.clone().bytes(part.len());
        let skip = K4 as usize;
        if part.bytes.len() > skip {
            part.bytes[skip..].copy_from_slice(&fresh[skip..]);
            cpu_write(part.at + K4, &fresh[skip..]);
        }
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn a_mapping_over_another() {
    every_case("a_mapping_over_another", |case| {
        let [before, mut part, behind] = case.cut();
        map(Some(part.at), part.len(), RW).unwrap();
        part.bytes.fill(0);
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn mremap_moves() {
    every_case("mremap_moves", |case| {
        let [before, mut part, behind] = case.cut();
        let target = Area::new(part.len());
        let old = part.at;
        part.at = remap(old, part.len(), part.len(), 0, Some(target.at)).unwrap();
        case.gone(old, part.len());
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn mremap_onto_memory_of_the_device() {
    every_case("mremap_onto_memory_of_the_device", |case| {
        let [before, mut part, behind] = case.cut();
        let (target, mut there) = Area::filled(2 * case.area.len, false, &mut case.rng.clone());
        there.change(case.rt, &case.what);
        let old = part.at;
        // Into the middle of the other: its halves on both sides must live.
        let at = (there.len() - part.len()) / 2 / K4 * K4;
        remap(old, part.len(), part.len(), 0, Some(target.at + at)).unwrap();
        let (from, to) = (at as usize, (at + part.len()) as usize);
        let left = Piece { at: target.at, bytes: there.bytes[..from].to_vec() };
        let right = Piece { at: target.at + to as u64, bytes: there.bytes[to..].to_vec() };
        part.at = target.at + at;
        case.gone(old, part.len());
        case.check(vec![left, part, right, before, behind]);
    });
}

#[test]
fn mremap_dontunmap() {
    every_case("mremap_dontunmap", |case| {
        let [before, mut part, behind] = case.cut();
        let target = Area::new(part.len());
        let old = part.at;
        part.at = remap(old, part.len(), part.len(), libc::MREMAP_DONTUNMAP, Some(target.at)).unwrap();
        let empty = Piece { at: old, bytes: vec![0; part.bytes.len()] };
        case.check(vec![empty, part, before, behind]);
    });
}

#[test]
fn mremap_grows_by_moving() {
    every_case("mremap_grows_by_moving", |case| {
        let [before, mut part, behind] = case.cut();
        let old = part.at;
        let target = Area::new(2 * part.len());
        part.at = remap(old, part.len(), 2 * part.len(), 0, Some(target.at)).unwrap();
        part.bytes.resize(2 * part.bytes.len(), 0);
        case.gone(old, part.len() / 2);
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn mremap_grows_in_place() {
    every_case("mremap_grows_in_place", |case| {
        if case.part.0 + case.part.1 != case.area.len {
            return;
        }
        let (room, len) = case.area.make_room_behind();
        let [before, mut part, _] = case.cut();
        let more = case.area.len.min(part.len());
        match remap(part.at, part.len(), part.len() + more, 0, None) {
            Ok(at) => assert_eq!(at, part.at),
            // Another thread took the room.
            Err(_) => return,
        }
        part.bytes.resize((part.len() + more) as usize, 0);
        case.check(vec![part, before]);
        unmap(room, len);
    });
}

#[test]
fn mremap_shrinks() {
    every_case("mremap_shrinks", |case| {
        let [before, mut part, behind] = case.cut();
        if part.len() < 2 * K4 {
            return;
        }
        let half = part.len() / 2;
        remap(part.at, part.len(), half, 0, None).unwrap();
        case.gone(part.at + half, half);
        part.bytes.truncate(half as usize);
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn madvise_dontneed() {
    every_case("madvise_dontneed", |case| {
        let [before, mut part, behind] = case.cut();
        advise(part.at, part.len(), libc::MADV_DONTNEED).unwrap();
        part.bytes.fill(0);
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn madvise_free() {
    every_case("madvise_free", |case| {
        let [before, mut part, behind] = case.cut();
        advise(part.at, part.len(), libc::MADV_FREE).unwrap();
        // Each page is as it was or zero, and both sides agree on which.
        let seen = device_read(case.rt, part.at, part.len()).unwrap();
        for (now, was) in seen.chunks(K4 as usize).zip(part.bytes.chunks(K4 as usize)) {
            assert!(now == was || now.iter().all(|b| *b == 0), "{}: foreign contents", case.what);
        }
        // Written pages stay; then contents are certain.
        part.bytes = case.rng.clone().bytes(part.len());
        cpu_write(part.at, &part.bytes);
        case.check(vec![part, before, behind]);
    });
}

/// Advice that leaves the contents alone, and what the kernel answers where that is known.
fn keeps_contents(name: &'static str, advices: &'static [i32]) {
    every_case(name, move |case| {
        for advice in advices {
            let answer = advise(case.part_at(), case.part.1, *advice).map_err(|e| e.raw_os_error().unwrap());
            match *advice {
                // Private memory has nothing to punch a hole into.
                libc::MADV_REMOVE => assert_eq!(answer, Err(libc::EINVAL), "{}", case.what),
                // Needs a whole huge page, memory for it, and pages that do not wait for userfaultfd.
                libc::MADV_COLLAPSE => {}
                // Unknown before 5.14; refused for what is under userfaultfd by some.
                libc::MADV_POPULATE_READ | libc::MADV_POPULATE_WRITE => {}
                advice => assert_eq!(answer, Ok(()), "{} advice {advice}", case.what),
            }
            let mut all = case.piece.clone();
            all.check(case.rt, &format!("{} advice {advice}", case.what));
            // An even number of changes: the copy in the case stays true.
            device_xor(case.rt, all.at, all.len(), 0x5a).unwrap();
            let middle = all.bytes.len() / 2;
            cpu_write(all.at + middle as u64, &case.piece.bytes[middle..=middle]);
        }
    });
}

#[test]
fn madvise_remove_is_refused() {
    keeps_contents("madvise_remove_is_refused", &[libc::MADV_REMOVE]);
}

#[test]
fn madvise_hugepage_and_back() {
    keeps_contents("madvise_hugepage_and_back", &[libc::MADV_HUGEPAGE, libc::MADV_NOHUGEPAGE]);
}

#[test]
fn madvise_collapse() {
    keeps_contents("madvise_collapse", &[libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE]);
}

#[test]
fn madvise_fork_flags() {
    keeps_contents(
        "madvise_fork_flags",
        &[libc::MADV_DONTFORK, libc::MADV_DOFORK, libc::MADV_WIPEONFORK, libc::MADV_KEEPONFORK],
    );
}

#[test]
fn madvise_reclaim_and_populate() {
    keeps_contents(
        "madvise_reclaim_and_populate",
        &[libc::MADV_COLD, libc::MADV_PAGEOUT, libc::MADV_POPULATE_READ, libc::MADV_POPULATE_WRITE],
    );
}

#[test]
fn mprotect_none_and_back() {
    every_case("mprotect_none_and_back", |case| {
        let [mut before, _, mut behind] = case.cut();
        protect(case.part_at(), case.part.1, libc::PROT_NONE);
        if case.what.contains("Before") {
            case.gone(case.part_at(), case.part.1);
        }
        before.check(case.rt, &case.what);
        behind.check(case.rt, &case.what);
        protect(case.part_at(), case.part.1, RW);
        let [_, part, _] = case.cut();
        case.check(vec![part, before, behind]);
    });
}

#[test]
fn mprotect_read_and_back() {
    every_case("mprotect_read_and_back", |case| {
        let [before, part, behind] = case.cut();
        protect(part.at, part.len(), libc::PROT_READ);
        let seen = device_read(case.rt, part.at, part.len()).unwrap();
        same(&seen, &part.bytes, format_args!("{}: read-only, device", case.what));
        same(&cpu_read(part.at, part.len()), &part.bytes, format_args!("{}: read-only, CPU", case.what));
        let refused = device_xor(case.rt, part.at, part.len(), 1);
        assert!(refused.is_err(), "{}: the device writes read-only memory", case.what);
        let seen = device_read(case.rt, part.at, part.len()).unwrap();
        same(&seen, &part.bytes, format_args!("{}: read-only again, device", case.what));
        protect(part.at, part.len(), RW);
        case.check(vec![part, before, behind]);
    });
}

/// [`protect`], told to usvm.
fn protect_told(rt: &Runtime, at: u64, len: u64, prot: i32) {
    protect(at, len, prot);
    rt.protection_changed(at, len).unwrap();
}

/// The device has the whole case mapped for writing when its part loses rights; nobody looks at it from the CPU.
fn loses_rights(case: &Case<'_>) {
    let [mut before, mut part, mut behind] = case.cut();
    for piece in [&mut before, &mut part, &mut behind].into_iter().filter(|p| !p.is_empty()) {
        device_xor(case.rt, piece.at, piece.len(), 0x5a).unwrap();
        xor(&mut piece.bytes, 0x5a);
    }
    let (first, last) = (part.at, part.at + part.len() - 1);
    protect_told(case.rt, part.at, part.len(), libc::PROT_READ);
    for at in [last, first] {
        let refused = device_xor(case.rt, at, 1, 1);
        assert!(refused.is_err(), "{}: the device writes read-only memory at {at:#x}", case.what);
    }
    // The neighbours' mapping must not bring the right back.
    for piece in [&mut before, &mut behind].into_iter().filter(|p| !p.is_empty()) {
        device_xor(case.rt, piece.at, piece.len(), 0x33).unwrap();
        xor(&mut piece.bytes, 0x33);
        assert!(device_xor(case.rt, last, 1, 1).is_err(), "{}: writable by its neighbour", case.what);
    }
    let seen = device_read(case.rt, part.at, part.len()).unwrap();
    same(&seen, &part.bytes, format_args!("{}: read-only, device", case.what));
    protect_told(case.rt, part.at, part.len(), libc::PROT_NONE);
    case.gone(part.at, part.len());
    before.check(case.rt, &case.what);
    behind.check(case.rt, &case.what);
    case.gone(part.at, part.len());
    protect_told(case.rt, part.at, part.len(), RW);
    case.check(vec![part, before, behind]);
}

#[test]
fn mprotect_takes_rights_from_the_device_at_once() {
    every_case("mprotect_takes_rights_from_the_device_at_once", loses_rights);
}

#[test]
fn mprotect_takes_rights_over_the_link_at_once() {
    every_case("mprotect_takes_rights_over_the_link_at_once", |case| {
        case.rt.set_policy("remote").unwrap();
        loses_rights(case);
    });
}

#[test]
fn mprotect_exec() {
    every_case("mprotect_exec", |case| {
        let [before, part, behind] = case.cut();
        protect(part.at, part.len(), RW | libc::PROT_EXEC);
        let mut pieces = vec![part, before, behind];
        pieces.iter_mut().for_each(|p| p.check(case.rt, &case.what));
        protect(case.part_at(), case.part.1, RW);
        case.check(pieces);
    });
}

#[test]
fn mlock_and_munlock() {
    if !kernel_faults() {
        return;
    }
    every_case("mlock_and_munlock", |case| {
        let mut pieces = case.cut().to_vec();
        let (at, len) = (case.part_at() as *const libc::c_void, case.part.1 as usize);
        // SAFETY: locks memory of the case.
        assert_eq!(unsafe { libc::mlock(at, len) }, 0, "{}", std::io::Error::last_os_error());
        pieces.iter_mut().for_each(|p| p.check(case.rt, &format!("{} locked", case.what)));
        // SAFETY: as above.
        assert_eq!(unsafe { libc::munlock(at, len) }, 0);
        case.check(pieces);
    });
}
