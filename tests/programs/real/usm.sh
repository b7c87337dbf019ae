# ci: OpenCL programs that need unified shared memory, on PoCL, where usvm provides it.
# without: 3
ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 && [ -e /usr/include/CL/cl.h ] ||
    skip "pocl-opencl-icd or ocl-icd-opencl-dev is not installed"
# Compiled once: under chaos the programs run, not the compiler (clpeak and pyopencl have that, too).
export POCL_CACHE_DIR="$WORK/$name/cache"
cc -O2 -o usm "$ROOT/tests/opencl/usm.c" -lOpenCL -ldl -lpthread 2>cc.log && cc -O2 -o usm_list "$ROOT/examples/opencl/usm_list.c" -lOpenCL || exit 2
for i in 1 2 3; do
    $RUN ./usm "not exact" || bad=$?
    $RUN ./usm_list | grep -v ^device:
done
exit ${bad:-0}
