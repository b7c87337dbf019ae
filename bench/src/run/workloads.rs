//! The workloads: access patterns that the literature on unified memory compares policies with, each written anew.

use usvm::Runtime;

use super::workload::{Array, Make, Random, Workload, launch, load, store};

/// All of them.
pub const ALL: [Make; 8] = [
    |bytes| Box::new(Triad::new(bytes)),
    |bytes| Box::new(Stencil::new(bytes)),
    |bytes| Box::new(Updates::new(bytes)),
    |bytes| Box::new(Graph::new(bytes)),
    |bytes| Box::new(Clusters::new(bytes)),
    |bytes| Box::new(Product::new(bytes)),
    |bytes| Box::new(List::new(bytes)),
    |bytes| Box::new(Edits::new(bytes)),
];

/// Elements that a kernel handles at a time.
const TILE: usize = 8192;

/// STREAM's triad: three arrays from front to back, nothing twice.
struct Triad {
    a: Vec<f64>,
    b: Vec<f64>,
    c: Vec<f64>,
}

impl Triad {
    const FACTOR: f64 = 3.0;

    fn new(bytes: u64) -> Self {
        let n = (bytes as usize / 24).next_multiple_of(TILE);
        let b = (0..n).map(|i| i as f64 * 0.5).collect();
        let c = (0..n).map(|i| (i % 1000) as f64).collect();
        Self { a: vec![0.0; n], b, c }
    }
}

impl Workload for Triad {
    fn name(&self) -> &'static str {
        "triad"
    }

    fn about(&self) -> &'static str {
        "a = b + 3 c over three arrays, once, front to back"
    }

    fn footprint(&self) -> u64 {
        self.a.len() as u64 * 24
    }

    fn reset(&mut self) {
        self.a.fill(0.0);
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let n = self.a.len() as u64;
        let [a, b, c] = [&mut self.a, &mut self.b, &mut self.c].map(|array| Array::of(array));
        launch(runtime, &[a, b, c], move |gpu| {
            let (mut x, mut y) = (vec![0.0; TILE], vec![0.0; TILE]);
            for first in (0..n).step_by(TILE) {
                load(gpu, b.place(first, 8), &mut x)?;
                load(gpu, c.place(first, 8), &mut y)?;
                x.iter_mut().zip(&y).for_each(|(x, y): (&mut f64, &f64)| *x += Self::FACTOR * y);
                store(gpu, a.place(first, 8), &x)?;
            }
            Ok(())
        })
    }

    fn is_right(&self) -> bool {
        self.a.iter().zip(&self.b).zip(&self.c).all(|((a, b), c)| *a == b + Self::FACTOR * c)
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.a[7] += 1.0;
    }
}

/// A five-point stencil between two grids, again and again: everything is used in each step.
struct Stencil {
    grids: [Vec<f32>; 2],
    expected: Vec<f32>,
}

impl Stencil {
    const WIDTH: usize = 1024;
    const STEPS: usize = 8;

    fn new(bytes: u64) -> Self {
        let rows = (bytes as usize / (8 * Self::WIDTH)).max(8);
        let mut this = Self {
            grids: [vec![0.0; rows * Self::WIDTH], vec![0.0; rows * Self::WIDTH]],
            expected: Vec::new(),
        };
        this.reset();
        let [mut from, mut to] = this.grids.clone();
        for _ in 0..Self::STEPS {
            for row in 1..rows - 1 {
                let at = (row - 1) * Self::WIDTH;
                let rows = &from[at..at + 3 * Self::WIDTH];
                Self::row(rows, &mut to[at + Self::WIDTH..at + 2 * Self::WIDTH]);
            }
            std::mem::swap(&mut from, &mut to);
        }
        this.expected = from;
        this
    }

    /// One row of the next step from three of this one. The edges stay.
    fn row(three: &[f32], to: &mut [f32]) {
        let w = Self::WIDTH;
        to[0] = three[w];
        to[w - 1] = three[2 * w - 1];
        for x in 1..w - 1 {
            let around = three[x] + three[2 * w + x] + three[w + x - 1] + three[w + x + 1];
            to[x] = 0.5 * three[w + x] + 0.125 * around;
        }
    }
}

