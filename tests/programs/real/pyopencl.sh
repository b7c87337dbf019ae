# ci: a pyopencl program with fine- and coarse-grained SVM on PoCL, which changes what the device computed with.
python=$ROOT/target/opencl-venv/bin/python
ls /etc/OpenCL/vendors/pocl* >/dev/null 2>&1 || skip "pocl-opencl-icd is not installed"
[ -x "$python" ] || { sh "$ROOT/tests/opencl/venv.sh" 2>/dev/null; [ -x "$python" ]; } || skip "no environment with pyopencl"
[ "$BENCH" = 0 ] && cache=$PWD || cache=$KEEP
export POCL_CACHE_DIR="$cache/cache" PYOPENCL_NO_CACHE=1
cat >svm.py <<'PY'
import hashlib, sys
import numpy as np, pyopencl as cl
rounds = int(sys.argv[1])
device = cl.get_platforms()[0].get_devices()[0]
context = cl.Context([device])
queue = cl.CommandQueue(context)
program = cl.Program(context, """
kernel void stir(global uint *x, global const uint *y, uint key) {
    size_t i = get_global_id(0);
    x[i] = (x[i] ^ y[(i * 7919) % get_global_size(0)]) * 2654435761u + key;
}
kernel void follow(global const uint *next, global uint *sum, uint steps) {
    uint at = (uint)get_global_id(0), s = 0;
    for (uint n = 0; n < steps; n++) { at = next[at]; s = s * 31 + at; }
    sum[get_global_id(0)] = s;
}""").build(options=["-cl-std=CL1.2"])
stir, follow = cl.Kernel(program, "stir"), cl.Kernel(program, "follow")
n = 1 << 19
fine, coarse = cl.fsvm_empty(context, n, np.uint32), cl.csvm_empty(context, n, np.uint32)
links, sums = cl.fsvm_empty(context, 4096, np.uint32), cl.fsvm_empty(context, 64, np.uint32)
fine[:] = np.arange(n, dtype=np.uint32)
links[:] = np.random.default_rng(3).permutation(4096).astype(np.uint32)
with cl.SVM(coarse).map_rw(queue) as host:
    host[:] = np.arange(n, dtype=np.uint32)[::-1]
expected, other = np.array(fine), np.arange(n, dtype=np.uint32)[::-1].copy()
spread = (np.arange(n, dtype=np.uint64) * 7919 % n).astype(np.int64)
digest = hashlib.sha256()
for turn in range(rounds):
    stir.set_args(cl.SVM(fine), cl.SVM(coarse), np.uint32(turn))
    cl.enqueue_nd_range_kernel(queue, stir, (n,), None)
    follow.set_args(cl.SVM(links), cl.SVM(sums), np.uint32(500))
    cl.enqueue_nd_range_kernel(queue, follow, (64,), None)
    queue.finish()
    expected = (expected ^ other[spread]) * np.uint32(2654435761) + np.uint32(turn)
    if not np.array_equal(fine, expected):
        sys.exit(f"turn {turn}: wrong at {np.flatnonzero(fine != expected)[:4]}")
    # The host edits what the device has, and takes the device's word for the list.
    fine[turn::4001] += np.uint32(turn); expected[turn::4001] += np.uint32(turn)
    links[turn % 4096], links[turn * 5 % 4096] = links[turn * 5 % 4096], links[turn % 4096]
    if turn % 8 == 0:
        with cl.SVM(coarse).map_rw(queue) as host:
            host[turn] ^= np.uint32(0xffff)
        other[turn] ^= np.uint32(0xffff)
    digest.update(sums.tobytes())
copied = np.empty(n, np.uint32)
cl.enqueue_copy(queue, copied, cl.SVM(fine))
digest.update(copied.tobytes())
print("pyopencl:", digest.hexdigest()[:32])
PY
rounds=100; [ "$BENCH" = 0 ] || rounds=10
$RUN "$python" svm.py $rounds
