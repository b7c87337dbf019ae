//! The few OpenCL types, constants and function signatures that the layer uses.
//!
//! # Overview
//! Handles are opaque pointers to the driver's objects. The numbers are those of the Khronos headers; a test compares
//! them with the headers installed. No binding crate fits: the kept ones link against a loader, and the layer must not
//! bring one into the program.

use std::ffi::{c_char, c_void};

/// Any OpenCL object.
pub type Handle = *mut c_void;
pub type Int = i32;
pub type Uint = u32;
pub type Bitfield = u64;

pub const SUCCESS: Int = 0;
pub const OUT_OF_HOST_MEMORY: Int = -6;
pub const MEM_COPY_OVERLAP: Int = -8;
pub const EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST: Int = -14;
pub const INVALID_VALUE: Int = -30;
pub const INVALID_DEVICE: Int = -33;
pub const INVALID_CONTEXT: Int = -34;
pub const INVALID_COMMAND_QUEUE: Int = -36;
pub const INVALID_KERNEL: Int = -48;
pub const INVALID_EVENT_WAIT_LIST: Int = -57;
pub const INVALID_OPERATION: Int = -59;
pub const INVALID_BUFFER_SIZE: Int = -61;
pub const INVALID_PROPERTY: Int = -64;

pub const PLATFORM_NAME: Uint = 0x0902;
pub const PLATFORM_EXTENSIONS: Uint = 0x0904;
pub const PLATFORM_EXTENSIONS_WITH_VERSION: Uint = 0x0907;

pub const DEVICE_TYPE: Uint = 0x1000;
pub const DEVICE_MAX_MEM_ALLOC_SIZE: Uint = 0x1010;
pub const DEVICE_NAME: Uint = 0x102B;
pub const DEVICE_EXTENSIONS: Uint = 0x1030;
pub const DEVICE_PLATFORM: Uint = 0x1031;
pub const DEVICE_HOST_UNIFIED_MEMORY: Uint = 0x1035;
pub const DEVICE_SVM_CAPABILITIES: Uint = 0x1053;
pub const DEVICE_EXTENSIONS_WITH_VERSION: Uint = 0x1060;
pub const DEVICE_HOST_MEM_CAPABILITIES: Uint = 0x4190;
pub const DEVICE_DEVICE_MEM_CAPABILITIES: Uint = 0x4191;
pub const DEVICE_SINGLE_SHARED_MEM_CAPABILITIES: Uint = 0x4192;
pub const DEVICE_CROSS_SHARED_MEM_CAPABILITIES: Uint = 0x4193;
pub const DEVICE_SHARED_SYSTEM_MEM_CAPABILITIES: Uint = 0x4194;

pub const DEVICE_TYPE_CPU: Bitfield = 1 << 1;
pub const DEVICE_TYPE_ALL: Bitfield = 0xFFFF_FFFF;

pub const SVM_COARSE_GRAIN_BUFFER: Bitfield = 1 << 0;
pub const SVM_FINE_GRAIN_BUFFER: Bitfield = 1 << 1;
pub const SVM_FINE_GRAIN_SYSTEM: Bitfield = 1 << 2;
pub const SVM_ATOMICS: Bitfield = 1 << 3;

pub const MEM_READ_WRITE: Bitfield = 1 << 0;
pub const MEM_SVM_FINE_GRAIN_BUFFER: Bitfield = 1 << 10;
pub const MEM_SVM_ATOMICS: Bitfield = 1 << 11;

pub const USM_ACCESS: Bitfield = 1 << 0;
pub const USM_ATOMIC: Bitfield = 1 << 1;
pub const USM_CONCURRENT: Bitfield = 1 << 2;
pub const USM_CONCURRENT_ATOMIC: Bitfield = 1 << 3;

