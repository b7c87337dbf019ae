//! `cl_intel_unified_shared_memory`: provided on the driver's SVM, or watched where the driver has it.
//!
//! # Overview
//! Every function has an instance for each face ([`super::faces`]). On a driver with USM the call goes on to it, and the
//! layer notes blocks, arguments and hints. On one without, blocks are made by `clSVMAlloc`, copies and fills are the SVM
//! commands, migrations and advice are markers (hints may be ignored, but their events must come), arguments are SVM
//! pointers. Checks and error codes are those of the extension's text, revision 1.2.
//!
//! # Limits
//! `clMemBlockingFreeINTEL` waits for all queues of the context. Advice is accepted in the range that the extension
//! reserves, and zero.
//!
//! # Safety
//! As [`super::wrap`]: the program's arguments are handed on; what is read beside that OpenCL requires to be valid.

use std::ffi::c_void;

use super::capability::{Device, LARGEST_TYPE, answer, info, list};
use super::dispatch::Dispatch;
use super::faces::{self, Face};
use super::launch::{self, Where};
use super::memory::{BLOCKS, Block, Kind};
use super::objects::{self, EVENTS};
use super::stats::COUNTS;
use super::types::*;
use super::wrap::note_argument;

const HOST_ALLOC: usize = 0;
const DEVICE_ALLOC: usize = 1;
const SHARED_ALLOC: usize = 2;
const FREE: usize = 3;
const BLOCKING_FREE: usize = 4;
const SET_ARGUMENT: usize = 6;
const MIGRATE: usize = 10;
const ADVISE: usize = 11;

/// What is reserved for memory advice.
const ADVICE: std::ops::RangeInclusive<Uint> = 0x4208..=0x420F;

macro_rules! instances {
    ($face:expr, $f:ident) => {
        match $face {
            0 => $f::<0>(),
            1 => $f::<1>(),
            2 => $f::<2>(),
            3 => $f::<3>(),
            4 => $f::<4>(),
            5 => $f::<5>(),
            6 => $f::<6>(),
            7 => $f::<7>(),
            8 => $f::<8>(),
            9 => $f::<9>(),
            10 => $f::<10>(),
            11 => $f::<11>(),
            12 => $f::<12>(),
            13 => $f::<13>(),
            14 => $f::<14>(),
            _ => $f::<15>(),
        }
    };
}

/// The function that usvm provides; in the order of [`faces::NAMES`].
pub fn provided(face: usize, index: usize) -> Option<*const c_void> {
    instances!(face, all).get(index).copied()
}

/// The function that watches the driver's; `None` where there is nothing to see.
pub fn watched(face: usize, index: usize) -> Option<*const c_void> {
    matches!(index, HOST_ALLOC..=BLOCKING_FREE | SET_ARGUMENT | MIGRATE | ADVISE)
        .then(|| provided(face, index))
        .flatten()
}

fn all<const F: usize>() -> [*const c_void; faces::NAMES.len()] {
    [
        host_mem_alloc::<F> as _,
        device_mem_alloc::<F> as _,
        shared_mem_alloc::<F> as _,
        mem_free::<F> as _,
        mem_blocking_free::<F> as _,
        get_mem_alloc_info::<F> as _,
        set_kernel_arg_mem_pointer::<F> as _,
        enqueue_mem_fill::<F> as _,
        enqueue_memset::<F> as _,
        enqueue_memcpy::<F> as _,
        enqueue_migrate_mem::<F> as _,
        enqueue_mem_advise::<F> as _,
    ]
}

/// The driver's function of this index, as a `T`.
///
/// # Safety
/// `T` is the type of functions of that index.
unsafe fn native<T>(face: &Face, index: usize) -> Option<T> {
    let address = face.native.as_ref().map(|n| n.addresses[index]).filter(|a| *a != 0)?;
    const { assert!(size_of::<T>() == size_of::<usize>()) };
    // SAFETY: the driver gave this address for a function of that type, as the caller says.
    Some(unsafe { std::mem::transmute_copy(&address) })
}

