# heavy: two MPI ranks over shared memory pass buffers.
need mpicc mpirun
rounds=60; [ "$BENCH" = 0 ] || rounds=20
cat >ring.c <<'C'
#include <mpi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
int main(int argc, char **argv) {
    MPI_Init(&argc, &argv);
    int rank, size, n = 1 << 20;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    uint32_t *mine = aligned_alloc(1 << 21, n * 4ul), *theirs = malloc(n * 4ul), sum = 0;
    for (int i = 0; i < n; i++) mine[i] = (uint32_t)i * 2654435761u + rank;
    for (int round = 0; round < ROUNDS; round++) {
        int count = round % 3 ? n >> round % 7 : 100 + round;
        MPI_Sendrecv(mine, count, MPI_UINT32_T, (rank + 1) % size, round, theirs, count, MPI_UINT32_T,
                     (rank + size - 1) % size, round, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        for (int i = 0; i < count; i++) sum = sum * 31 + theirs[i], mine[i] += theirs[i] >> 3;
    }
    uint32_t *win, all[2] = {0, 0};
    MPI_Win window;
    MPI_Win_allocate(4096 * 4, 4, MPI_INFO_NULL, MPI_COMM_WORLD, &win, &window);
    memset(win, 0, 4096 * 4);
    MPI_Win_fence(0, window);
    MPI_Put(mine, 4096, MPI_UINT32_T, (rank + 1) % size, 0, 4096, MPI_UINT32_T, window);
    MPI_Win_fence(0, window);
    for (int i = 0; i < 4096; i++) sum ^= win[i] * (i + 1);
    MPI_Gather(&sum, 1, MPI_UINT32_T, all, 1, MPI_UINT32_T, 0, MPI_COMM_WORLD);
    MPI_Allreduce(MPI_IN_PLACE, mine, n, MPI_UINT32_T, MPI_SUM, MPI_COMM_WORLD);
    if (rank == 0) printf("%08x %08x %08x\n", all[0], all[1], mine[n - 1]);
    MPI_Win_free(&window);
    MPI_Finalize();
}
C
[ -x "$KEEP/ring$rounds" ] || mpicc -O2 -DROUNDS=$rounds ring.c -o "$KEEP/ring$rounds" || exit
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun --oversubscribe --mca btl self,vader -np 2 $RUN "$KEEP/ring$rounds"
