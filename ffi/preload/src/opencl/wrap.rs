//! The OpenCL functions with the layer in front, one instance for each loader.
//!
//! # Overview
//! Each does what its name says by calling the loader's own, and notes or corrects what the layer is for. `N` is the
//! loader's slot.
//!
//! # Safety
//! All are called by programs with the arguments of the OpenCL function of that name, which are handed on unchanged; what
//! is read beside that (names, handles, lists) OpenCL requires to be valid.

use std::ffi::{CStr, c_char, c_void};

use super::capability::{self, Device, answer, info, list};
use super::dispatch::Dispatch;
use super::launch::{self, Launch, Where};
use super::memory::{BLOCKS, Block, Kind};
use super::objects::{self, EVENTS, KERNELS, Kernel};
use super::stats::{self, COUNTS};
use super::types::*;
use super::{faces, loaders};

/// Calls the loader's own function, which is there: otherwise ours would not have been put in front of it.
macro_rules! own {
    ($slot:expr, $name:ident($($argument:expr),*), $otherwise:expr) => {
        match loaders::target($slot).$name {
            // SAFETY: the program's own arguments.
            Some(own) => unsafe { own($($argument),*) },
            None => $otherwise,
        }
    };
}

/// The layer's entry points for the loader of slot `N`: those that `target` has.
pub fn table<const N: usize>(target: &Dispatch) -> Dispatch {
    let mut table = Dispatch::from_raw([0; super::dispatch::ENTRIES]);
    macro_rules! front {
        ($($name:ident: $ours:ident,)*) => {
            $(table.$name = target.$name.map(|_| $ours::<N> as _);)*
        };
    }
    front! {
        clGetPlatformInfo: get_platform_info,
        clGetDeviceInfo: get_device_info,
        clGetExtensionFunctionAddress: get_extension_function_address,
        clGetExtensionFunctionAddressForPlatform: get_extension_function_address_for_platform,
        clCreateContext: create_context,
        clCreateContextFromType: create_context_from_type,
        clCreateCommandQueue: create_command_queue,
        clCreateCommandQueueWithProperties: create_command_queue_with_properties,
        clRetainCommandQueue: retain_command_queue,
        clReleaseCommandQueue: release_command_queue,
        clCreateKernel: create_kernel,
        clCreateKernelsInProgram: create_kernels_in_program,
        clCloneKernel: clone_kernel,
        clRetainKernel: retain_kernel,
        clReleaseKernel: release_kernel,
        clSetKernelArg: set_kernel_arg,
        clSetKernelArgSVMPointer: set_kernel_arg_svm_pointer,
        clSetKernelExecInfo: set_kernel_exec_info,
        clEnqueueNDRangeKernel: enqueue_nd_range_kernel,
        clEnqueueTask: enqueue_task,
        clSVMAlloc: svm_alloc,
        clSVMFree: svm_free,
        clEnqueueSVMFree: enqueue_svm_free,
        clEnqueueSVMMap: enqueue_svm_map,
        clEnqueueSVMUnmap: enqueue_svm_unmap,
        clEnqueueSVMMigrateMem: enqueue_svm_migrate_mem,
        clGetEventInfo: get_event_info,
        clRetainEvent: retain_event,
        clReleaseEvent: release_event,
    }
    table
}

unsafe extern "C" fn get_platform_info<const N: usize>(
    platform: Handle,
    name: Uint,
    size: usize,
    value: *mut c_void,
    size_ret: *mut usize,
) -> Int {
    let driver = loaders::target(N);
    let all_have_it = || {
        let devices = faces::devices(driver, platform);
        !devices.is_empty() && devices.iter().all(|d| faces::is_provided(N, *d as Handle))
    };
    if matches!(name, PLATFORM_EXTENSIONS | PLATFORM_EXTENSIONS_WITH_VERSION)
        && let Ok(bytes) = list::<u8>(driver.clGetPlatformInfo, platform, name)
        && all_have_it()
    {
        let bytes = if name == PLATFORM_EXTENSIONS {
            capability::with_name(bytes)
        } else {
            capability::with_version(bytes)
        };
        // SAFETY: the program's own arguments.
        return unsafe { answer(&bytes, size, value, size_ret) };
    }
    own!(N, clGetPlatformInfo(platform, name, size, value, size_ret), INVALID_OPERATION)
}

