# ci: NumPy with OpenBLAS on two threads.
[ -x /usr/bin/python3 ] && /usr/bin/python3 -c 'import numpy' 2>/dev/null || skip "python3-numpy is not installed"
export OPENBLAS_NUM_THREADS=2
$RUN /usr/bin/python3 - "$BENCH" <<'PY'
import hashlib, sys, numpy as np
bench = sys.argv[1] != "0"
rng = np.random.default_rng(7)
def say(name, a):
    print(name, hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest()[:16])
n = 600 if bench else 900
a, b = rng.random((n, n)), rng.random((n, n))
for i in range(1 if bench else 6):
    a = (a @ b) / 450
say("matmul", a)
say("solve", np.linalg.solve(b, a))
say("svd", np.linalg.svd(b[:n // 3, :n // 3])[1])
say("eigh", np.linalg.eigvalsh(b[:400, :400] + b[:400, :400].T))
say("fft", np.fft.fft2(b[:512, :512]))
words = rng.integers(0, 1 << 40, 300_000 if bench else 1_500_000)
say("sort", np.sort(words)); say("unique", np.unique(words % 100_003)); say("cumsum", np.cumsum(words))
say("objects", np.array(sorted(str(w) for w in words[:200_000]), dtype="S16"))
PY
