# heavy: clinfo on PoCL. What usvm makes true there (unified shared memory, system SVM) is meant to differ and left out,
# as are the clock and the memory of the moment.
# pairs: 5
need clinfo
ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 || skip "pocl-opencl-icd is not installed"
[ "$BENCH" = 0 ] && cache=$PWD || cache=$KEEP
export POCL_CACHE_DIR="$cache/cache"
$RUN clinfo --raw | sed 's/ cl_intel_unified_shared_memory\(:0x[0-9a-f]*\)\{0,1\}//' |
    grep -v -e CL_DEVICE_MAX_CLOCK_FREQUENCY -e CL_DEVICE_GLOBAL_MEM_SIZE -e CL_DEVICE_MAX_MEM_ALLOC_SIZE -e _CAPABILITIES_INTEL -e CL_DEVICE_SVM_CAPABILITIES
