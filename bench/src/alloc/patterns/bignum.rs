//! cfrac: the continued fraction of a square root with whole numbers that live on the heap, a new block for each result.

use super::super::heap::{Block, Heap};

/// A whole number of 32-bit limbs, lowest first, in a block of its own. The block's last byte is the allocator's mark, so
/// one word more than the limbs is allocated; its first is kept free as well.
struct Whole {
    block: Block,
    limbs: usize,
}

/// Arithmetic on one heap.
#[derive(Clone, Copy)]
struct Maths(Heap);

/// Limbs enough for products of two numbers below the largest modulus here.
const MOST: usize = 12;
type Scratch = [u32; MOST];

impl Whole {
    fn read(&self) -> (Scratch, usize) {
        let mut limbs = [0; MOST];
        let words = self.block.read();
        for (limb, word) in limbs.iter_mut().zip(&words[1..]).take(self.limbs) {
            *limb = *word as u32;
        }
        (limbs, self.limbs)
    }
}

impl Maths {
    fn make(self, limbs: &Scratch) -> Whole {
        let used = MOST - limbs.iter().rev().take_while(|l| **l == 0).count();
        let mut block = self.0.block((used + 2) * 8);
        let words = block.words();
        for (word, limb) in words[1..].iter_mut().zip(limbs).take(used) {
            *word = u64::from(*limb);
        }
        Whole { block, limbs: used }
    }

    fn free(self, number: Whole) {
        self.0.free(number.block);
    }

    fn number(self, value: u64) -> Whole {
        let mut limbs = [0; MOST];
        limbs[0] = value as u32;
        limbs[1] = (value >> 32) as u32;
        self.make(&limbs)
    }

    fn copy(self, a: &Whole) -> Whole {
        self.make(&a.read().0)
    }

    fn add(self, a: &Whole, b: &Whole) -> Whole {
        let ((mut a, _), (b, _)) = (a.read(), b.read());
        let mut carry = 0u64;
        for (x, y) in a.iter_mut().zip(&b) {
            carry += u64::from(*x) + u64::from(*y);
            *x = carry as u32;
            carry >>= 32;
        }
        self.make(&a)
    }

    /// `a - b`, which must not be negative.
    fn sub(self, a: &Whole, b: &Whole) -> Whole {
        let ((mut a, _), (b, _)) = (a.read(), b.read());
        let mut borrow = 0i64;
        for (x, y) in a.iter_mut().zip(&b) {
            borrow += i64::from(*x) - i64::from(*y);
            *x = borrow as u32;
            borrow >>= 32;
        }
        assert!(borrow == 0, "a number became negative");
        self.make(&a)
    }

    fn mul(self, a: &Whole, b: &Whole) -> Whole {
        let ((a, n), (b, m)) = (a.read(), b.read());
        let mut product = [0u32; MOST];
        for i in 0..n {
            let mut carry = 0u64;
            for j in 0..=m {
                carry += u64::from(product[i + j]) + u64::from(a[i]) * u64::from(b[j]);
                product[i + j] = carry as u32;
                carry >>= 32;
            }
        }
        self.make(&product)
    }

    /// Quotient and remainder, bit by bit over what `a` is longer than `b`: quotients are small here.
    fn div(self, a: &Whole, b: &Whole) -> (Whole, Whole) {
        let ((mut rest, n), (b, m)) = (a.read(), b.read());
        let mut quotient = [0u32; MOST];
        let bits = |limbs: &Scratch, used: usize| used * 32 - limbs[used - 1].leading_zeros() as usize;
        if n > 0 && m > 0 {
            for shift in (0..=bits(&rest, n).saturating_sub(bits(&b, m))).rev() {
                let shifted = shift_left(&b, shift);
                if !less(&rest, &shifted) {
                    let mut borrow = 0i64;
                    for (x, y) in rest.iter_mut().zip(&shifted) {
                        borrow += i64::from(*x) - i64::from(*y);
                        *x = borrow as u32;
                        borrow >>= 32;
                    }
                    quotient[shift / 32] |= 1 << (shift % 32);
                }
            }
        }
        (self.make(&quotient), self.make(&rest))
    }

    fn rem(self, a: Whole, b: &Whole) -> Whole {
        let (quotient, rest) = self.div(&a, b);
        self.free(quotient);
        self.free(a);
        rest
    }
}

fn shift_left(limbs: &Scratch, by: usize) -> Scratch {
    let mut out = [0; MOST];
    let (whole, part) = (by / 32, by % 32);
    for i in (whole..MOST).rev() {
        let low = if part > 0 && i > whole { limbs[i - whole - 1] >> (32 - part) } else { 0 };
        out[i] = limbs[i - whole] << part | low;
    }
    out
}

fn less(a: &Scratch, b: &Scratch) -> bool {
    a.iter().rev().lt(b.iter().rev())
}

fn isqrt(n: u128) -> u64 {
    n.isqrt() as u64
}

/// Steps of the continued fraction of the root of a 34-digit number. Every step's numbers satisfy
/// A(k)² ≡ ±Q(k+1) modulo the number, which is checked.
pub fn cfrac(heap: Heap, _: usize) -> u64 {
    const NUMBER: u128 = 9_671_406_556_917_033_397_931_773_049_104_447;
    const STEPS: usize = 60_000;
    let m = Maths(heap);
    let mut limbs = [0; MOST];
    for (i, limb) in limbs.iter_mut().take(4).enumerate() {
        *limb = (NUMBER >> (32 * i)) as u32;
    }
    let number = m.make(&limbs);
    let root = m.number(isqrt(NUMBER));
    // P, Q of the expansion; A is the convergents' numerator modulo the number.
    let (mut p, mut q) = (m.number(0), m.number(1));
    let (mut a_before, mut a) = (m.number(1), m.copy(&root));
    let mut quotient = m.copy(&root);
    let mut sum = 0u64;
    for step in 0..STEPS {
        let product = m.mul(&quotient, &q);
        let p_next = m.sub(&product, &p);
        m.free(product);
        let square = m.mul(&p_next, &p_next);
        let difference = m.sub(&number, &square);
        let (q_next, rest) = m.div(&difference, &q);
        assert!(rest.limbs == 0, "Q divides N - P²");
        [square, difference, rest, std::mem::replace(&mut p, p_next)].into_iter().for_each(|n| m.free(n));
        if step % 16 == 0 {
            check(m, &a, &q_next, &number, step);
        }
        m.free(std::mem::replace(&mut q, q_next));
        let numerator = m.add(&root, &p);
        let (next, rest) = m.div(&numerator, &q);
        [numerator, rest, std::mem::replace(&mut quotient, next)].into_iter().for_each(|n| m.free(n));
        let product = m.mul(&quotient, &a);
        let total = m.add(&product, &a_before);
        m.free(product);
        let a_next = m.rem(total, &number);
        m.free(std::mem::replace(&mut a_before, std::mem::replace(&mut a, a_next)));
        sum = sum.wrapping_mul(31).wrapping_add(u64::from(q.read().0[0]));
    }
    [number, root, p, q, a_before, a, quotient].into_iter().for_each(|n| m.free(n));
    sum
}

fn check(m: Maths, a: &Whole, q: &Whole, number: &Whole, step: usize) {
    let square = m.mul(a, a);
    let left = m.rem(square, number);
    let copy = m.copy(q);
    let mut right = m.rem(copy, number);
    if step.is_multiple_of(2) {
        let negative = m.sub(number, &right);
        m.free(std::mem::replace(&mut right, negative));
    }
    assert!(left.read() == right.read(), "A² is not ±Q modulo N");
    m.free(left);
    m.free(right);
}
