//! What the space asks of the floors above: host memory, a device, a policy.
//!
//! # Overview
//! The space decides; these traits do. [`AddressSpace`] is read-only knowledge of the process (VMAs, page presence);
//! [`HostMemory`] moves page-table entries and tracks writes; [`Device`] has memory, a page table and engines;
//! `Policy` (in [`crate::policy`]) chooses. All are implemented above, so that the space can be tested against models.
//!
//! # Locking
//! Implementations take no lock of the space. Everything here may be called with a range's state lock held, never with
//! the update lock.

use crate::ground::addr::{PageMask, Span};
use crate::ground::error::{Error, Result};

/// What kind of mapping a VMA is, as far as migration cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum VmaKind {
    /// Anonymous and private: can migrate when it is writable.
    Anonymous,
    /// File-backed and private, or any file mapping.
    File,
    /// Shared memory: shmem, memfd, shared anonymous.
    Shared,
    /// hugetlbfs pages.
    Hugetlb,
    /// The kernel's own (vdso, vvar, I/O): cannot even be mapped remotely.
    Special,
}

/// One virtual memory area of this process, as drm_gpusvm would see it: boundaries that exist only because usvm
/// registered part of a mapping with userfaultfd are not shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vma {
    /// Its addresses.
    pub span: Span,
    /// VM_READ.
    pub read: bool,
    /// VM_WRITE.
    pub write: bool,
    /// VM_EXEC.
    pub exec: bool,
    /// What is behind it.
    pub kind: VmaKind,
}

impl Vma {
    /// Whether pages of it may live in device memory (vma_is_anonymous and not hugetlb).
    pub fn migratable(&self) -> bool {
        self.kind == VmaKind::Anonymous
    }
}

/// Read-only knowledge of the mirrored process.
pub trait AddressSpace: Send + Sync {
    /// The VMA that holds `addr`.
    fn find_vma(&self, addr: u64) -> Result<Option<Vma>>;

    /// Whether every page of `span` is populated on the CPU side or resident on the device (drm_gpusvm_check_pages).
    fn populated(&self, span: Span) -> bool;
}

/// A place in the shadow area: as long and as aligned as the range it serves. Owned by one range; not copyable, so a
/// slot cannot be given out twice.
#[derive(Debug, PartialEq, Eq)]
pub struct Shadow {
    /// Where it is.
    pub span: Span,
}

/// What stopped a flip. `moved` pages have arrived; the rest are where they were.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlipStop {
    /// Pages that moved before it stopped.
    pub moved: PageMask,
    /// Why it stopped.
    pub why: FlipError,
}

/// Why pages did not flip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlipError {
    /// An event is unread, or the kernel lost a race: drain events, then go on.
    Again,
    /// A page is pinned or shared copy-on-write.
    Busy,
    /// The mapping is gone, or no longer the one that was registered.
    NoMapping,
    /// The mapping's protection or locking does not match the shadow's (mprotect, mlock, exec).
    Mismatch,
    /// A page is already there.
    Exists,
    /// Host memory ran out.
    NoMemory,
    /// Anything else, as errno.
    Os(i32),
}

/// Moves and tracks the pages of this process. Spans are page-aligned and at most 2 MiB; masks count pages from the
/// start of the span they are given with.
pub trait HostMemory: AddressSpace {
    /// Puts `span` under userfaultfd, so that a missing page in it waits for usvm. Idempotent. The parts that were not
    /// registered before split their VMA in two or three: ENOMEM at the VMA limit.
    fn register(&self, span: Span) -> Result<()>;

    /// Takes `span` from under userfaultfd and wakes whoever waits in it. Missing pages become the kernel's to serve.
    fn unregister(&self, span: Span);

    /// As [`HostMemory::unregister`], for memory that waits for usvm although nothing of it is away: also what the kernel
    /// registered by itself, where a mapping grew (mremap, brk) beyond what usvm had registered of it.
    fn let_go(&self, span: Span);

    /// `span` was unmapped: its registration went with it.
    fn forget(&self, span: Span);

    /// mremap took `[from, from + len)` to `to`, and its registration along.
    fn moved(&self, from: u64, to: u64, len: u64);