unsafe extern "C" fn get_device_info<const N: usize>(
    device: Handle,
    name: Uint,
    size: usize,
    value: *mut c_void,
    size_ret: *mut usize,
) -> Int {
    saw_device(N, device);
    match corrected(N, device, name) {
        // SAFETY: the program's own arguments.
        Some(bytes) => unsafe { answer(&bytes, size, value, size_ret) },
        None => own!(N, clGetDeviceInfo(device, name, size, value, size_ret), INVALID_OPERATION),
    }
}

/// What a device says that the driver does not.
fn corrected(slot: usize, device: Handle, name: Uint) -> Option<Vec<u8>> {
    let driver = loaders::target(slot);
    match name {
        DEVICE_EXTENSIONS if faces::is_provided(slot, device) => {
            list(driver.clGetDeviceInfo, device, name).ok().map(capability::with_name)
        }
        DEVICE_EXTENSIONS_WITH_VERSION if faces::is_provided(slot, device) => {
            list(driver.clGetDeviceInfo, device, name).ok().map(capability::with_version)
        }
        DEVICE_SVM_CAPABILITIES => {
            let said = info::<Bitfield>(driver.clGetDeviceInfo, device, name).ok()?;
            Some((said | Device::query(driver, device).svm()).to_ne_bytes().to_vec())
        }
        DEVICE_HOST_MEM_CAPABILITIES..=DEVICE_SHARED_SYSTEM_MEM_CAPABILITIES
            if faces::is_provided(slot, device) =>
        {
            Device::query(driver, device).usm(name).map(|bits| bits.to_ne_bytes().to_vec())
        }
        _ => None,
    }
}

fn saw_device(slot: usize, device: Handle) {
    if !device.is_null() {
        stats::saw_device(device as usize, || {
            capability::describe(loaders::target(slot), device, faces::is_native(slot, device))
        });
    }
}

unsafe extern "C" fn get_extension_function_address<const N: usize>(name: *const c_char) -> *const c_void {
    // SAFETY: the program's own argument, a C string.
    match unsafe { extension_function(N, std::ptr::null_mut(), name) } {
        Some(function) => function,
        None => own!(N, clGetExtensionFunctionAddress(name), std::ptr::null()),
    }
}

unsafe extern "C" fn get_extension_function_address_for_platform<const N: usize>(
    platform: Handle,
    name: *const c_char,
) -> *const c_void {
    // SAFETY: the program's own argument, a C string.
    let ours = if platform.is_null() { None } else { unsafe { extension_function(N, platform, name) } };
    match ours {
        Some(function) => function,
        None => own!(N, clGetExtensionFunctionAddressForPlatform(platform, name), std::ptr::null()),
    }
}

/// # Safety
/// `name` is a C string or null.
unsafe fn extension_function(slot: usize, platform: Handle, name: *const c_char) -> Option<*const c_void> {
    if name.is_null() {
        return None;
    }
    // SAFETY: as the caller says.
    faces::function(slot, platform, unsafe { CStr::from_ptr(name) })
}

unsafe extern "C" fn create_context<const N: usize>(
    properties: *const isize,
    count: Uint,
    devices: *const Handle,
    callback: Option<ContextCallback>,
    user: *mut c_void,
    error: *mut Int,
) -> Handle {
    let none = std::ptr::null_mut();
    new_context(own!(N, clCreateContext(properties, count, devices, callback, user, error), none))
}

unsafe extern "C" fn create_context_from_type<const N: usize>(
    properties: *const isize,
    kind: Bitfield,
    callback: Option<ContextCallback>,
    user: *mut c_void,
    error: *mut Int,
) -> Handle {
    let none = std::ptr::null_mut();
    new_context(own!(N, clCreateContextFromType(properties, kind, callback, user, error), none))
}

