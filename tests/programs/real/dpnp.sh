# heavy: dpnp on Intel's runtime for processors, from a virtual environment under target/.
DPNP=${DPNP_VENV:-$ROOT/target/venv-dpnp}
DPNP_VENV=$DPNP sh "$ROOT/tests/opencl/intel.sh" 2>/dev/null
[ -x "$DPNP/bin/python" ] || skip "dpnp cannot be had: $(cat "$ROOT/target/venv-dpnp.why")"
# The loader and the runtime of the environment, and no other driver.
export LD_LIBRARY_PATH="$DPNP/lib" OCL_ICD_FILENAMES="$DPNP/lib/libintelocl.so" OCL_ICD_VENDORS=/nonexistent
export ONEAPI_DEVICE_SELECTOR=opencl:cpu
$RUN "$DPNP/bin/python" - <<'PY'
import dpnp, dpctl, hashlib
print(dpctl.get_devices()[0].device_type)
a = dpnp.arange(1 << 20, dtype="int64")
for i in range(20):
    a = (a * 3 + i) % 1000003
print(int(dpnp.sum(a)), int(a[12345]))
b = dpnp.reshape(a[: 512 * 512], (512, 512)).astype("float64")
c = dpnp.matmul(b, b.T)
print(float(dpnp.trace(c)))
print(hashlib.sha256(dpnp.asnumpy(dpnp.sort(a))).hexdigest()[:16])
PY