impl Workload for Stencil {
    fn name(&self) -> &'static str {
        "stencil"
    }

    fn about(&self) -> &'static str {
        "8 steps of a five-point stencil between two grids"
    }

    fn footprint(&self) -> u64 {
        self.grids.iter().map(|grid| grid.len() as u64 * 4).sum()
    }

    fn reset(&mut self) {
        for grid in &mut self.grids {
            grid.iter_mut().enumerate().for_each(|(i, cell)| *cell = (i * 7919 % 4099) as f32);
        }
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let rows = self.grids[0].len() / Self::WIDTH;
        let [mut from, mut to] = self.grids.each_mut().map(|grid| Array::of(grid));
        for _ in 0..Self::STEPS {
            launch(runtime, &[from, to], move |gpu| {
                let (mut three, mut one) = (vec![0f32; 3 * Self::WIDTH], vec![0f32; Self::WIDTH]);
                for row in 1..rows - 1 {
                    load(gpu, from.place(((row - 1) * Self::WIDTH) as u64, 4), &mut three)?;
                    Self::row(&three, &mut one);
                    store(gpu, to.place((row * Self::WIDTH) as u64, 4), &one)?;
                }
                Ok(())
            })?;
            std::mem::swap(&mut from, &mut to);
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.grids[Self::STEPS % 2] == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.grids[Self::STEPS % 2][5000] += 1.0;
    }
}

/// GUPS: words all over a large table are changed, one here and one there.
struct Updates {
    table: Vec<u64>,
    expected: Vec<u64>,
}

impl Updates {
    fn new(bytes: u64) -> Self {
        let n = bytes as usize / 8;
        let mut expected: Vec<u64> = (0..n as u64).collect();
        Self::places(n as u64).for_each(|(at, value)| expected[at as usize] ^= value);
        Self { table: vec![0; n], expected }
    }

    fn places(n: u64) -> impl Iterator<Item = (u64, u64)> {
        let mut random = Random(11);
        (0..n / 32).map(move |_| {
            let value = random.next();
            (value % n, value)
        })
    }
}

impl Workload for Updates {
    fn name(&self) -> &'static str {
        "random"
    }

    fn about(&self) -> &'static str {
        "one update for every 32 words of a table, anywhere in it (GUPS)"
    }

    fn footprint(&self) -> u64 {
        self.table.len() as u64 * 8
    }

    fn reset(&mut self) {
        self.table.iter_mut().zip(0..).for_each(|(word, i)| *word = i);
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let (n, table) = (self.table.len() as u64, Array::of(&mut self.table));
        launch(runtime, &[table], move |gpu| {
            Self::places(n).try_for_each(|(at, value)| {
                let place = table.place(at, 8);
                let word = gpu.load_u64(place)?;
                gpu.store_u64(place, word ^ value)
            })
        })
    }

    fn is_right(&self) -> bool {
        self.table == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.table[99] ^= 1;
    }
}

/// Breadth-first search, level by level: the processor looks after each whether there is another.
struct Graph {
    first: Vec<u32>,
    edges: Vec<u32>,
    levels: Vec<u32>,
    /// One word: whether a level was set.
    changed: Vec<u32>,
    expected: Vec<u32>,
}

impl Graph {
    const DEGREE: usize = 14;
    const UNSEEN: u32 = u32::MAX;

    fn new(bytes: u64) -> Self {
        let n = (bytes as usize / (4 * (Self::DEGREE + 2))).max(64);
        let mut random = Random(5);
        // Most edges are short, some go anywhere.
        let edge = |from: usize, random: &mut Random| {
            let far = random.below(16) == 0;
            let step = random.below(if far { n as u64 } else { 1 + n as u64 / 64 });
            ((from as u64 + step) % n as u64) as u32
        };
        let edges: Vec<u32> = (0..n * Self::DEGREE).map(|i| edge(i / Self::DEGREE, &mut random)).collect();
        let first: Vec<u32> = (0..=n).map(|v| (v * Self::DEGREE) as u32).collect();
        let mut expected = vec![Self::UNSEEN; n];
        expected[0] = 0;
        let mut queue = std::collections::VecDeque::from([0u32]);
        while let Some(vertex) = queue.pop_front() {
            let level = expected[vertex as usize];
            for &to in &edges[first[vertex as usize] as usize..first[vertex as usize + 1] as usize] {
                if expected[to as usize] == Self::UNSEEN {
                    expected[to as usize] = level + 1;
                    queue.push_back(to);
                }
            }
        }
        Self { first, edges, levels: vec![0; n], changed: vec![0; 1], expected }
    }
}