    /// Whether all of `span` lies in mappings registered with this runtime's userfaultfd. False tells that the old
    /// mapping was unmapped and a new one stands in its place.
    fn is_registered(&self, span: Span) -> bool;

    /// The pages of `span`, of 2 MiB at most, that lie in such mappings.
    fn registered(&self, span: Span) -> PageMask;

    /// Whether some call has changed mappings of which the space does not know yet: its event is unread or not handled.
    fn mappings_change(&self) -> bool;

    /// Whether no page leaves while [`HostMemory::mappings_change`] says so. (Where pages are moved by mremap they do.)
    fn refuses_while_changing(&self) -> bool;

    /// Pages of `span` that are present (not holes, not swapped out is present too).
    fn present(&self, span: Span) -> PageMask;

    /// Whether `span` is one huge page.
    fn is_huge(&self, span: Span) -> bool;

    /// A shadow place for a range of `len` bytes, with no pages in it.
    fn shadow_alloc(&self, len: u64) -> Result<Shadow>;

    /// Gives a shadow place back; pages still in it are returned to the kernel, never to another range.
    fn shadow_free(&self, shadow: Shadow);

    /// As [`HostMemory::shadow_free`], but soon and together with others: for a place with pages that nobody needs.
    fn shadow_discard(&self, shadow: Shadow);

    /// Returns the `pages` of `shadow` to the kernel; the place stays.
    fn shadow_release(&self, shadow: &Shadow, pages: &PageMask);

    /// Puts prepared huge-page memory that was never at an application's address into an empty 2 MiB `shadow`.
    /// `false` when none is ready: touching the shadow then makes fresh pages.
    fn shadow_adopt_prepared(&self, shadow: &Shadow) -> bool;

    /// Moves the `pages` of `app` that are present to the same places in `shadow` (holes stay holes) and gives what
    /// moved. From then on the application's accesses to them wait.
    fn flip_out(
        &self,
        app: Span,
        shadow: &Shadow,
        pages: &PageMask,
    ) -> std::result::Result<PageMask, FlipStop>;

    /// Moves the `pages` of `shadow`, all present there, to `app` and wakes the waiters.
    fn flip_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> std::result::Result<(), FlipStop>;

    /// Copies the `pages` of `shadow` into holes of `app` (UFFDIO_COPY): where a flip cannot go, slower.
    fn copy_in(&self, app: Span, shadow: &Shadow, pages: &PageMask) -> std::result::Result<(), FlipStop>;

    /// Copies the `pages` of the memory at `from`, laid out as `app`, into holes of `app` (UFFDIO_COPY) and wakes the
    /// waiters.
    fn fill_from(&self, app: Span, from: u64, pages: &PageMask) -> std::result::Result<(), FlipStop>;

    /// Gives pages that a live child shares copy-on-write to this process alone, so that they can flip.
    fn unshare(&self, app: Span, pages: &PageMask);

    /// Starts tracking writes to `app`: from now on [`HostMemory::take_written`] tells which pages were written.
    /// Fails where the kernel cannot track without faults (WP_ASYNC and PAGEMAP_SCAN).
    ///
    /// Track first, copy afterwards: then no store can fall between. The other order is not sound, and UFFDIO_MOVE
    /// neither keeps a page's write protection nor can map a page protected, so a page that just came back by a flip
    /// cannot be tracked from the instant it is writable.
    fn track(&self, app: Span) -> std::result::Result<(), FlipError>;

    /// The present pages of `app` written since the last call (or since [`HostMemory::track`]), protected again in the
    /// same step. `None` when tracking was lost, for instance because the mapping is another one now.
    fn take_written(&self, app: Span) -> Option<PageMask>;

    /// Fills a hole with zeroes (present already is success) and wakes its waiters.
    fn zero_fill(&self, page: u64) -> std::result::Result<(), FlipError>;

    /// Reads memory at `from` that is at home, up to `to.len()` bytes, and never waits: [`Error::Gone`] where a page is
    /// missing, whatever the reason. Says how many bytes, at least one. [`Error::NotSupported`] where this process may not
    /// read its memory so.
    fn read_home(&self, from: u64, to: &mut [u8]) -> Result<usize>;