/// A context whose handle was another's before does not have that one's blocks.
fn new_context(context: Handle) -> Handle {
    if !context.is_null() {
        BLOCKS.forget_context(context as usize);
    }
    context
}

unsafe extern "C" fn create_command_queue<const N: usize>(
    context: Handle,
    device: Handle,
    properties: Bitfield,
    error: *mut Int,
) -> Handle {
    let queue = own!(N, clCreateCommandQueue(context, device, properties, error), std::ptr::null_mut());
    new_queue(N, queue, context, device)
}

unsafe extern "C" fn create_command_queue_with_properties<const N: usize>(
    context: Handle,
    device: Handle,
    properties: *const Bitfield,
    error: *mut Int,
) -> Handle {
    let queue =
        own!(N, clCreateCommandQueueWithProperties(context, device, properties, error), std::ptr::null_mut());
    new_queue(N, queue, context, device)
}

fn new_queue(slot: usize, queue: Handle, context: Handle, device: Handle) -> Handle {
    if !queue.is_null() {
        objects::queue_created(queue as usize, context as usize);
        saw_device(slot, device);
    }
    queue
}

unsafe extern "C" fn retain_command_queue<const N: usize>(queue: Handle) -> Int {
    let result = own!(N, clRetainCommandQueue(queue), INVALID_OPERATION);
    if result == SUCCESS {
        objects::queue_retained(queue as usize);
    }
    result
}

unsafe extern "C" fn release_command_queue<const N: usize>(queue: Handle) -> Int {
    objects::queue_released(queue as usize);
    own!(N, clReleaseCommandQueue(queue), INVALID_OPERATION)
}

unsafe extern "C" fn create_kernel<const N: usize>(
    program: Handle,
    name: *const c_char,
    error: *mut Int,
) -> Handle {
    let kernel = own!(N, clCreateKernel(program, name, error), std::ptr::null_mut());
    if !kernel.is_null() {
        KERNELS.create(kernel as usize, Kernel::default());
    }
    kernel
}

unsafe extern "C" fn create_kernels_in_program<const N: usize>(
    program: Handle,
    count: Uint,
    kernels: *mut Handle,
    count_ret: *mut Uint,
) -> Int {
    let mut made: Uint = 0;
    let result = own!(N, clCreateKernelsInProgram(program, count, kernels, &raw mut made), INVALID_OPERATION);
    if result != SUCCESS {
        return result;
    }
    // SAFETY: the driver filled as many as there are, if there is room; the program's count is writable or null.
    unsafe {
        if !kernels.is_null() {
            for n in 0..made.min(count) as usize {
                KERNELS.create(*kernels.add(n) as usize, Kernel::default());
            }
        }
        if !count_ret.is_null() {
            *count_ret = made;
        }
    }
    result
}

unsafe extern "C" fn clone_kernel<const N: usize>(kernel: Handle, error: *mut Int) -> Handle {
    let clone = own!(N, clCloneKernel(kernel, error), std::ptr::null_mut());
    if !clone.is_null() {
        let known = KERNELS.with(kernel as usize, |k| k.clone()).unwrap_or_default();
        KERNELS.create(clone as usize, known);
    }
    clone
}

unsafe extern "C" fn retain_kernel<const N: usize>(kernel: Handle) -> Int {
    let result = own!(N, clRetainKernel(kernel), INVALID_OPERATION);
    if result == SUCCESS {
        KERNELS.retain(kernel as usize);
    }
    result
}

unsafe extern "C" fn release_kernel<const N: usize>(kernel: Handle) -> Int {
    KERNELS.release(kernel as usize);
    own!(N, clReleaseKernel(kernel), INVALID_OPERATION)
}