impl Workload for Graph {
    fn name(&self) -> &'static str {
        "bfs"
    }

    fn about(&self) -> &'static str {
        "breadth-first search in a graph, a launch for each level"
    }

    fn footprint(&self) -> u64 {
        (self.first.len() + self.edges.len() + self.levels.len()) as u64 * 4
    }

    fn reset(&mut self) {
        self.levels.fill(Self::UNSEEN);
        self.levels[0] = 0;
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let n = self.levels.len();
        let [first, edges, levels, changed] =
            [&mut self.first, &mut self.edges, &mut self.levels, &mut self.changed]
                .map(|array| Array::of(array));
        for level in 0.. {
            self.changed[0] = 0;
            launch(runtime, &[first, edges, levels, changed], move |gpu| {
                let mut some = vec![0u32; TILE];
                let mut any = false;
                for from in (0..n).step_by(TILE) {
                    let some = &mut some[..TILE.min(n - from)];
                    load(gpu, levels.place(from as u64, 4), some)?;
                    let here = some.iter().enumerate().filter(|(_, l)| **l == level);
                    for vertex in here.map(|(i, _)| (from + i) as u64).collect::<Vec<_>>() {
                        let mut range = [0u32; 2];
                        load(gpu, first.place(vertex, 4), &mut range)?;
                        let mut to = vec![0u32; (range[1] - range[0]) as usize];
                        load(gpu, edges.place(range[0].into(), 4), &mut to)?;
                        for to in to {
                            let place = levels.place(to.into(), 4);
                            if gpu.load_u32(place)? == Self::UNSEEN {
                                gpu.store_u32(place, level + 1)?;
                                any = true;
                            }
                        }
                    }
                }
                if any { gpu.store_u32(changed.at, 1) } else { Ok(()) }
            })?;
            if self.changed[0] == 0 {
                break;
            }
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.levels == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.levels[40] ^= 1;
    }
}

/// k-means: points that only the device reads, and a few means that the processor computes anew after each pass.
struct Clusters {
    points: Vec<f32>,
    /// For each cluster the sum of its points and their number.
    sums: Vec<f64>,
    means: Vec<f32>,
    expected: Vec<f32>,
}

impl Clusters {
    const DIMENSIONS: usize = 8;
    const CLUSTERS: usize = 8;
    const PASSES: usize = 5;
    const WIDTH: usize = Self::DIMENSIONS + 1;

    fn new(bytes: u64) -> Self {
        let n = (bytes as usize / (4 * Self::DIMENSIONS)).next_multiple_of(TILE / Self::DIMENSIONS);
        let mut random = Random(3);
        let points = (0..n * Self::DIMENSIONS).map(|_| random.below(1000) as f32).collect();
        let sums = vec![0.0; Self::CLUSTERS * Self::WIDTH];
        let mut this = Self { points, sums, means: Vec::new(), expected: Vec::new() };
        this.reset();
        for _ in 0..Self::PASSES {
            let mut sums = vec![0.0; Self::CLUSTERS * Self::WIDTH];
            Self::add(&this.points, &this.means, &mut sums);
            this.means = Self::means(&sums);
        }
        this.expected = std::mem::take(&mut this.means);
        this
    }

    /// Adds points to the sums of the clusters whose means are nearest.
    fn add(points: &[f32], means: &[f32], sums: &mut [f64]) {
        for point in points.chunks_exact(Self::DIMENSIONS) {
            let distance = |mean: &[f32]| mean.iter().zip(point).map(|(m, p)| (m - p) * (m - p)).sum::<f32>();
            let all = means.chunks_exact(Self::DIMENSIONS).map(distance).enumerate();
            let nearest = all.min_by(|a, b| a.1.total_cmp(&b.1)).map_or(0, |(cluster, _)| cluster);
            let sum = &mut sums[nearest * Self::WIDTH..][..Self::WIDTH];
            sum.iter_mut().zip(point).for_each(|(s, p)| *s += f64::from(*p));
            sum[Self::DIMENSIONS] += 1.0;
        }
    }

    fn means(sums: &[f64]) -> Vec<f32> {
        let mean = |sum: &[f64]| {
            let count = sum[Self::DIMENSIONS].max(1.0);
            sum[..Self::DIMENSIONS].iter().map(|s| (s / count) as f32).collect::<Vec<_>>()
        };
        sums.chunks_exact(Self::WIDTH).flat_map(mean).collect()
    }
}