/// What is asked for.
struct Request {
    kind: Kind,
    context: Handle,
    device: Handle,
    properties: *const Bitfield,
    size: usize,
    alignment: Uint,
}

unsafe extern "C" fn host_mem_alloc<const F: usize>(
    context: Handle,
    properties: *const Bitfield,
    size: usize,
    alignment: Uint,
    error: *mut Int,
) -> *mut c_void {
    let request =
        Request { kind: Kind::Host, context, device: std::ptr::null_mut(), properties, size, alignment };
    // SAFETY: the program's own arguments, for the function of this name.
    unsafe {
        allocate(F, &request, error, |face| {
            native::<HostMemAlloc>(face, HOST_ALLOC).map(|f| f(context, properties, size, alignment, error))
        })
    }
}

unsafe extern "C" fn device_mem_alloc<const F: usize>(
    context: Handle,
    device: Handle,
    properties: *const Bitfield,
    size: usize,
    alignment: Uint,
    error: *mut Int,
) -> *mut c_void {
    let request = Request { kind: Kind::Device, context, device, properties, size, alignment };
    // SAFETY: the program's own arguments, for the function of this name.
    unsafe {
        allocate(F, &request, error, |face| {
            native::<DeviceMemAlloc>(face, DEVICE_ALLOC)
                .map(|f| f(context, device, properties, size, alignment, error))
        })
    }
}

unsafe extern "C" fn shared_mem_alloc<const F: usize>(
    context: Handle,
    device: Handle,
    properties: *const Bitfield,
    size: usize,
    alignment: Uint,
    error: *mut Int,
) -> *mut c_void {
    let request = Request { kind: Kind::Shared, context, device, properties, size, alignment };
    // SAFETY: the program's own arguments, for the function of this name.
    unsafe {
        allocate(F, &request, error, |face| {
            native::<DeviceMemAlloc>(face, SHARED_ALLOC)
                .map(|f| f(context, device, properties, size, alignment, error))
        })
    }
}

/// # Safety
/// The request's properties are a list that ends with zero, or null; `error` is writable or null.
unsafe fn allocate(
    face: usize,
    request: &Request,
    error: *mut Int,
    by_driver: impl FnOnce(&Face) -> Option<*mut c_void>,
) -> *mut c_void {
    let made = match faces::get(face) {
        None => Err(INVALID_OPERATION),
        Some(face) => match by_driver(face) {
            Some(memory) => {
                note_native(request, memory);
                return memory;
            }
            // SAFETY: as the caller says.
            None => unsafe { make(face.driver(), request) },
        },
    };
    // SAFETY: as the caller says.
    unsafe {
        if !error.is_null() {
            *error = made.err().unwrap_or(SUCCESS);
        }
    }
    made.unwrap_or(std::ptr::null_mut())
}

fn note_native(request: &Request, memory: *mut c_void) {
    if !memory.is_null() {
        COUNTS.usm_native.add(1);
        BLOCKS.insert(block_of(request, memory, 0));
    }
}

fn block_of(request: &Request, memory: *mut c_void, flags: Bitfield) -> Block {
    Block {
        base: memory as usize,
        size: request.size,
        kind: request.kind,
        context: request.context as usize,
        device: request.device as usize,
        flags,
    }
}

