# ci: redis-server under redis-benchmark; what it holds, saves in the background and loads again.
need redis-server redis-cli redis-benchmark
requests=10000
# Its threads for I/O spin: beside the client, on two processors, they would measure the scheduler.
threads=2; [ "$BENCH" = 0 ] || threads=1
rm -f dump.rdb sock; sock=$PWD/sock
start() {
    $RUN_SERVER redis-server --port 0 --unixsocket "$sock" --save '' --io-threads $threads --io-threads-do-reads yes \
        --enable-debug-command yes --daemonize no >server.log 2>&1 &
    server=$!
    i=0; while ! redis-cli -s "$sock" ping >/dev/null 2>&1; do sleep 0.1; i=$((i + 1)); [ $i -lt 150 ] || return 1; done
}
start || { echo "the server does not start"; cat server.log; exit 1; }
keys=60000; [ "$BENCH" = 0 ] || keys=6000
awk -v n=$keys 'BEGIN { for (i = 0; i < n; i++) { printf "SET key:%d %d-%s\n", i, i * i, "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx"; if (i % 5 == 0) printf "RPUSH list:%d %d\n", i % 50, i; if (i % 7 == 0) printf "ZADD z %d m%d\n", i % 101, i } }' |
    redis-cli -s "$sock" --pipe | grep -E 'errors|replies' | tail -1
# Of a server that does not live on this machine alone, only what is exact.
$TIMED redis-benchmark -s "$sock" -q -n "${REDIS_REQUESTS:-$requests}" -c 20 -P 4 -r 5000 -t set,get,incr,lpush,rpush,lpop,sadd,hset,zadd >bench.log 2>&1 || cat bench.log
[ "$BENCH" = 0 ] || { redis-cli -s "$sock" shutdown nosave 2>/dev/null; wait $server; exit 0; }
redis-cli -s "$sock" --no-raw del mylist counter:__rand_int__ myset myhash myzset key:__rand_int__ >/dev/null
redis-cli -s "$sock" eval "for i = 0, 4999 do redis.call('del', string.format('key:%012d', i), string.format('counter:%012d', i)) end return 0" 0
redis-cli -s "$sock" dbsize
before=$(redis-cli -s "$sock" debug digest); echo "$before"
redis-cli -s "$sock" bgsave >/dev/null
i=0; while [ "$(redis-cli -s "$sock" info persistence | tr -d '\r' | grep -c '^rdb_bgsave_in_progress:1')" = 1 ]; do sleep 0.1; i=$((i + 1)); [ $i -lt 200 ] || break; done
redis-cli -s "$sock" info persistence | tr -d '\r' | grep '^rdb_last_bgsave_status'
redis-cli -s "$sock" shutdown nosave 2>/dev/null; wait $server; echo "server: $?"
start || { echo "the server does not start again"; exit 1; }
after=$(redis-cli -s "$sock" debug digest); [ "$before" = "$after" ] && echo "the same after loading"
redis-cli -s "$sock" shutdown nosave 2>/dev/null; wait $server; echo "server: $?"
