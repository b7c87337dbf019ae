//! Threads that count while the memory under them flips: no increment may be lost.

use super::*;
use crate::space::ports::{FlipError, Shadow};
use std::sync::atomic::AtomicU64;
use std::sync::{Mutex, mpsc};
use std::time::Instant;

/// Where the pages are, and the slot they wait in.
struct Place {
    app: Span,
    shadow: Shadow,
    out: PageMask,
}

impl Place {
    fn bring_back(&mut self, host: &Host) {
        while !self.out.is_empty() {
            match host.flip_in(self.app, &self.shadow, &self.out) {
                Ok(()) => self.out = PageMask::EMPTY,
                Err(stop) => {
                    assert_eq!(stop.why, FlipError::Again, "moved {:?} of {:?}", stop.moved, self.out);
                    self.out = self.out.minus(&stop.moved);
                    std::thread::yield_now();
                }
            }
        }
    }

    fn send_out(&mut self, host: &Host) {
        match host.flip_out(self.app, &self.shadow, &PageMask::first(self.app.pages())) {
            Ok(moved) => self.out = self.out.or(&moved),
            Err(stop) => {
                assert_eq!(stop.why, FlipError::Again);
                self.out = self.out.or(&stop.moved);
            }
        }
    }
}

/// Two threads add to words of all pages of `area` while it flips for `time`; gives how often it went out.
fn count_under_flips(area: &Area, host: Host, time: Duration) -> u64 {
    let host = Arc::new(host);
    host.register(area.span).unwrap();
    let shadow = host.shadow_alloc(area.span.len()).unwrap();
    let place = Arc::new(Mutex::new(Place { app: area.span, shadow, out: PageMask::EMPTY }));
    // Reader and server are two threads: a flip may wait for its own event to be read (no UFFDIO_MOVE).
    let (faults, queue) = mpsc::channel::<u64>();
    let reader = Reader::start(&host, move |host, message| match message {
        Message::Fault { addr, .. } => faults.send(addr).unwrap(),
        Message::Remap { from, to, .. } => assert!(host.is_own_remap(from, to)),
        other => panic!("{other:?}"),
    });
    let (served, on) = (Arc::clone(&place), Arc::clone(&host));
    let server = std::thread::spawn(move || {
        for addr in queue {
            let mut place = served.lock().unwrap();
            if place.out.is_empty() { on.wake(Span::around(addr, SZ_4K)) } else { place.bring_back(&on) }
        }
    });
    let stop = Arc::new(AtomicBool::new(false));
    let counters = [0u64, 8].map(|word| {
        let (stop, span) = (Arc::clone(&stop), area.span);
        std::thread::spawn(move || {
            let mut rounds = 0u64;
            while !stop.load(Ordering::Relaxed) {
                for page in 0..span.pages() as u64 {
                    let at = span.start + page * SZ_4K + 64 + word;
                    // SAFETY: a word of the test's memory that only this thread touches.
                    let word =
                        unsafe { AtomicU64::from_ptr(std::ptr::with_exposed_provenance_mut(at as usize)) };
                    // A plain load and store: a page copied in between would lose it.
                    word.store(word.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                }
                rounds += 1;
            }
            rounds
        })
    });
    let (start, mut flips) = (Instant::now(), 0u64);
    while start.elapsed() < time {
        {
            let mut place = place.lock().unwrap();
            if place.out.is_empty() {
                place.send_out(&host);
                flips += u64::from(!place.out.is_empty());
            }
            // Mostly bring it back at once; every so often wait for a thread to miss it.
            if flips % 64 != 0 {
                place.bring_back(&host);
            }
        }
        if flips % 64 == 0 {
            std::thread::sleep(Duration::from_micros(100));
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rounds = counters.map(|c| c.join().unwrap());
    place.lock().unwrap().bring_back(&host);
    drop(reader);
    server.join().unwrap();
    for page in 0..area.span.pages() as u64 {
        let at = area.span.start + page * SZ_4K + 64;
        assert_eq!([get(at), get(at + 8)], rounds, "page {page}");
    }
    println!("{flips} flips, {rounds:?} rounds");
    flips
}

const TIME: Duration = Duration::from_millis(1500);

#[test]
fn no_count_is_lost_on_a_huge_page() {
    let _t = together();
    let area = Area::huge();
    put(area.span.start, 0);
    assert!(count_under_flips(&area, host(), TIME) > 1000);
}

#[test]
fn no_count_is_lost_on_small_pages() {
    let _t = together();
    let area = Area::small(64 * SZ_4K);
    assert!(count_under_flips(&area, host(), TIME) > 1000);
}

#[test]
fn no_count_is_lost_without_move() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    assert!(count_under_flips(&area, without(Features::MOVE), TIME) > 30);
}

#[test]
fn mappings_that_come_and_go_are_never_robbed() {
    let _t = together();
    let area = Area::small(16 * SZ_4K);
    let host = Arc::new(host());
    let reader = Reader::ordinary(&host);
    let span = area.span;
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = Arc::clone(&stop);
    // Maps anew, writes, checks: what it finds must be its own or, on registered memory, still its own.
    let mapper = std::thread::spawn(move || {
        let mut rounds = 0u64;
        while !stopped.load(Ordering::Relaxed) {
            // SAFETY: the test's own memory.
            unsafe { sys::map_fresh_at(span) }.unwrap();
            fill(span);
            verify(span);
            verify(span);
            rounds += 1;
        }
        rounds
    });
    let shadow = host.shadow_alloc(span.len()).unwrap();
    let start = Instant::now();
    let mut taken = 0;
    while start.elapsed() < TIME {
        // Never registered by this loop after the first time: nothing may move.
        let moved = host.flip_out(span, &shadow, &all(span)).unwrap_or_else(|stop| stop.moved);
        taken += moved.count();
    }
    stop.store(true, Ordering::Relaxed);
    assert!(mapper.join().unwrap() > 100);
    assert_eq!(taken, 0);
    drop(reader);
}