/// # Safety
/// As [`allocate`].
unsafe fn make(driver: &Dispatch, request: &Request) -> Result<*mut c_void, Int> {
    let devices = context_devices(driver, request.context)?;
    let concerned = concerned(driver, request, &devices)?;
    let alignment = request.alignment as usize;
    if alignment != 0 && (!alignment.is_power_of_two() || alignment > LARGEST_TYPE) {
        return Err(INVALID_VALUE);
    }
    // SAFETY: as the caller says.
    let flags = unsafe { flags_of(request.properties, request.kind) }?;
    let most = concerned
        .iter()
        .filter_map(|d| info::<u64>(driver.clGetDeviceInfo, *d as Handle, DEVICE_MAX_MEM_ALLOC_SIZE).ok())
        .min()
        .unwrap_or(u64::MAX);
    if request.size == 0 || request.size as u64 > most {
        return Err(INVALID_BUFFER_SIZE);
    }
    // What every device of the context can do.
    let svm_flags = devices
        .iter()
        .map(|d| Device::query(driver, *d as Handle).svm_flags())
        .reduce(|a, b| a & b)
        .ok_or(INVALID_CONTEXT)?;
    let alloc = driver.clSVMAlloc.ok_or(INVALID_OPERATION)?;
    // SAFETY: a context that the driver knows, and checked values.
    let memory = unsafe { alloc(request.context, svm_flags, request.size, request.alignment) };
    if memory.is_null() {
        return Err(OUT_OF_HOST_MEMORY);
    }
    BLOCKS.insert(block_of(request, memory, flags));
    COUNTS.usm_provided.add(1);
    COUNTS.usm_provided_bytes.add(request.size as u64);
    Ok(memory)
}

fn context_devices(driver: &Dispatch, context: Handle) -> Result<Vec<usize>, Int> {
    if context.is_null() {
        return Err(INVALID_CONTEXT);
    }
    list(driver.clGetContextInfo, context, CONTEXT_DEVICES).map_err(|_| INVALID_CONTEXT)
}

/// The devices that a block must suit: the one it is for, or all that can have its kind.
fn concerned(driver: &Dispatch, request: &Request, devices: &[usize]) -> Result<Vec<usize>, Int> {
    let capable = |device: usize| {
        let facts = Device::query(driver, device as Handle);
        let has = |name| facts.usm(name).is_some_and(|bits| bits != 0);
        match request.kind {
            Kind::Svm => false,
            Kind::Host => has(DEVICE_HOST_MEM_CAPABILITIES),
            Kind::Device => has(DEVICE_DEVICE_MEM_CAPABILITIES),
            Kind::Shared => {
                has(DEVICE_SINGLE_SHARED_MEM_CAPABILITIES) || has(DEVICE_CROSS_SHARED_MEM_CAPABILITIES)
            }
        }
    };
    let named = request.device as usize;
    if named == 0 && request.kind == Kind::Device || named != 0 && !devices.contains(&named) {
        return Err(INVALID_DEVICE);
    }
    let asked = if named != 0 { &[named][..] } else { devices };
    let suited: Vec<usize> = asked.iter().copied().filter(|d| capable(*d)).collect();
    if suited.is_empty() { Err(INVALID_OPERATION) } else { Ok(suited) }
}

/// The allocation flags in a list of properties.
///
/// # Safety
/// The list ends with zero, or is null.
unsafe fn flags_of(properties: *const Bitfield, kind: Kind) -> Result<Bitfield, Int> {
    let mut flags = None;
    let mut at = properties;
    // SAFETY: as the caller says; a name that is not zero is followed by its value.
    while !at.is_null() && unsafe { *at } != 0 {
        // SAFETY: as above.
        let (name, value) = unsafe { (*at, *at.add(1)) };
        let placed = value & (ALLOC_PLACED_ON_DEVICE | ALLOC_PLACED_ON_HOST);
        let known = ALLOC_WRITE_COMBINED | ALLOC_PLACED_ON_DEVICE | ALLOC_PLACED_ON_HOST;
        let wrong = name != Bitfield::from(MEM_ALLOC_FLAGS)
            || flags.is_some()
            || value & !known != 0
            || placed != 0 && kind != Kind::Shared
            || placed.count_ones() > 1;
        if wrong {
            return Err(INVALID_PROPERTY);
        }
        flags = Some(value);
        at = at.wrapping_add(2);
    }
    Ok(flags.unwrap_or(0))
}

unsafe extern "C" fn mem_free<const F: usize>(context: Handle, memory: *mut c_void) -> Int {
    free(F, FREE, context, memory)
}

unsafe extern "C" fn mem_blocking_free<const F: usize>(context: Handle, memory: *mut c_void) -> Int {
    free(F, BLOCKING_FREE, context, memory)
}

