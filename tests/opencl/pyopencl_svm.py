"""SVM through pyopencl, whose wheel brings a loader of its own: fine-grained arrays that kernels and numpy share,
coarse-grained ones that are mapped, and a checksum. Prints the same line wherever it runs."""

import sys

import numpy as np
import pyopencl as cl

platform = cl.get_platforms()[0]
device = platform.get_devices()[0]
context = cl.Context([device])
queue = cl.CommandQueue(context)
program = cl.Program(
    context,
    """
    kernel void advance(global float *x, global const float *y, float a) {
        size_t i = get_global_id(0);
        x[i] = a * x[i] + y[i];
    }
    """,
).build(options=["-cl-std=CL1.2"])

n = 1 << 20
x = cl.fsvm_empty(context, n, np.float32)
y = cl.csvm_empty(context, n, np.float32)
x[:] = np.arange(n, dtype=np.float32) % 1000
with cl.SVM(y).map_rw(queue) as host:
    host[:] = np.float32(0.5)

kernel = cl.Kernel(program, "advance")
for turn in range(5):
    kernel.set_args(cl.SVM(x), cl.SVM(y), np.float32(0.5))
    cl.enqueue_nd_range_kernel(queue, kernel, (n,), None)
    queue.finish()
    x[turn] = -1.0

expected = (np.arange(n) % 1000).astype(np.float32)
for turn in range(5):
    expected = np.float32(0.5) * expected + np.float32(0.5)
    expected[turn] = -1.0
if not np.array_equal(x, expected):
    sys.exit("pyopencl: wrong result")

copied = np.empty(n, np.float32)
cl.enqueue_copy(queue, copied, cl.SVM(x))
print("pyopencl:", device.name.split("-")[0], repr(float(copied.astype(np.float64).sum())), copied.tobytes()[:16].hex())
has = "cl_intel_unified_shared_memory" in device.extensions.split()
print("pyopencl: USM", "offered" if has else "not offered", file=sys.stderr)

if "two" in sys.argv:
    import ctypes

    loader = ctypes.CDLL("libOpenCL.so.1")
    p, d = ctypes.c_void_p(), ctypes.c_void_p()
    assert loader.clGetPlatformIDs(1, ctypes.byref(p), None) == 0
    assert loader.clGetDeviceIDs(p, ctypes.c_ulong(0xFFFFFFFF), 1, ctypes.byref(d), None) == 0
    names = ctypes.create_string_buffer(8192)
    assert loader.clGetDeviceInfo(d, 0x1030, ctypes.c_size_t(8192), names, None) == 0
    offered = b"cl_intel_unified_shared_memory" in names.value.split()
    print("system's loader: USM", "offered" if offered else "not offered")