unsafe extern "C" fn set_kernel_arg<const N: usize>(
    kernel: Handle,
    index: Uint,
    size: usize,
    value: *const c_void,
) -> Int {
    let result = own!(N, clSetKernelArg(kernel, index, size, value), INVALID_OPERATION);
    if result == SUCCESS {
        KERNELS.with(kernel as usize, |k| k.arguments.remove(&index));
    }
    result
}

unsafe extern "C" fn set_kernel_arg_svm_pointer<const N: usize>(
    kernel: Handle,
    index: Uint,
    value: *const c_void,
) -> Int {
    let result = own!(N, clSetKernelArgSVMPointer(kernel, index, value), INVALID_OPERATION);
    note_argument(result, kernel, index, value);
    result
}

/// Remembers a pointer argument that the driver has taken.
pub fn note_argument(result: Int, kernel: Handle, index: Uint, value: *const c_void) {
    if result == SUCCESS {
        KERNELS.with_or_new(kernel as usize, |k| k.arguments.insert(index, value as usize));
    }
}

unsafe extern "C" fn set_kernel_exec_info<const N: usize>(
    kernel: Handle,
    name: Uint,
    size: usize,
    value: *const c_void,
) -> Int {
    let driver = loaders::target(N);
    let ours = matches!(name, KERNEL_EXEC_INFO_INDIRECT_HOST..=KERNEL_EXEC_INFO_USM_PTRS);
    if (ours || name == KERNEL_EXEC_INFO_SVM_PTRS)
        && let Some(context) = provided_context(N, kernel)
    {
        // SAFETY: the program's own arguments.
        return unsafe { provided_exec_info(driver, kernel, context, name, size, value) };
    }
    let result = own!(N, clSetKernelExecInfo(kernel, name, size, value), INVALID_OPERATION);
    // A driver refuses what it does not know that its devices can.
    if result == INVALID_OPERATION
        && name == KERNEL_EXEC_INFO_SVM_FINE_GRAIN_SYSTEM
        && all_reach_everything(driver, kernel)
    {
        return if size == size_of::<Uint>() && !value.is_null() { SUCCESS } else { INVALID_VALUE };
    }
    if result == SUCCESS && (ours || name == KERNEL_EXEC_INFO_SVM_PTRS) {
        let context = info::<usize>(driver.clGetKernelInfo, kernel, KERNEL_CONTEXT).unwrap_or(0);
        // SAFETY: the driver has accepted it.
        unsafe { note_exec_info(kernel, context, name, size, value) };
    }
    result
}

/// Whether all devices of the kernel's context reach all memory of the process.
fn all_reach_everything(driver: &Dispatch, kernel: Handle) -> bool {
    let Ok(context) = info::<usize>(driver.clGetKernelInfo, kernel, KERNEL_CONTEXT) else { return false };
    let devices = list::<usize>(driver.clGetContextInfo, context as Handle, CONTEXT_DEVICES);
    devices.is_ok_and(|all| {
        !all.is_empty() && all.iter().all(|d| Device::query(driver, *d as Handle).reaches_all())
    })
}

/// The context of a kernel on whose devices usvm provides USM.
fn provided_context(slot: usize, kernel: Handle) -> Option<usize> {
    let driver = loaders::target(slot);
    let context = info::<usize>(driver.clGetKernelInfo, kernel, KERNEL_CONTEXT).ok()?;
    let devices: Vec<usize> = list(driver.clGetContextInfo, context as Handle, CONTEXT_DEVICES).ok()?;
    devices.iter().any(|d| faces::is_provided(slot, *d as Handle)).then_some(context)
}

