//! The table of entry points that loaders, layers and drivers share.
//!
//! # Overview
//! [`Dispatch`] is `cl_icd_dispatch` of the Khronos headers: the order of its fields is an ABI, and a test compares it
//! with `offsetof`. Fields that the layer calls or replaces have their signature; the others are only carried along.
//! A field that is null stays null: nobody has that function.
//!
//! # Limits
//! A newer loader's table is longer; what is behind the last field known here is the loader's own business.
#![allow(non_snake_case)]

use std::ffi::{CStr, c_void};

use super::types::*;

macro_rules! field {
    () => { *const c_void };
    ($signature:ty) => { Option<$signature> };
}

macro_rules! dispatch {
    ($($name:ident $(: $signature:ty)?),* $(,)?) => {
        /// `cl_icd_dispatch`.
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct Dispatch {
            $(pub $name: field!($($signature)?),)*
        }

        /// The names of the fields, in order.
        pub const NAMES: &[&CStr] = &[
            $(match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("an identifier has no null byte"),
            },)*
        ];
    };
}

dispatch! {
    clGetPlatformIDs: GetPlatformIds,
    clGetPlatformInfo: GetInfo,
    clGetDeviceIDs: GetDeviceIds,
    clGetDeviceInfo: GetInfo,
    clCreateContext: CreateContext,
    clCreateContextFromType: CreateContextFromType,
    clRetainContext,
    clReleaseContext,
    clGetContextInfo: GetInfo,
    clCreateCommandQueue: CreateCommandQueue,
    clRetainCommandQueue: OnHandle,
    clReleaseCommandQueue: OnHandle,
    clGetCommandQueueInfo: GetInfo,
    clSetCommandQueueProperty,
    clCreateBuffer,
    clCreateImage2D,
    clCreateImage3D,
    clRetainMemObject,
    clReleaseMemObject,
    clGetSupportedImageFormats,
    clGetMemObjectInfo,
    clGetImageInfo,
    clCreateSampler,
    clRetainSampler,
    clReleaseSampler,
    clGetSamplerInfo,
    clCreateProgramWithSource,
    clCreateProgramWithBinary,
    clRetainProgram,
    clReleaseProgram,
    clBuildProgram,
    clUnloadCompiler,
    clGetProgramInfo,
    clGetProgramBuildInfo,
    clCreateKernel: CreateKernel,
    clCreateKernelsInProgram: CreateKernelsInProgram,
    clRetainKernel: OnHandle,
    clReleaseKernel: OnHandle,
    clSetKernelArg: SetKernelArg,
    clGetKernelInfo: GetInfo,
    clGetKernelWorkGroupInfo,
    clWaitForEvents: WaitForEvents,
    clGetEventInfo: GetInfo,
    clRetainEvent: OnHandle,
    clReleaseEvent: OnHandle,
    clGetEventProfilingInfo,
    clFlush: OnHandle,
    clFinish: OnHandle,
    clEnqueueReadBuffer,
    clEnqueueWriteBuffer,
    clEnqueueCopyBuffer,
    clEnqueueReadImage,
    clEnqueueWriteImage,
    clEnqueueCopyImage,
    clEnqueueCopyImageToBuffer,
    clEnqueueCopyBufferToImage,
    clEnqueueMapBuffer,
    clEnqueueMapImage,
    clEnqueueUnmapMemObject,
    clEnqueueNDRangeKernel: EnqueueNdRangeKernel,
    clEnqueueTask: EnqueueTask,
    clEnqueueNativeKernel,
    clEnqueueMarker,
    clEnqueueWaitForEvents,
    clEnqueueBarrier,
    clGetExtensionFunctionAddress: GetExtensionFunctionAddress,
    clCreateFromGLBuffer,
    clCreateFromGLTexture2D,
    clCreateFromGLTexture3D,
    clCreateFromGLRenderbuffer,
    clGetGLObjectInfo,
    clGetGLTextureInfo,
    clEnqueueAcquireGLObjects,
    clEnqueueReleaseGLObjects,
    clGetGLContextInfoKHR,
    clGetDeviceIDsFromD3D10KHR,
    clCreateFromD3D10BufferKHR,
    clCreateFromD3D10Texture2DKHR,
    clCreateFromD3D10Texture3DKHR,
    clEnqueueAcquireD3D10ObjectsKHR,
    clEnqueueReleaseD3D10ObjectsKHR,
    clSetEventCallback: SetEventCallback,
    clCreateSubBuffer,
    clSetMemObjectDestructorCallback,
    clCreateUserEvent,
    clSetUserEventStatus,
    clEnqueueReadBufferRect,
    clEnqueueWriteBufferRect,
    clEnqueueCopyBufferRect,
    clCreateSubDevicesEXT,
    clRetainDeviceEXT,
    clReleaseDeviceEXT,
    clCreateEventFromGLsyncKHR,
    clCreateSubDevices,
    clRetainDevice,
    clReleaseDevice,
    clCreateImage,
    clCreateProgramWithBuiltInKernels,
    clCompileProgram,
    clLinkProgram,
    clUnloadPlatformCompiler,
    clGetKernelArgInfo,
    clEnqueueFillBuffer,
    clEnqueueFillImage,
    clEnqueueMigrateMemObjects,
    clEnqueueMarkerWithWaitList: EnqueueMarker,
    clEnqueueBarrierWithWaitList,
    clGetExtensionFunctionAddressForPlatform: GetExtensionFunctionAddressForPlatform,
    clCreateFromGLTexture,
    clGetDeviceIDsFromD3D11KHR,
    clCreateFromD3D11BufferKHR,
    clCreateFromD3D11Texture2DKHR,
    clCreateFromD3D11Texture3DKHR,
    clCreateFromDX9MediaSurfaceKHR,
    clEnqueueAcquireD3D11ObjectsKHR,
    clEnqueueReleaseD3D11ObjectsKHR,
    clGetDeviceIDsFromDX9MediaAdapterKHR,
    clEnqueueAcquireDX9MediaSurfacesKHR,
    clEnqueueReleaseDX9MediaSurfacesKHR,
    clCreateFromEGLImageKHR,
    clEnqueueAcquireEGLObjectsKHR,
    clEnqueueReleaseEGLObjectsKHR,
    clCreateEventFromEGLSyncKHR,
    clCreateCommandQueueWithProperties: CreateCommandQueueWithProperties,
    clCreatePipe,
    clGetPipeInfo,
    clSVMAlloc: SvmAlloc,
    clSVMFree: SvmFree,
    clEnqueueSVMFree: EnqueueSvmFree,
    clEnqueueSVMMemcpy: EnqueueSvmMemcpy,
    clEnqueueSVMMemFill: EnqueueSvmMemFill,
    clEnqueueSVMMap: EnqueueSvmMap,
    clEnqueueSVMUnmap: EnqueueSvmUnmap,
    clCreateSamplerWithProperties,
    clSetKernelArgSVMPointer: SetKernelArgPointer,
    clSetKernelExecInfo: SetKernelExecInfo,
    clGetKernelSubGroupInfoKHR,
    clCloneKernel: CloneKernel,
    clCreateProgramWithIL,
    clEnqueueSVMMigrateMem: EnqueueSvmMigrateMem,
    clGetDeviceAndHostTimer,
    clGetHostTimer,
    clGetKernelSubGroupInfo,
    clSetDefaultDeviceCommandQueue,
    clSetProgramReleaseCallback,
    clSetProgramSpecializationConstant,
    clCreateBufferWithProperties,
    clCreateImageWithProperties,
    clSetContextDestructorCallback,
}

