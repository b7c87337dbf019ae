"""An ordinary dpnp program: arrays in USM, computed by SYCL kernels through DPC++'s OpenCL adapter."""

import hashlib

import dpctl
import dpnp as np

queue = dpctl.SyclQueue("opencl:cpu")
print("device:", queue.sycl_device.name)

n = 1 << 20
x = np.arange(n, dtype=np.float64, sycl_queue=queue) % 1009
y = np.sqrt(x) * 3.0 + np.sin(x)
for _ in range(5):
    y = np.where(y > 1.0, y * 0.5, y + x)
matrix = np.reshape(x[: 256 * 256], (256, 256))
product = matrix @ matrix.T
order = np.sort(y)[:: n // 8]

shared = np.zeros(1000, dtype=np.int64, usm_type="shared", sycl_queue=queue)
shared += np.arange(1000, dtype=np.int64, usm_type="shared", sycl_queue=queue)

digest = hashlib.sha256()
for result in (y, product, order, shared):
    digest.update(np.asnumpy(result).tobytes())
print("sum:", int(shared.sum()), "trace:", float(np.trace(product)))
print("sha256:", digest.hexdigest())