/// # Safety
/// `value` has `size` bytes or is null.
unsafe fn provided_exec_info(
    driver: &Dispatch,
    kernel: Handle,
    context: usize,
    name: Uint,
    size: usize,
    value: *const c_void,
) -> Int {
    let unit = match name {
        KERNEL_EXEC_INFO_SVM_PTRS | KERNEL_EXEC_INFO_USM_PTRS => size_of::<usize>(),
        _ => size_of::<Uint>(),
    };
    let whole = if unit == size_of::<Uint>() { size == unit } else { size.is_multiple_of(unit) };
    if !whole || size == 0 || value.is_null() {
        return INVALID_VALUE;
    }
    let before = KERNELS.with(kernel as usize, |k| k.clone());
    // SAFETY: checked above.
    unsafe { note_exec_info(kernel, context, name, size, value) };
    let pointers = KERNELS.with(kernel as usize, |k| {
        k.told = k.indirect.any().then(|| BLOCKS.changes());
        launch::all_indirect(k)
    });
    let result = launch::tell(driver, kernel, &pointers.unwrap_or_default());
    if result != SUCCESS {
        KERNELS.with(kernel as usize, |k| *k = before.unwrap_or_default());
    }
    result
}

/// # Safety
/// `value` has `size` bytes of what `name` asks for.
unsafe fn note_exec_info(kernel: Handle, context: usize, name: Uint, size: usize, value: *const c_void) {
    let pointers = || {
        // SAFETY: a list of `size` bytes, by the caller's word; programs may keep it at any address.
        (0..size / size_of::<usize>())
            .map(|n| unsafe { value.cast::<usize>().add(n).read_unaligned() })
            .collect()
    };
    // SAFETY: one `cl_bool`, by the caller's word.
    let on = || unsafe { value.cast::<Uint>().read_unaligned() } != 0;
    KERNELS.with_or_new(kernel as usize, |k| {
        k.context = context;
        match name {
            KERNEL_EXEC_INFO_SVM_PTRS => k.svm_pointers = pointers(),
            KERNEL_EXEC_INFO_USM_PTRS => k.usm_pointers = pointers(),
            KERNEL_EXEC_INFO_INDIRECT_HOST => k.indirect.host = on(),
            KERNEL_EXEC_INFO_INDIRECT_DEVICE => k.indirect.device = on(),
            KERNEL_EXEC_INFO_INDIRECT_SHARED => k.indirect.shared = on(),
            _ => {}
        }
    });
}

unsafe extern "C" fn enqueue_nd_range_kernel<const N: usize>(
    queue: Handle,
    kernel: Handle,
    dimensions: Uint,
    offset: *const usize,
    global: *const usize,
    local: *const usize,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let enqueue = |event| {
        own!(
            N,
            clEnqueueNDRangeKernel(queue, kernel, dimensions, offset, global, local, count, events, event),
            INVALID_OPERATION
        )
    };
    launched(N, queue, kernel, event, enqueue)
}

unsafe extern "C" fn enqueue_task<const N: usize>(
    queue: Handle,
    kernel: Handle,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let enqueue = |event| own!(N, clEnqueueTask(queue, kernel, count, events, event), INVALID_OPERATION);
    launched(N, queue, kernel, event, enqueue)
}

fn launched(
    slot: usize,
    queue: Handle,
    kernel: Handle,
    wanted: *mut Handle,
    enqueue: impl FnOnce(*mut Handle) -> Int,
) -> Int {
    let driver = loaders::target(slot);
    let mut launch = Launch::begin(driver, queue, kernel);
    let event = launch.event(wanted);
    let result = enqueue(event);
    // SAFETY: the event is where the driver was told to put it.
    unsafe { launch.queued(driver, result, wanted) };
    result
}

unsafe extern "C" fn svm_alloc<const N: usize>(
    context: Handle,
    flags: Bitfield,
    size: usize,
    alignment: Uint,
) -> *mut c_void {
    let memory = own!(N, clSVMAlloc(context, flags, size, alignment), std::ptr::null_mut());
    if !memory.is_null() {
        COUNTS.svm_allocations.add(1);
        BLOCKS.insert(Block {
            base: memory as usize,
            size,
            kind: Kind::Svm,
            context: context as usize,
            device: 0,
            flags,
        });
    }
    memory
}