impl Workload for Clusters {
    fn name(&self) -> &'static str {
        "kmeans"
    }

    fn about(&self) -> &'static str {
        "5 passes of k-means: the device only reads the points, the processor computes the means"
    }

    fn footprint(&self) -> u64 {
        self.points.len() as u64 * 4
    }

    fn reset(&mut self) {
        self.means = self.points[..Self::CLUSTERS * Self::DIMENSIONS].to_vec();
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let n = self.points.len() as u64;
        for _ in 0..Self::PASSES {
            let [points, means] = [&mut self.points, &mut self.means].map(|array| Array::of(array));
            let sums = Array::of(&mut self.sums);
            launch(runtime, &[points, means, sums], move |gpu| {
                let mut centres = vec![0f32; Self::CLUSTERS * Self::DIMENSIONS];
                let mut totals = vec![0f64; Self::CLUSTERS * Self::WIDTH];
                let mut some = vec![0f32; TILE];
                load(gpu, means.at, &mut centres)?;
                for first in (0..n).step_by(TILE) {
                    load(gpu, points.place(first, 4), &mut some)?;
                    Self::add(&some, &centres, &mut totals);
                }
                store(gpu, sums.at, &totals)
            })?;
            self.means = Self::means(&self.sums);
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.means == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.means[1] += 1.0;
    }
}

/// A matrix by rows and, in the same launch, by columns.
struct Product {
    matrix: Vec<f64>,
    vector: Vec<f64>,
    rows: Vec<f64>,
    columns: Vec<f64>,
    expected: [Vec<f64>; 2],
    side: usize,
}

impl Product {
    fn new(bytes: u64) -> Self {
        let side = ((bytes / 8) as f64).sqrt() as usize;
        let matrix: Vec<f64> = (0..side * side).map(|i| (i % 513) as f64).collect();
        let vector: Vec<f64> = (0..side).map(|i| (i % 17) as f64).collect();
        let dot = |a: &mut dyn Iterator<Item = f64>| a.zip(&vector).map(|(a, b)| a * b).sum::<f64>();
        let rows = (0..side).map(|r| dot(&mut matrix[r * side..][..side].iter().copied())).collect();
        let columns = (0..side).map(|c| dot(&mut (0..side).map(|r| matrix[r * side + c]))).collect();
        let zeroes = vec![0.0; side];
        Self { expected: [rows, columns], rows: zeroes.clone(), columns: zeroes, matrix, vector, side }
    }
}

impl Workload for Product {
    fn name(&self) -> &'static str {
        "mvt"
    }

    fn about(&self) -> &'static str {
        "a matrix by a vector and its transpose by it: along rows, then down columns"
    }

    fn footprint(&self) -> u64 {
        (self.matrix.len() + 3 * self.side) as u64 * 8
    }

    fn reset(&mut self) {
        self.rows.fill(0.0);
        self.columns.fill(0.0);
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let side = self.side;
        let arrays = [&mut self.matrix, &mut self.vector, &mut self.rows, &mut self.columns];
        let [matrix, vector, rows, columns] = arrays.map(|array| Array::of(array));
        launch(runtime, &[matrix, vector, rows, columns], move |gpu| {
            let (mut x, mut row) = (vec![0f64; side], vec![0f64; side]);
            load(gpu, vector.at, &mut x)?;
            let mut by_rows = vec![0f64; side];
            for (r, sum) in by_rows.iter_mut().enumerate() {
                load(gpu, matrix.place((r * side) as u64, 8), &mut row)?;
                *sum = row.iter().zip(&x).map(|(a, b)| a * b).sum();
            }
            store(gpu, rows.at, &by_rows)?;
            // As many columns at a time as threads that go down side by side: a few words of each row.
            const WIDE: usize = 32;
            let mut by_columns = vec![0f64; side];
            for (first, sums) in by_columns.chunks_mut(WIDE).enumerate() {
                let mut some = vec![0f64; sums.len()];
                for (r, factor) in x.iter().enumerate() {
                    load(gpu, matrix.place((r * side + first * WIDE) as u64, 8), &mut some)?;
                    sums.iter_mut().zip(&some).for_each(|(sum, a)| *sum += a * factor);
                }
            }
            store(gpu, columns.at, &by_columns)
        })
    }

    fn is_right(&self) -> bool {
        self.rows == self.expected[0] && self.columns == self.expected[1]
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.columns[1] += 1.0;
    }
}