    /// Wakes the waiters of `span`: their faults are tried again.
    fn wake(&self, span: Span);

    /// Makes `page` answer SIGBUS: its data is lost.
    fn poison(&self, page: u64);
}

/// How the device may use a mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GpuAccess {
    /// Loads only.
    Read,
    /// Loads and stores.
    Write,
    /// Read-modify-write. Needs device memory where the link has no atomics.
    Atomic,
}

impl GpuAccess {
    /// Whether it changes memory.
    pub fn writes(self) -> bool {
        self != GpuAccess::Read
    }
}

/// What a GPU mapping points at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backing {
    /// Device memory, by offset.
    Vram(u64),
    /// The process's own pages at the same address, over the link.
    System,
}

/// Bytes of device memory, owned: not copyable, so it cannot be freed twice.
#[derive(Debug, PartialEq, Eq)]
pub struct Bo {
    /// Where in the region, in bytes.
    pub offset: u64,
    /// How long, in bytes.
    pub len: u64,
}

/// What a device is and can do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceInfo {
    /// Name for people, e.g. `sim:arc-a770`.
    pub name: String,
    /// Bytes of device memory.
    pub vram_bytes: u64,
    /// Bytes of it that the CPU can reach (small BAR); at most `vram_bytes`.
    pub cpu_visible_bytes: u64,
    /// Whether an access without a mapping is a fault that can be served, or an error that ends the work.
    pub recoverable_faults: bool,
    /// Smallest device-memory page.
    pub min_page: u64,
    /// Whether atomics work on [`Backing::System`] mappings.
    pub system_atomics: bool,
}

/// A device: memory, a page table that mirrors this process, and work that uses both.
pub trait Device: Send + Sync {
    /// What it is.
    fn info(&self) -> &DeviceInfo;

    /// Takes device memory without evicting: `None` when no free block is large enough.
    fn vram_alloc(&self, len: u64) -> Option<Bo>;

    /// Gives device memory back.
    fn vram_free(&self, bo: Bo);

    /// Free bytes (maybe in pieces).
    fn vram_free_bytes(&self) -> u64;

    /// Says that copies of a megabyte or more will be asked for at once: who helps with them may wake up.
    fn expect_copies(&self) {}

    /// Copies `len` bytes at `at` of `shadow` to `at` of `bo`.
    fn upload(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()>;

    /// Copies `bytes`, usvm's own memory, to `at` of `bo`.
    fn upload_bytes(&self, bo: &Bo, at: u64, bytes: &[u8]) -> Result<()>;

    /// Copies `len` bytes at `at` of `bo` to `at` of `shadow`.
    fn download(&self, bo: &Bo, shadow: &Shadow, at: u64, len: u64) -> Result<()>;

    /// Where this process can read all of `bo` as fast as its own memory, for a caller that copies `len` bytes from
    /// there before the block is freed; they count as downloaded. `None` where it cannot, or reads slowly (memory behind
    /// a bus that the processor does not cache).
    fn lend(&self, bo: &Bo, len: u64) -> Option<u64> {
        let _ = (bo, len);
        None
    }

    /// Zeroes `len` bytes at `at` of `bo`.
    fn clear(&self, bo: &Bo, at: u64, len: u64) -> Result<()>;

    /// Whether `len` bytes at `at` of `bo` are all zero.
    fn is_zero(&self, bo: &Bo, at: u64, len: u64) -> bool;

    /// Maps `va` (aligned to its own size of 4K, 64K or 2M) to `backing`. Replaces what was there.
    fn bind(&self, va: Span, backing: Backing, access: GpuAccess) -> Result<()>;

    /// Unmaps `va`, which may be a part of what was bound: the rest stays. Returns when no engine can use the old
    /// translation any more, and says whether the device referenced the pages since they were bound.
    fn unbind(&self, va: Span) -> bool;

    /// Whether an access over the link is under way at an address of `va`, which waits if the processor does not have the
    /// page: for the fault service alone, and not for the end of work that holds the memory, which may be its own. Only a
    /// device that reaches the memory by the processor's page table has such accesses.
    fn reaches(&self, va: Span) -> bool {
        let _ = va;
        false
    }

    /// Whether the device referenced `va` since the last call, where the hardware can tell (else `false`).
    fn test_and_clear_referenced(&self, va: Span) -> bool;
}

/// Where a policy wants a range that the device is about to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Placement {
    /// Into device memory, the CPU's view taken away.
    Migrate,
    /// A copy in device memory for reading, the CPU's view kept and its writes tracked. Only inside brackets
    /// (`begin_access`), where the program promises not to write.
    Share,
    /// Not moved: the device reaches over the link.
    Remote,
}

