//! A whole Rust program on usvm's allocator: standard collections on several threads, and the device working on the very same
//! boxes, vectors and strings.
//!
//! A catalogue of articles is kept in a `HashMap`, a `BTreeMap` and a linked list of boxes. The CPU's threads fill it, the
//! device walks the list by its pointers and changes prices in place, the CPU reads them back, grows, shrinks and frees.
//! Everything is compared with a second account that only the CPU keeps; the last line is `verified`, or the exit status
//! is 1.

use std::collections::{BTreeMap, HashMap};
use std::process::ExitCode;

use usvm::{Config, Runtime};

/// Every allocation of this program that is not usvm's own.
#[global_allocator]
static ALLOC: usvm_alloc::Usvm = usvm_alloc::Usvm::new();

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// One article, in a box of its own; the device sees it as these words.
#[repr(C)]
struct Article {
    number: u64,
    price: u64,
    /// The address of the next one; 0 for the last.
    next: u64,
}

/// Articles linked to a list that begins at the last one.
#[expect(clippy::vec_box, reason = "articles point at each other: each needs an address that stays")]
struct Catalogue {
    articles: Vec<Box<Article>>,
    names: HashMap<String, usize>,
}

const ARTICLES: usize = 30_000;
const THREADS: usize = 4;
const ROUNDS: u64 = 3;

fn main() -> ExitCode {
    match run() {
        Ok(()) => {
            println!("verified");
            ExitCode::SUCCESS
        }
        Err(e) => {
            eprintln!("collections: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let runtime = Runtime::start(Config::from_env()?)?;
    let mut catalogue = Catalogue::filled_by_threads()?;
    let mut account: BTreeMap<u64, u64> = catalogue.articles.iter().map(|a| (a.number, a.price)).collect();
    for round in 1..=ROUNDS {
        let changed = catalogue.raise_prices(&runtime, round)?;
        if changed != catalogue.articles.len() as u64 {
            return Err(format!("the device found {changed} of {} articles", catalogue.articles.len()).into());
        }
        account.values_mut().for_each(|price| *price += round);
        catalogue.compare(&account)?;
        catalogue.drop_some(&mut account, round);
        catalogue.compare(&account)?;
    }
    let stats = runtime.stats();
    println!(
        "{} articles left; {} KiB went to the device, {} KiB came back",
        account.len(),
        stats.bytes_to_device >> 10,
        stats.bytes_to_host >> 10
    );
    runtime.shutdown();
    catalogue.compare(&account)
}

impl Catalogue {
    /// Threads make the articles; boxes and strings change hands.
    fn filled_by_threads() -> Result<Self> {
        let each = |thread: usize| {
            (0..ARTICLES / THREADS)
                .map(|i| {
                    let number = (i * THREADS + thread) as u64;
                    let article = Article { number, price: number % 1000, next: 0 };
                    (Box::new(article), format!("article {number}"))
                })
                .collect::<Vec<(Box<Article>, String)>>()
        };
        let parts: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(move || each(t))).collect();
            threads.into_iter().map(|t| t.join()).collect()
        });
        let mut catalogue = Self { articles: Vec::new(), names: HashMap::new() };
        for part in parts {
            for (article, name) in part.map_err(|_| "a thread failed")? {
                catalogue.names.insert(name, catalogue.articles.len());
                catalogue.articles.push(article);
            }
        }
        catalogue.link();
        Ok(catalogue)
    }

    fn link(&mut self) {
        let mut next = 0;
        for article in &mut self.articles {
            article.next = next;
            next = (&raw const **article).expose_provenance() as u64;
        }
    }

    /// The device walks the list and adds `by` to each price. Gives how many articles it saw.
    fn raise_prices(&self, runtime: &Runtime, by: u64) -> Result<u64> {
        let seen = Box::new(std::sync::atomic::AtomicU64::new(0));
        let first = self.articles.last().map_or(0, |a| (&raw const **a).expose_provenance() as u64);
        let counter = seen.as_ptr().expose_provenance() as u64;
        let walk = move |gpu: &mut usvm::device::sim::Gpu<'_>| {
            let (mut at, mut count) = (first, 0);
            while at != 0 {
                let price = at + std::mem::offset_of!(Article, price) as u64;
                gpu.fetch_add_u64(price, by)?;
                at = gpu.load_u64(at + std::mem::offset_of!(Article, next) as u64)?;
                count += 1;
            }
            gpu.fetch_add_u64(counter, count)?;
            Ok(())
        };
        runtime.launch(0, walk).wait(None)?;
        Ok(seen.load(std::sync::atomic::Ordering::Relaxed))
    }

    fn compare(&self, account: &BTreeMap<u64, u64>) -> Result<()> {
        if self.articles.len() != account.len() || self.names.len() != account.len() {
            return Err("articles were lost".into());
        }
        for article in &self.articles {
            let place = self.names.get(&format!("article {}", article.number));
            let known = place.and_then(|p| self.articles.get(*p)).is_some_and(|a| a.number == article.number);
            if !known || account.get(&article.number) != Some(&article.price) {
                return Err(format!("article {} costs {}", article.number, article.price).into());
            }
        }
        Ok(())
    }

    /// Frees every fifth article, wherever it is, and links the rest anew.
    fn drop_some(&mut self, account: &mut BTreeMap<u64, u64>, round: u64) {
        let articles = std::mem::take(&mut self.articles);
        self.articles = articles.into_iter().filter(|a| a.number % 5 != round % 5).collect();
        account.retain(|number, _| number % 5 != round % 5);
        self.articles.shrink_to_fit();
        self.names =
            self.articles.iter().enumerate().map(|(i, a)| (format!("article {}", a.number), i)).collect();
        self.link();
    }
}
