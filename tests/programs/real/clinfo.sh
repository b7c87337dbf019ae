# heavy: clinfo on PoCL.
need clinfo
ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 || skip "pocl-opencl-icd is not installed"
export POCL_CACHE_DIR="$PWD/cache"
$RUN clinfo --raw | grep -v -e CL_DEVICE_MAX_CLOCK_FREQUENCY