/// A linked list in no order: each word tells where the next is.
struct List {
    /// Next address, value.
    nodes: Vec<[u64; 8]>,
    sum: Vec<u64>,
    expected: u64,
}

impl List {
    fn new(bytes: u64) -> Self {
        let n = (bytes as usize / 64).max(2);
        let mut nodes = vec![[0; 8]; n];
        let mut order: Vec<usize> = (0..n).collect();
        let mut random = Random(17);
        (1..n).rev().for_each(|i| order.swap(i, random.below(i as u64 + 1) as usize));
        let begin = Array::of(&mut nodes);
        // It begins with the first node.
        let first = order.iter().position(|&node| node == 0).unwrap_or(0);
        order.swap(0, first);
        let mut expected = 0u64;
        for (i, &node) in order.iter().enumerate() {
            nodes[node][0] = order.get(i + 1).map_or(0, |next| begin.place(*next as u64, 64));
            nodes[node][1] = random.next();
            expected = expected.rotate_left(1) ^ nodes[node][1];
        }
        Self { nodes, sum: vec![0], expected }
    }
}

impl Workload for List {
    fn name(&self) -> &'static str {
        "list"
    }

    fn about(&self) -> &'static str {
        "a walk along a linked list whose nodes lie in no order"
    }

    fn footprint(&self) -> u64 {
        self.nodes.len() as u64 * 64
    }

    fn reset(&mut self) {
        self.sum[0] = 0;
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        let (nodes, sum) = (Array::of(&mut self.nodes), Array::of(&mut self.sum));
        launch(runtime, &[nodes, sum], move |gpu| {
            let (mut at, mut total) = (nodes.at, 0u64);
            while at != 0 {
                total = total.rotate_left(1) ^ gpu.load_u64(at + 8)?;
                at = gpu.load_u64(at)?;
            }
            gpu.store_u64(sum.at, total)
        })
    }

    fn is_right(&self) -> bool {
        self.sum[0] == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.sum[0] ^= 1;
    }
}

/// Device and processor in turn: the device changes everything, the processor a word here and there.
struct Edits {
    data: Vec<u64>,
    expected: Vec<u64>,
}

impl Edits {
    const ROUNDS: u64 = 6;
    /// The processor changes one word of this many: one page of 16.
    const EVERY: usize = 16 * 512;

    fn new(bytes: u64) -> Self {
        let n = (bytes as usize / 8).next_multiple_of(TILE);
        let mut expected: Vec<u64> = (0..n as u64).collect();
        for round in 0..Self::ROUNDS {
            expected.iter_mut().for_each(|word| *word = word.rotate_left(3) ^ round);
            Self::edit(&mut expected, round);
        }
        Self { data: vec![0; n], expected }
    }

    fn edit(data: &mut [u64], round: u64) {
        data.iter_mut().skip(round as usize * 512).step_by(Self::EVERY).for_each(|word| *word += round);
    }
}

impl Workload for Edits {
    fn name(&self) -> &'static str {
        "edits"
    }

    fn about(&self) -> &'static str {
        "6 times in turn: the device changes all, the processor a word in every 16th page"
    }

    fn footprint(&self) -> u64 {
        self.data.len() as u64 * 8
    }

    fn reset(&mut self) {
        self.data.iter_mut().zip(0..).for_each(|(word, i)| *word = i);
    }

    fn run(&mut self, runtime: &Runtime) -> usvm::Result<()> {
        for round in 0..Self::ROUNDS {
            let data = Array::of(&mut self.data);
            launch(runtime, &[data], move |gpu| {
                gpu.update(data.at, data.len, |tile, _| {
                    for bytes in tile.chunks_exact_mut(8) {
                        let word: u64 = super::workload::Number::from_bytes(bytes);
                        super::workload::Number::put(word.rotate_left(3) ^ round, bytes);
                    }
                })
            })?;
            Self::edit(&mut self.data, round);
        }
        Ok(())
    }

    fn is_right(&self) -> bool {
        self.data == self.expected
    }

    #[cfg(test)]
    fn spoil(&mut self) {
        self.data[3] ^= 1;
    }
}
