//! `triad_2m`: STREAM's triad, `a[i] = b[i] + s * c[i]`, 2 MiB of each array at a time: what plain code gets out of
//! memory here.

use super::time;
use crate::memory::{COUNT, SLOT};
use std::hint::black_box;

/// Elements in 2 MiB.
const STEP: usize = SLOT / size_of::<f64>();

/// The baseline.
#[derive(Debug)]
pub struct Triad2m {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
    next: usize,
}

impl Triad2m {
    /// Its name.
    pub const NAME: &'static str = "triad_2m";

    /// Three arrays, warm.
    pub fn new() -> Self {
        let array = |value| vec![value; COUNT * STEP];
        Self { a: array(1.0), b: array(2.0), c: array(3.0), next: 0 }
    }

    /// One step; microseconds.
    pub fn sample(&mut self) -> f64 {
        self.next = (self.next + 1) % COUNT;
        let part = self.next * STEP..(self.next + 1) * STEP;
        let (a, b, c) = (&mut self.a[part.clone()], &self.b[part.clone()], &self.c[part]);
        let scale = black_box(3.0);
        time(|| {
            for ((a, b), c) in a.iter_mut().zip(b).zip(c) {
                *a = b + scale * c;
            }
            black_box(a);
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_computes() {
        let mut triad = Triad2m::new();
        triad.sample();
        assert!(triad.a[STEP..2 * STEP].iter().all(|&x| x == 11.0));
        assert!(triad.a[..STEP].iter().all(|&x| x == 1.0), "only its step");
    }
}
