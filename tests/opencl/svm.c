/* A program that uses SVM of OpenCL 2.0 as it is on any driver: coarse-grained with map and unmap, fine-grained, fills,
   copies, migration, pointers inside pointers, a deferred free. Prints the same lines wherever it runs. With the argument
   "system" it also passes plain malloc memory to kernels, if the device says it may. */
#include "common.h"

static const char *SOURCE =
    "kernel void scale(global uint *x, uint by) { size_t i = get_global_id(0); x[i] = x[i] * by + (uint)i; }\n"
    "typedef struct { global uint *rows[16]; } table;\n"
    "kernel void gather(global const table *t, global uint *sums, uint columns) {\n"
    "    size_t r = get_global_id(0);\n"
    "    uint s = 0;\n"
    "    for (uint c = 0; c < columns; c++) { s = s * 31 + t->rows[r][c]; t->rows[r][c] ^= s; }\n"
    "    sums[r] = s;\n"
    "}\n";

enum { N = 1 << 19 };

static void CL_CALLBACK freed(cl_command_queue q, cl_uint count, void **pointers, void *user) {
    (void)q;
    CHECK(count == 1);
    clSVMFree(context, pointers[0]);
    *(volatile int *)user = 1;
}

static void coarse(cl_kernel scale) {
    uint32_t *x = clSVMAlloc(context, CL_MEM_READ_WRITE, N * 4, 0);
    CHECK(x);
    OK(clEnqueueSVMMap(queue, CL_TRUE, CL_MAP_WRITE, x, N * 4, 0, NULL, NULL));
    for (uint32_t n = 0; n < N; n++) x[n] = n ^ 0x5555;
    OK(clEnqueueSVMUnmap(queue, x, 0, NULL, NULL));
    cl_uint by = 7;
    OK(clSetKernelArgSVMPointer(scale, 0, x));
    OK(clSetKernelArg(scale, 1, sizeof by, &by));
    for (int n = 0; n < 3; n++) run(scale, N, NULL);
    OK(clEnqueueSVMMap(queue, CL_TRUE, CL_MAP_READ, x, N * 4, 0, NULL, NULL));
    printf("coarse: %016llx\n", (unsigned long long)sum_of(x, N));
    OK(clEnqueueSVMUnmap(queue, x, 0, NULL, NULL));
    const void *pointers[] = {x};
    size_t sizes[] = {N * 4};
    OK(clEnqueueSVMMigrateMem(queue, 1, pointers, sizes, 0, 0, NULL, NULL));
    OK(clEnqueueSVMMigrateMem(queue, 1, pointers, NULL, CL_MIGRATE_MEM_OBJECT_HOST, 0, NULL, NULL));
    static volatile int gone;
    void *last = x;
    OK(clEnqueueSVMFree(queue, 1, &last, freed, (void *)&gone, 0, NULL, NULL));
    OK(clFinish(queue));
    CHECK(gone);
}

static void fine(cl_kernel gather) {
    enum { COLUMNS = 3000 };
    cl_svm_mem_flags flags = CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER;
    struct { uint32_t *rows[16]; } *table = clSVMAlloc(context, flags, sizeof *table, 0);
    uint32_t *sums = clSVMAlloc(context, flags, 16 * 4, 0);
    CHECK(table && sums);
    for (uint32_t r = 0; r < 16; r++) {
        CHECK(table->rows[r] = clSVMAlloc(context, flags, COLUMNS * 4, 0));
        uint32_t pattern = r * 0x01010101u;
        OK(clEnqueueSVMMemFill(queue, table->rows[r], &pattern, 4, COLUMNS * 4, 0, NULL, NULL));
    }
    OK(clEnqueueSVMMemcpy(queue, CL_TRUE, table->rows[0], table->rows[5], COLUMNS * 4, 0, NULL, NULL));
    cl_uint columns = COLUMNS;
    OK(clSetKernelArgSVMPointer(gather, 0, table));
    OK(clSetKernelArgSVMPointer(gather, 1, sums));
    OK(clSetKernelArg(gather, 2, sizeof columns, &columns));
    OK(clSetKernelExecInfo(gather, CL_KERNEL_EXEC_INFO_SVM_PTRS, sizeof table->rows, table->rows));
    for (int n = 0; n < 4; n++) {
        run(gather, 16, NULL);
        OK(clFinish(queue));
        table->rows[n][n] += sums[n];
    }
    uint64_t all = sum_of(sums, 16);
    for (int r = 0; r < 16; r++) all ^= sum_of(table->rows[r], COLUMNS);
    printf("fine: %016llx\n", (unsigned long long)all);
    for (int r = 0; r < 16; r++) clSVMFree(context, table->rows[r]);
    clSVMFree(context, table);
    clSVMFree(context, sums);
}

static void plain(cl_kernel scale) {
    cl_device_svm_capabilities can = 0;
    OK(clGetDeviceInfo(device, CL_DEVICE_SVM_CAPABILITIES, sizeof can, &can, NULL));
    if (!(can & CL_DEVICE_SVM_FINE_GRAIN_SYSTEM)) {
        puts("system: not offered");
        return;
    }
    uint32_t *x = malloc(N * 4), on_stack[64];
    for (uint32_t n = 0; n < N; n++) x[n] = n;
    for (uint32_t n = 0; n < 64; n++) on_stack[n] = n;
    cl_bool system = CL_TRUE;
    OK(clSetKernelExecInfo(scale, CL_KERNEL_EXEC_INFO_SVM_FINE_GRAIN_SYSTEM, sizeof system, &system));
    OK(clSetKernelArgSVMPointer(scale, 0, x));
    run(scale, N, NULL);
    OK(clFinish(queue));
    OK(clSetKernelArgSVMPointer(scale, 0, on_stack));
    run(scale, 64, NULL);
    OK(clFinish(queue));
    for (uint32_t n = 0; n < N; n++) CHECK(x[n] == n * 7 + n);
    for (uint32_t n = 0; n < 64; n++) CHECK(on_stack[n] == n * 8);
    puts("system: verified");
    free(x);
}

int main(int argc, char **argv) {
    open_device();
    cl_program program = build(SOURCE);
    cl_kernel scale = kernel_of(program, "scale"), gather = kernel_of(program, "gather");
    coarse(scale);
    fine(gather);
    if (argc > 1 && strcmp(argv[1], "system") == 0) plain(scale);
    OK(clReleaseKernel(scale));
    OK(clReleaseKernel(gather));
    OK(clReleaseProgram(program));
    OK(clReleaseCommandQueue(queue));
    OK(clReleaseContext(context));
    puts("svm: verified");
    return 0;
}