fn free(face: usize, index: usize, context: Handle, memory: *mut c_void) -> Int {
    let Some(face) = faces::get(face) else { return INVALID_OPERATION };
    let is_it = |b: &Block| b.kind != Kind::Svm && b.context == context as usize;
    // SAFETY: the program's own arguments, for a function of this type.
    unsafe {
        if let Some(by_driver) = native::<MemFree>(face, index) {
            let gone = BLOCKS.remove(memory as usize, is_it);
            let result = by_driver(context, memory);
            if result != SUCCESS {
                gone.into_iter().for_each(|block| BLOCKS.insert(block));
            }
            return result;
        }
    }
    let driver = face.driver();
    if let Err(error) = context_devices(driver, context) {
        return error;
    }
    if memory.is_null() {
        return SUCCESS;
    }
    if !BLOCKS.find(memory as usize).is_some_and(|b| b.base == memory as usize && is_it(&b)) {
        return INVALID_VALUE;
    }
    if index == BLOCKING_FREE {
        finish_all(driver, context);
    }
    if BLOCKS.remove(memory as usize, is_it).is_none() {
        return INVALID_VALUE;
    }
    if let Some(svm_free) = driver.clSVMFree {
        // SAFETY: it was made by this driver's clSVMAlloc for this context, and just now taken out of the books.
        unsafe { svm_free(context, memory) };
    }
    SUCCESS
}

/// Waits for everything in the queues of a context.
fn finish_all(driver: &Dispatch, context: Handle) {
    let (Some(retain), Some(finish), Some(release)) =
        (driver.clRetainCommandQueue, driver.clFinish, driver.clReleaseCommandQueue)
    else {
        return;
    };
    // SAFETY: the queue is in the books, so the program still holds it; after that we do.
    let hold = |queue: usize| unsafe { retain(queue as Handle) } == SUCCESS;
    for queue in objects::queues_of(context as usize, hold) {
        // SAFETY: held since just now.
        unsafe {
            finish(queue as Handle);
            release(queue as Handle);
        }
    }
}

unsafe extern "C" fn get_mem_alloc_info<const F: usize>(
    context: Handle,
    pointer: *const c_void,
    name: Uint,
    size: usize,
    value: *mut c_void,
    size_ret: *mut usize,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    if let Err(error) = context_devices(face.driver(), context) {
        return error;
    }
    let of_context = |b: &Block| b.context == context as usize && b.kind != Kind::Svm;
    let block = BLOCKS.find(pointer as usize).filter(of_context);
    let word = match name {
        MEM_ALLOC_TYPE => {
            let kind = block.map_or(MEM_TYPE_UNKNOWN, |b| b.kind.usm_type());
            // SAFETY: the program's own arguments.
            return unsafe { answer(&kind.to_ne_bytes(), size, value, size_ret) };
        }
        MEM_ALLOC_BASE_PTR => block.map_or(0, |b| b.base as u64),
        MEM_ALLOC_SIZE => block.map_or(0, |b| b.size as u64),
        MEM_ALLOC_DEVICE => block.map_or(0, |b| b.device as u64),
        MEM_ALLOC_FLAGS => block.map_or(0, |b| b.flags),
        _ => return INVALID_VALUE,
    };
    // SAFETY: the program's own arguments.
    unsafe { answer(&word.to_ne_bytes(), size, value, size_ret) }
}

unsafe extern "C" fn set_kernel_arg_mem_pointer<const F: usize>(
    kernel: Handle,
    index: Uint,
    value: *const c_void,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    if kernel.is_null() {
        return INVALID_KERNEL;
    }
    // SAFETY: the program's own arguments, for a function of this type.
    let set = unsafe { native::<SetKernelArgPointer>(face, SET_ARGUMENT) };
    let Some(set) = set.or(face.driver().clSetKernelArgSVMPointer) else { return INVALID_OPERATION };
    // SAFETY: as above.
    let result = unsafe { set(kernel, index, value) };
    note_argument(result, kernel, index, value);
    result
}

/// The events before and after a command, as a program gives them.
#[derive(Clone, Copy)]
struct Events {
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
}