/// How many entries there are.
pub const ENTRIES: usize = NAMES.len();

const _: () = assert!(size_of::<Dispatch>() == ENTRIES * size_of::<usize>());

/// The same as bare addresses.
pub type Raw = [usize; ENTRIES];

impl Dispatch {
    /// A table out of addresses, zero for what is missing.
    pub const fn from_raw(raw: Raw) -> Self {
        // SAFETY: both are `ENTRIES` machine words; every field is a pointer or an optional function, for which zero is
        // null. Whoever calls one answers for the address.
        unsafe { std::mem::transmute(raw) }
    }

    /// The addresses.
    pub const fn to_raw(self) -> Raw {
        // SAFETY: as above; functions have addresses.
        unsafe { std::mem::transmute(self) }
    }
}

/// The place of the entry called `name`.
pub const fn index_of(name: &str) -> usize {
    let mut index = 0;
    while index < ENTRIES {
        if same(NAMES[index].to_bytes(), name.as_bytes()) {
            return index;
        }
        index += 1;
    }
    panic!("no such entry")
}

const fn same(a: &[u8], b: &[u8]) -> bool {
    if a.len() != b.len() {
        return false;
    }
    let mut at = 0;
    while at < a.len() {
        if a[at] != b[at] {
            return false;
        }
        at += 1;
    }
    true
}

// SAFETY: addresses of code are the same for all threads.
unsafe impl Send for Dispatch {}
// SAFETY: as above, and nothing changes a table that is shared.
unsafe impl Sync for Dispatch {}