pub const CONTEXT_DEVICES: Uint = 0x1081;
pub const QUEUE_CONTEXT: Uint = 0x1090;
pub const QUEUE_DEVICE: Uint = 0x1091;
pub const KERNEL_CONTEXT: Uint = 0x1193;
pub const EVENT_CONTEXT: Uint = 0x11D4;
pub const EVENT_COMMAND_TYPE: Uint = 0x11D1;
pub const EVENT_COMMAND_EXECUTION_STATUS: Uint = 0x11D3;
pub const COMPLETE: Int = 0;

pub const KERNEL_EXEC_INFO_SVM_PTRS: Uint = 0x11B6;
pub const KERNEL_EXEC_INFO_SVM_FINE_GRAIN_SYSTEM: Uint = 0x11B7;
pub const KERNEL_EXEC_INFO_INDIRECT_HOST: Uint = 0x4200;
pub const KERNEL_EXEC_INFO_INDIRECT_DEVICE: Uint = 0x4201;
pub const KERNEL_EXEC_INFO_INDIRECT_SHARED: Uint = 0x4202;
pub const KERNEL_EXEC_INFO_USM_PTRS: Uint = 0x4203;

pub const COMMAND_MEMFILL: Uint = 0x4204;
pub const COMMAND_MEMCPY: Uint = 0x4205;
pub const COMMAND_MIGRATEMEM: Uint = 0x4206;
pub const COMMAND_MEMADVISE: Uint = 0x4207;

pub const MEM_ALLOC_FLAGS: Uint = 0x4195;
pub const MEM_TYPE_UNKNOWN: Uint = 0x4196;
pub const MEM_TYPE_HOST: Uint = 0x4197;
pub const MEM_TYPE_DEVICE: Uint = 0x4198;
pub const MEM_TYPE_SHARED: Uint = 0x4199;
pub const MEM_ALLOC_TYPE: Uint = 0x419A;
pub const MEM_ALLOC_BASE_PTR: Uint = 0x419B;
pub const MEM_ALLOC_SIZE: Uint = 0x419C;
pub const MEM_ALLOC_DEVICE: Uint = 0x419D;

pub const ALLOC_WRITE_COMBINED: Bitfield = 1 << 0;
pub const ALLOC_PLACED_ON_DEVICE: Bitfield = 1 << 1;
pub const ALLOC_PLACED_ON_HOST: Bitfield = 1 << 2;

pub const MIGRATE_TO_HOST: Bitfield = 1 << 0;
pub const MIGRATE_CONTENT_UNDEFINED: Bitfield = 1 << 1;

pub const LAYER_API_VERSION: Uint = 0x4240;
pub const LAYER_NAME: Uint = 0x4241;
pub const LAYER_API_VERSION_100: Uint = 100;

/// One entry of the extension lists with versions.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct NameVersion {
    pub version: Uint,
    pub name: [u8; 64],
}

pub type GetInfo = unsafe extern "C" fn(Handle, Uint, usize, *mut c_void, *mut usize) -> Int;
pub type OnHandle = unsafe extern "C" fn(Handle) -> Int;
pub type GetPlatformIds = unsafe extern "C" fn(Uint, *mut Handle, *mut Uint) -> Int;
pub type GetDeviceIds = unsafe extern "C" fn(Handle, Bitfield, Uint, *mut Handle, *mut Uint) -> Int;
pub type ContextCallback = unsafe extern "C" fn(*const c_char, *const c_void, usize, *mut c_void);
pub type CreateContext = unsafe extern "C" fn(
    *const isize,
    Uint,
    *const Handle,
    Option<ContextCallback>,
    *mut c_void,
    *mut Int,
) -> Handle;
pub type CreateContextFromType =
    unsafe extern "C" fn(*const isize, Bitfield, Option<ContextCallback>, *mut c_void, *mut Int) -> Handle;
pub type CreateCommandQueue = unsafe extern "C" fn(Handle, Handle, Bitfield, *mut Int) -> Handle;
pub type CreateCommandQueueWithProperties =
    unsafe extern "C" fn(Handle, Handle, *const Bitfield, *mut Int) -> Handle;
