# heavy: a Java program with threads, garbage and direct buffers.
need java javac
cat >Churn.java <<'J'
import java.nio.ByteBuffer;
import java.util.*;
import java.util.concurrent.*;
import java.util.stream.*;
public class Churn {
    public static void main(String[] args) throws Exception {
        ExecutorService pool = Executors.newFixedThreadPool(4);
        List<Future<Long>> parts = new ArrayList<>();
        int scale = args.length > 0 ? Integer.parseInt(args[0]) : 1;
        for (int p = 0; p < 16 / scale; p++) {
            final int seed = p;
            parts.add(pool.submit(() -> {
                Random random = new Random(seed);
                Map<Integer, String> map = new HashMap<>();
                ByteBuffer direct = ByteBuffer.allocateDirect(1 << 20);
                long sum = 0;
                for (int i = 0; i < 400_000; i++) {
                    map.put(random.nextInt(20_000), "v" + i);
                    if (i % 3 == 0) map.remove(random.nextInt(20_000));
                    direct.putLong((i * 8) & ((1 << 20) - 8), i ^ sum);
                    sum = sum * 31 + map.size() + direct.getLong((i * 56) & ((1 << 20) - 8));
                    try { if (i % 10_007 == 0) { Object o = null; o.hashCode(); } } catch (NullPointerException e) { sum ^= i; }
                }
                return sum;
            }));
        }
        for (Future<Long> f : parts) System.out.println(f.get());
        pool.shutdown();
        System.out.println(IntStream.range(0, 2_000_000 / scale).parallel().mapToObj(i -> "s" + (i % 5003)).distinct().sorted().limit(5).collect(Collectors.toList()));
        int[] words = new Random(5).ints(4_000_000 / scale).toArray();
        Arrays.parallelSort(words);
        System.out.println(Arrays.hashCode(words));
        System.gc();
        System.out.println(deep(0));
    }
    static int deep(int n) { try { return deep(n + 1); } catch (StackOverflowError e) { return 0; } }
}
J
[ "$BENCH" = 0 ] || {
    [ -e "$KEEP/Churn.class" ] || javac -d "$KEEP" Churn.java || exit
    $RUN java -cp "$KEEP" -Xmx400m -XX:+UseG1GC -XX:ParallelGCThreads=2 Churn 8
    exit
}
$RUN javac -J-Xmx256m Churn.java || exit
$RUN java -Xmx400m -XX:+UseG1GC -XX:ParallelGCThreads=2 Churn
$RUN java -Xmx400m -XX:+UseSerialGC Churn | cksum