/// How much of a range a CPU access brings back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    /// All of it, as the kernel does.
    Range,
    /// The aligned block of so many bytes (a power of two) around the access.
    Block(u64),
}

/// What the program said about a range (CUDA's and Level Zero's words). Hints: never change results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Advice {
    /// Mostly read by everybody: share rather than migrate.
    pub read_mostly: bool,
    /// Where it should live: `Some(None)` the host, `Some(Some(d))` device `d`.
    pub preferred: Option<Option<u32>>,
    /// Mapped for this device even when it lives elsewhere.
    pub accessed_by: Option<u32>,
}

/// What happened to a range so far; what policies decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct History {
    /// Times it went to a device.
    pub to_device: u32,
    /// Times the CPU took some of it back.
    pub to_host: u32,
    /// Returns of a range that had been back and forth before: ping-pong at the pace of launches.
    pub round_trips: u32,
    /// CPU returns since it last arrived on the device.
    pub returns_this_visit: u32,
    /// Whether the device wrote it during the last visit.
    pub device_wrote: bool,
    /// Visits in a row that ended with most of it back on the host.
    pub whole_returns: u32,
    /// Times in a row that it had to leave for others, each soon after the one before.
    pub evictions: u32,
    /// Times in a row that a policy left it at home for that.
    pub passed_over: u32,
}

/// One decision's facts.
#[derive(Debug, Clone, Copy)]
pub struct Facts<'a> {
    /// The range.
    pub span: Span,
    /// Loads, stores or atomics.
    pub access: GpuAccess,
    /// Inside begin/end of a launch.
    pub bracketed: bool,
    /// The device that asks.
    pub device: u32,
    /// What the program advised.
    pub advice: Advice,
    /// For a CPU access: bytes right before it, and of the same range, that came back during this visit.
    pub sequential: u64,
    /// What happened before.
    pub history: &'a History,
}

/// Chooses where ranges live. One object serves all threads at once; it decides from the facts alone, so a decision
/// can be replayed.
pub trait Policy: Send + Sync {
    /// Its name in `USVM_POLICY`.
    fn name(&self) -> &'static str;

    /// A device is about to use a range that could migrate.
    fn gpu_access(&self, facts: &Facts<'_>) -> Placement;

    /// The CPU touched a range that lives on a device.
    fn cpu_fault(&self, facts: &Facts<'_>) -> Return;
}

/// Serves a device's faults: what [`crate::space`] is to a device.
pub trait FaultSink: Send + Sync {
    /// Makes `[addr, addr + len)` accessible to the device, or says why not. Called on the engine's own thread, which
    /// holds no lock. The page that holds `addr` stays bound until [`FaultSink::fault_done`].
    fn gpu_fault(&self, addr: u64, len: u64, access: GpuAccess) -> Result<()>;

    /// The engine used the translation of the last fault on this thread at least once.
    fn fault_done(&self);
}

/// What a stopped flip becomes for the caller of the space.
impl FlipError {
    /// The space's error for a flip of `span`.
    pub fn to_error(self, span: Span) -> Error {
        match self {
            FlipError::Again => Error::Again { what: "moving pages", tries: 1 },
            FlipError::Busy | FlipError::Exists | FlipError::Mismatch => Error::Busy { span },
            FlipError::NoMapping => Error::Gone { addr: span.start },
            FlipError::NoMemory => Error::OutOfHostMemory {
                what: "moving pages",
                detail: "the kernel has no page-table memory to spare; raise the memory limit".into(),
            },
            FlipError::Os(e) => Error::os("UFFDIO_MOVE", crate::ground::error::Errno(e)),
        }
    }
}