pub type CreateKernel = unsafe extern "C" fn(Handle, *const c_char, *mut Int) -> Handle;
pub type CreateKernelsInProgram = unsafe extern "C" fn(Handle, Uint, *mut Handle, *mut Uint) -> Int;
pub type CloneKernel = unsafe extern "C" fn(Handle, *mut Int) -> Handle;
pub type SetKernelArg = unsafe extern "C" fn(Handle, Uint, usize, *const c_void) -> Int;
pub type SetKernelArgPointer = unsafe extern "C" fn(Handle, Uint, *const c_void) -> Int;
pub type SetKernelExecInfo = unsafe extern "C" fn(Handle, Uint, usize, *const c_void) -> Int;
pub type EnqueueNdRangeKernel = unsafe extern "C" fn(
    Handle,
    Handle,
    Uint,
    *const usize,
    *const usize,
    *const usize,
    Uint,
    *const Handle,
    *mut Handle,
) -> Int;
pub type EnqueueTask = unsafe extern "C" fn(Handle, Handle, Uint, *const Handle, *mut Handle) -> Int;
pub type EnqueueMarker = unsafe extern "C" fn(Handle, Uint, *const Handle, *mut Handle) -> Int;
pub type WaitForEvents = unsafe extern "C" fn(Uint, *const Handle) -> Int;
pub type EventCallback = unsafe extern "C" fn(Handle, Int, *mut c_void);
pub type SetEventCallback = unsafe extern "C" fn(Handle, Int, EventCallback, *mut c_void) -> Int;
pub type GetExtensionFunctionAddress = unsafe extern "C" fn(*const c_char) -> *const c_void;
pub type GetExtensionFunctionAddressForPlatform =
    unsafe extern "C" fn(Handle, *const c_char) -> *const c_void;
pub type SvmAlloc = unsafe extern "C" fn(Handle, Bitfield, usize, Uint) -> *mut c_void;
pub type SvmFree = unsafe extern "C" fn(Handle, *mut c_void);
pub type SvmFreeCallback = unsafe extern "C" fn(Handle, Uint, *mut *mut c_void, *mut c_void);
pub type EnqueueSvmFree = unsafe extern "C" fn(
    Handle,
    Uint,
    *mut *mut c_void,
    Option<SvmFreeCallback>,
    *mut c_void,
    Uint,
    *const Handle,
    *mut Handle,
) -> Int;
pub type EnqueueSvmMemcpy = unsafe extern "C" fn(
    Handle,
    Uint,
    *mut c_void,
    *const c_void,
    usize,
    Uint,
    *const Handle,
    *mut Handle,
) -> Int;
pub type EnqueueSvmMemFill = unsafe extern "C" fn(
    Handle,
    *mut c_void,
    *const c_void,
    usize,
    usize,
    Uint,
    *const Handle,
    *mut Handle,
) -> Int;
pub type EnqueueSvmMap =
    unsafe extern "C" fn(Handle, Uint, Bitfield, *mut c_void, usize, Uint, *const Handle, *mut Handle) -> Int;
pub type EnqueueSvmUnmap = unsafe extern "C" fn(Handle, *mut c_void, Uint, *const Handle, *mut Handle) -> Int;
pub type EnqueueSvmMigrateMem = unsafe extern "C" fn(
    Handle,
    Uint,
    *const *const c_void,
    *const usize,
    Bitfield,
    Uint,
    *const Handle,
    *mut Handle,
) -> Int;
pub type HostMemAlloc = unsafe extern "C" fn(Handle, *const Bitfield, usize, Uint, *mut Int) -> *mut c_void;
pub type DeviceMemAlloc =
    unsafe extern "C" fn(Handle, Handle, *const Bitfield, usize, Uint, *mut Int) -> *mut c_void;
pub type MemFree = unsafe extern "C" fn(Handle, *mut c_void) -> Int;
pub type EnqueueMigrateMem =
    unsafe extern "C" fn(Handle, *const c_void, usize, Bitfield, Uint, *const Handle, *mut Handle) -> Int;
pub type EnqueueMemAdvise =
    unsafe extern "C" fn(Handle, *const c_void, usize, Uint, Uint, *const Handle, *mut Handle) -> Int;