unsafe extern "C" fn svm_free<const N: usize>(context: Handle, memory: *mut c_void) {
    BLOCKS.remove(memory as usize, |b| b.kind == Kind::Svm);
    own!(N, clSVMFree(context, memory), ());
}

unsafe extern "C" fn enqueue_svm_free<const N: usize>(
    queue: Handle,
    pointers: Uint,
    list: *mut *mut c_void,
    callback: Option<SvmFreeCallback>,
    user: *mut c_void,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let mut gone = Vec::new();
    if !list.is_null() {
        for n in 0..pointers as usize {
            // SAFETY: the program's list has that many.
            let pointer = unsafe { *list.add(n) };
            gone.extend(BLOCKS.remove(pointer as usize, |b| b.kind == Kind::Svm));
        }
    }
    let result = own!(
        N,
        clEnqueueSVMFree(queue, pointers, list, callback, user, count, events, event),
        INVALID_OPERATION
    );
    if result != SUCCESS {
        gone.into_iter().for_each(|block| BLOCKS.insert(block));
    }
    result
}

unsafe extern "C" fn enqueue_svm_map<const N: usize>(
    queue: Handle,
    blocking: Uint,
    flags: Bitfield,
    pointer: *mut c_void,
    size: usize,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let result = own!(
        N,
        clEnqueueSVMMap(queue, blocking, flags, pointer, size, count, events, event),
        INVALID_OPERATION
    );
    if result == SUCCESS {
        launch::hint(pointer as usize, size, Where::Host);
    }
    result
}

unsafe extern "C" fn enqueue_svm_unmap<const N: usize>(
    queue: Handle,
    pointer: *mut c_void,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let result = own!(N, clEnqueueSVMUnmap(queue, pointer, count, events, event), INVALID_OPERATION);
    if result == SUCCESS
        && let Some(block) = BLOCKS.find(pointer as usize)
    {
        launch::hint(block.base, block.size, Where::Device);
    }
    result
}

unsafe extern "C" fn enqueue_svm_migrate_mem<const N: usize>(
    queue: Handle,
    pointers: Uint,
    list: *const *const c_void,
    sizes: *const usize,
    flags: Bitfield,
    count: Uint,
    events: *const Handle,
    event: *mut Handle,
) -> Int {
    let result = own!(
        N,
        clEnqueueSVMMigrateMem(queue, pointers, list, sizes, flags, count, events, event),
        INVALID_OPERATION
    );
    if result != SUCCESS {
        return result;
    }
    let to = if flags & MIGRATE_TO_HOST != 0 { Where::Host } else { Where::Device };
    for n in 0..pointers as usize {
        // SAFETY: the driver has accepted the lists, which have that many; sizes may be null.
        let (pointer, size) =
            unsafe { (*list.add(n) as usize, if sizes.is_null() { 0 } else { *sizes.add(n) }) };
        match BLOCKS.find(pointer) {
            Some(block) if size == 0 => launch::hint(block.base, block.size, to),
            _ => launch::hint(pointer, size, to),
        }
    }
    result
}

unsafe extern "C" fn get_event_info<const N: usize>(
    event: Handle,
    name: Uint,
    size: usize,
    value: *mut c_void,
    size_ret: *mut usize,
) -> Int {
    if name == EVENT_COMMAND_TYPE
        && let Some(command) = EVENTS.with(event as usize, |command| *command)
    {
        // SAFETY: the program's own arguments.
        return unsafe { answer(&command.to_ne_bytes(), size, value, size_ret) };
    }
    own!(N, clGetEventInfo(event, name, size, value, size_ret), INVALID_OPERATION)
}

unsafe extern "C" fn retain_event<const N: usize>(event: Handle) -> Int {
    let result = own!(N, clRetainEvent(event), INVALID_OPERATION);
    if result == SUCCESS {
        EVENTS.retain(event as usize);
    }
    result
}

unsafe extern "C" fn release_event<const N: usize>(event: Handle) -> Int {
    EVENTS.release(event as usize);
    own!(N, clReleaseEvent(event), INVALID_OPERATION)
}