impl Events {
    /// Checks the queue and the list of events.
    fn check(self, driver: &Dispatch, queue: Handle) -> Result<(), Int> {
        if queue.is_null() {
            return Err(INVALID_COMMAND_QUEUE);
        }
        let context = info::<usize>(driver.clGetCommandQueueInfo, queue, QUEUE_CONTEXT);
        let context = context.map_err(|_| INVALID_COMMAND_QUEUE)?;
        if self.before.is_null() != (self.count == 0) {
            return Err(INVALID_EVENT_WAIT_LIST);
        }
        for n in 0..self.count as usize {
            // SAFETY: the program's list has that many.
            let event = unsafe { *self.before.add(n) };
            if event.is_null() {
                return Err(INVALID_EVENT_WAIT_LIST);
            }
            match info::<usize>(driver.clGetEventInfo, event, EVENT_CONTEXT) {
                Err(_) => return Err(INVALID_EVENT_WAIT_LIST),
                Ok(of) if of != context => return Err(INVALID_CONTEXT),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// The driver has queued the command, or not: its event is one of `command`.
    fn named(self, result: Int, command: Uint) -> Int {
        if result == SUCCESS && !self.after.is_null() {
            // SAFETY: the driver has filled it.
            EVENTS.create(unsafe { *self.after } as usize, command);
        }
        result
    }

    /// A command that only waits.
    fn marker(self, driver: &Dispatch, queue: Handle, command: Uint) -> Int {
        let Some(mark) = driver.clEnqueueMarkerWithWaitList else { return INVALID_OPERATION };
        // SAFETY: the program's own arguments.
        self.named(unsafe { mark(queue, self.count, self.before, self.after) }, command)
    }

    /// A command that is a hint: checked as any other, then it only waits. `known`: its own arguments are the extension's.
    fn hint(self, driver: &Dispatch, queue: Handle, known: bool, command: Uint) -> Int {
        match self.check(driver, queue) {
            Err(error) => error,
            Ok(()) if !known => INVALID_VALUE,
            Ok(()) => self.marker(driver, queue, command),
        }
    }

    /// Whether one of those before has failed already. A driver may wait for its end then.
    fn have_failed(self, driver: &Dispatch) -> bool {
        // SAFETY: the list was checked.
        let mut events = (0..self.count as usize).map(|n| unsafe { *self.before.add(n) });
        events.any(|e| {
            info::<Int>(driver.clGetEventInfo, e, EVENT_COMMAND_EXECUTION_STATUS).is_ok_and(|s| s < 0)
        })
    }

    /// A command that `enqueue` puts into the queue and whose end the program waits for, by the command's own event: its
    /// status says whether those before have failed.
    fn blocking(self, driver: &Dispatch, queue: Handle, enqueue: impl FnOnce(Self) -> Int) -> Int {
        if self.have_failed(driver) {
            return EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST;
        }
        let mut own = std::ptr::null_mut();
        let after = if self.after.is_null() { &raw mut own } else { self.after };
        let result = enqueue(Events { after, ..self });
        if result != SUCCESS {
            return result;
        }
        // SAFETY: the program's own queue; the event is the driver's, and ours to give up if the program did not want it.
        unsafe {
            driver.clFlush.map(|flush| flush(queue));
            let waited = driver.clWaitForEvents.map_or(SUCCESS, |wait| wait(1, after));
            // One that failed stays: PoCL goes on with it when those that wait are awake, and ends the process if it is gone.
            if !own.is_null() && waited == SUCCESS {
                EVENTS.release(own as usize);
                driver.clReleaseEvent.map(|release| release(own));
            }
            waited
        }
    }
}

unsafe extern "C" fn enqueue_mem_fill<const F: usize>(
    queue: Handle,
    memory: *mut c_void,
    pattern: *const c_void,
    pattern_size: usize,
    size: usize,
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    let (driver, events) = (face.driver(), Events { count, before, after });
    if let Err(error) = events.check(driver, queue) {
        return error;
    }
    let wrong = memory.is_null()
        || pattern.is_null()
        || !pattern_size.is_power_of_two()
        || pattern_size > LARGEST_TYPE
        || !(memory as usize).is_multiple_of(pattern_size)
        || !size.is_multiple_of(pattern_size);
    if wrong {
        return INVALID_VALUE;
    }
    if size == 0 {
        return events.marker(driver, queue, COMMAND_MEMFILL);
    }
    let Some(fill) = driver.clEnqueueSVMMemFill else { return INVALID_OPERATION };
    COUNTS.usm_commands.add(1);
    // SAFETY: the program's own arguments, checked.
    let result = unsafe { fill(queue, memory, pattern, pattern_size, size, count, before, after) };
    events.named(result, COMMAND_MEMFILL)
}

unsafe extern "C" fn enqueue_memset<const F: usize>(
    queue: Handle,
    memory: *mut c_void,
    value: Int,
    size: usize,
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
) -> Int {
    let byte = value as u8;
    // SAFETY: the program's own arguments; the pattern is copied before the call returns.
    unsafe { enqueue_mem_fill::<F>(queue, memory, (&raw const byte).cast(), 1, size, count, before, after) }
}

unsafe extern "C" fn enqueue_memcpy<const F: usize>(
    queue: Handle,
    blocking: Uint,
    to: *mut c_void,
    from: *const c_void,
    size: usize,
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    let (driver, events) = (face.driver(), Events { count, before, after });
    if let Err(error) = events.check(driver, queue) {
        return error;
    }
    if to.is_null() || from.is_null() {
        return INVALID_VALUE;
    }
    if size == 0 {
        let marker = |events: Events| events.marker(driver, queue, COMMAND_MEMCPY);
        return if blocking != 0 { events.blocking(driver, queue, marker) } else { marker(events) };
    }
    if (to as usize).abs_diff(from as usize) < size {
        return MEM_COPY_OVERLAP;
    }
    let Some(copy) = driver.clEnqueueSVMMemcpy else { return INVALID_OPERATION };
    COUNTS.usm_commands.add(1);
    let enqueue = |events: Events| {
        // SAFETY: the program's own arguments, checked.
        let result = unsafe { copy(queue, 0, to, from, size, count, before, events.after) };
        events.named(result, COMMAND_MEMCPY)
    };
    if blocking != 0 { events.blocking(driver, queue, enqueue) } else { enqueue(events) }
}

unsafe extern "C" fn enqueue_migrate_mem<const F: usize>(
    queue: Handle,
    pointer: *const c_void,
    size: usize,
    flags: Bitfield,
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    // SAFETY: the program's own arguments, for a function of this type.
    let by_driver = unsafe {
        native::<EnqueueMigrateMem>(face, MIGRATE)
            .map(|f| f(queue, pointer, size, flags, count, before, after))
    };
    let result = by_driver.unwrap_or_else(|| {
        let known = flags & !(MIGRATE_TO_HOST | MIGRATE_CONTENT_UNDEFINED) == 0;
        Events { count, before, after }.hint(face.driver(), queue, known, COMMAND_MIGRATEMEM)
    });
    if result == SUCCESS {
        let to = if flags & MIGRATE_TO_HOST != 0 { Where::Host } else { Where::Device };
        launch::hint(pointer as usize, size, to);
    }
    result
}

unsafe extern "C" fn enqueue_mem_advise<const F: usize>(
    queue: Handle,
    pointer: *const c_void,
    size: usize,
    advice: Uint,
    count: Uint,
    before: *const Handle,
    after: *mut Handle,
) -> Int {
    let Some(face) = faces::get(F) else { return INVALID_OPERATION };
    // SAFETY: the program's own arguments, for a function of this type.
    let by_driver = unsafe {
        native::<EnqueueMemAdvise>(face, ADVISE)
            .map(|f| f(queue, pointer, size, advice, count, before, after))
    };
    let result = by_driver.unwrap_or_else(|| {
        let known = advice == 0 || ADVICE.contains(&advice);
        Events { count, before, after }.hint(face.driver(), queue, known, COMMAND_MEMADVISE)
    });
    if result == SUCCESS {
        launch::no_advice(pointer as usize, size);
    }
    result
}
