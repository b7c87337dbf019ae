//! The entry points under `LD_PRELOAD`, for loaders without layers.
//!
//! # Overview
//! The library exports the OpenCL functions that the layer handles. The dynamic linker binds every object's calls of
//! them to these, whichever loader the object was linked with; so each first finds out *whose* call it is, by the
//! caller's address, and which function that object would have got without the library: its own dependencies are asked.
//! If that loader calls the layer itself, or the library is off, the call goes on untouched; a library's calls to itself
//! do so, too. What was found is kept for each place of a call.
//!
//! The exported functions are a few instructions each: they keep the arguments as they are and jump.
//!
//! # Locking
//! The table of places is lock-free. Two threads at the same place at once find the same.
//!
//! # Limits
//! Functions that a program looks up with `dlsym` in the loader's handle are not seen; that is what the layer interface
//! is for. A call by tail jump from another object is taken for that object's caller's.
//!
//! # Safety
//! The functions have the C signature of their name; arguments and stack are left as the caller made them. What is
//! jumped to is a function with that signature.

use std::arch::naked_asm;
use std::ffi::{CStr, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

use super::dispatch::{ENTRIES, NAMES, Raw, index_of};
use super::loaders::{self, Known};
use super::settings;
use super::types::{INVALID_OPERATION, Int};

macro_rules! exported {
    ($($name:ident)*) => {$(
        /// As the OpenCL function of this name.
        ///
        /// # Safety
        /// As the OpenCL function of this name.
        #[unsafe(no_mangle)]
        #[unsafe(naked)]
        pub unsafe extern "C" fn $name() {
            naked_asm!(
                "push rdi",
                "push rsi",
                "push rdx",
                "push rcx",
                "push r8",
                "push r9",
                "sub rsp, 8",
                "mov rdi, [rsp + 56]",
                "mov esi, {index}",
                "call {resolve}",
                "add rsp, 8",
                "pop r9",
                "pop r8",
                "pop rcx",
                "pop rdx",
                "pop rsi",
                "pop rdi",
                "jmp rax",
                index = const index_of(stringify!($name)),
                resolve = sym resolve,
            )
        }
    )*};
}

exported! {
    clGetPlatformInfo clGetDeviceInfo
    clGetExtensionFunctionAddress clGetExtensionFunctionAddressForPlatform
    clCreateContext clCreateContextFromType
    clCreateCommandQueue clCreateCommandQueueWithProperties clRetainCommandQueue clReleaseCommandQueue
    clCreateKernel clCreateKernelsInProgram clCloneKernel clRetainKernel clReleaseKernel
    clSetKernelArg clSetKernelArgSVMPointer clSetKernelExecInfo
    clEnqueueNDRangeKernel clEnqueueTask
    clSVMAlloc clSVMFree clEnqueueSVMFree clEnqueueSVMMap clEnqueueSVMUnmap clEnqueueSVMMigrateMem
    clGetEventInfo clRetainEvent clReleaseEvent
}

/// A place of a call, and where it goes on.
struct Place {
    key: usize,
    generation: usize,
    goes_to: usize,
}

const PLACES: usize = 4096;
const PROBES: usize = 4;

/// The places known. What is in the table is never freed: another thread may be reading it.
static TABLE: [AtomicPtr<Place>; PLACES] = [const { AtomicPtr::new(null_mut()) }; PLACES];

/// Grows when what was found may not hold any more.
static GENERATION: AtomicUsize = AtomicUsize::new(0);

/// Where a call of function `index` that returns to `caller` goes on.
extern "C" fn resolve(caller: usize, index: usize) -> usize {
    // An address has 47 bits.
    let key = caller | index << 48;
    let generation = GENERATION.load(Ordering::Acquire);
    let first = key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 52;
    let mut free = None;
    for slot in (0..PROBES).map(|n| &TABLE[(first + n) % PLACES]) {
        // SAFETY: what is in the table stays valid for good.
        match unsafe { slot.load(Ordering::Acquire).as_ref() } {
            Some(place) if place.generation != generation => free = free.or(Some(slot)),
            Some(place) if place.key == key => return place.goes_to,
            Some(_) => {}
            None => free = free.or(Some(slot)),
        }
    }
    let goes_to = decide(caller, index);
    if let Some(slot) = free {
        slot.store(Box::into_raw(Box::new(Place { key, generation, goes_to })), Ordering::Release);
    }
    goes_to
}

/// A loader took the layer: where calls go on is decided anew.
pub fn forget() {
    GENERATION.fetch_add(1, Ordering::AcqRel);
}

fn decide(caller: usize, index: usize) -> usize {
    let own = own_of(caller, NAMES[index]);
    if own == 0 {
        return if gives_pointer(NAMES[index]) { nothing as *const () } else { refused as *const () }
            as usize;
    }
    if !settings::get().enable {
        return own;
    }
    let Some((base, file)) = loaders::object_at(own) else { return own };
    let from = loaders::object_at(caller).map_or(0, |(base, _)| base);
    if from == base || from == loaders::own_base() {
        return own;
    }
    match loaders::add_preloaded(base, || entries_of(file)) {
        Some(Known::Preloaded(slot)) => match loaders::wrapped(slot).to_raw()[index] {
            0 => own,
            ours => ours,
        },
        Some(Known::Layered) | None => own,
    }
}

/// The function `name` that the object at `caller` would have got without this library; zero if none.
pub fn own_of(caller: usize, name: &CStr) -> usize {
    // The program's own file is no object that dlopen finds by its name: it would search the disk for one.
    let library = loaders::object_at(caller).filter(|(base, _)| *base != loaders::program_base());
    let of_object = library.map_or(0, |(_, file)| in_object(file, name));
    if of_object != 0 && !loaders::is_ours(of_object) {
        return of_object;
    }
    // Of the program itself the dependencies are the global scope.
    // SAFETY: a look-up by name.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, name.as_ptr()) } as usize;
    if next != 0 { next } else { in_object(c"libOpenCL.so.1", name) }
}

/// The function `name` as the loaded object `file` and its dependencies have it; zero if none.
fn in_object(file: &CStr, name: &CStr) -> usize {
    let mut found = [0];
    look_up(file, &[name], &mut found);
    found[0]
}

fn entries_of(file: &CStr) -> Raw {
    let mut raw = [0; ENTRIES];
    look_up(file, NAMES, &mut raw);
    raw
}

/// Sets each of `found` that the loaded object `file` and its dependencies have a name for.
fn look_up(file: &CStr, names: &[&CStr], found: &mut [usize]) {
    // SAFETY: the object is loaded; the handle is kept, so that what is found in it stays.
    let handle = unsafe { libc::dlopen(file.as_ptr(), libc::RTLD_LAZY | libc::RTLD_NOLOAD) };
    if handle.is_null() {
        return;
    }
    for (found, name) in found.iter_mut().zip(names) {
        // SAFETY: a look-up by name in what was just opened.
        *found = unsafe { libc::dlsym(handle, name.as_ptr()) } as usize;
    }
}

fn gives_pointer(name: &CStr) -> bool {
    let name = name.to_bytes();
    name == b"clSVMAlloc"
        || name.starts_with(b"clGetExtension")
        || name.starts_with(b"clClone")
        || name.starts_with(b"clCreate") && name != b"clCreateKernelsInProgram"
}

/// Stands for a function that nobody in this process has.
extern "C" fn refused() -> Int {
    INVALID_OPERATION
}

/// The same, for one that gives a pointer.
extern "C" fn nothing() -> *const c_void {
    null()
}
