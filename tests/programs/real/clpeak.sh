# heavy: clpeak on PoCL; its lines without the figures.
need clpeak
ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 || skip "pocl-opencl-icd is not installed"
[ "$BENCH" = 0 ] && cache=$PWD || cache=$KEEP
export POCL_CACHE_DIR="$cache/cache"
[ "$BENCH" = 0 ] || { $RUN timeout 400 clpeak --kernel-latency; exit; }
# Its double and integer parts take minutes on a processor.
$RUN timeout 400 clpeak --global-bandwidth --transfer-bandwidth --kernel-latency --compute-sp 2>&1 | sed 's/[0-9][0-9.]*\( us\)*$/N/'
