/* Several threads make, set, clone and launch kernels, allocate and free USM, and query, in one context; every result is
   checked. With "-" as argument only the SVM functions are used, so that it runs without USM, too. */
#include "common.h"
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

enum { THREADS = 4, TURNS = 60, N = 6000 };

static clSharedMemAllocINTEL_fn shared_alloc;
static clMemFreeINTEL_fn mem_free;
static clGetMemAllocInfoINTEL_fn alloc_info;
static cl_program program;

static const char *SOURCE =
    "kernel void add(global uint *x, global const uint *y, uint by) {\n"
    "    size_t i = get_global_id(0);\n"
    "    x[i] += y[i] * by;\n"
    "}\n";

static void *make(size_t bytes) {
    cl_int e = CL_SUCCESS;
    void *p = shared_alloc ? shared_alloc(context, device, NULL, bytes, 0, &e)
                           : clSVMAlloc(context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, bytes, 0);
    OK(e);
    CHECK(p);
    return p;
}

static void unmake(void *p) {
    if (shared_alloc) OK(mem_free(context, p));
    else clSVMFree(context, p);
}

static void *work(void *number) {
    uint32_t me = (uint32_t)(uintptr_t)number;
    cl_int e;
    cl_command_queue own = clCreateCommandQueueWithProperties(context, device, NULL, &e);
    OK(e);
    cl_kernel kernel = kernel_of(program, "add");
    uintptr_t sum = 0;
    for (uint32_t turn = 0; turn < TURNS; turn++) {
        size_t n = N + 17 * ((me + turn) % 5);
        uint32_t *x = make(n * 4), *y = make(n * 4);
        for (uint32_t i = 0; i < n; i++) x[i] = i, y[i] = i ^ me;
        cl_kernel used = turn % 3 ? kernel : clCloneKernel(kernel, &e);
        OK(clRetainKernel(used));
        OK(clSetKernelArgSVMPointer(used, 0, x));
        OK(clSetKernelArgSVMPointer(used, 1, y));
        OK(clSetKernelArg(used, 2, sizeof turn, &turn));
        cl_event done;
        OK(clEnqueueNDRangeKernel(own, used, 1, NULL, &n, NULL, 0, NULL, &done));
        OK(clReleaseKernel(used));
        if (used != kernel) OK(clReleaseKernel(used));
        if (alloc_info) {
            size_t size = 0;
            OK(alloc_info(context, x + n / 2, CL_MEM_ALLOC_SIZE_INTEL, sizeof size, &size, NULL));
            CHECK(size == n * 4);
        }
        OK(clWaitForEvents(1, &done));
        OK(clReleaseEvent(done));
        for (uint32_t i = 0; i < n; i++) {
            CHECK(x[i] == i + (i ^ me) * turn);
            sum += x[i];
        }
        unmake(x);
        unmake(y);
    }
    OK(clReleaseKernel(kernel));
    OK(clReleaseCommandQueue(own));
    return (void *)sum;
}

int main(int argc, char **argv) {
    (void)argv;
    open_device();
    if (argc == 1) {
        shared_alloc = clGetExtensionFunctionAddressForPlatform(platform, "clSharedMemAllocINTEL");
        mem_free = clGetExtensionFunctionAddressForPlatform(platform, "clMemFreeINTEL");
        alloc_info = clGetExtensionFunctionAddressForPlatform(platform, "clGetMemAllocInfoINTEL");
        CHECK(shared_alloc && mem_free && alloc_info);
    }
    program = build(SOURCE);
    pthread_t threads[THREADS];
    uintptr_t sums[THREADS];
    for (uintptr_t n = 0; n < THREADS; n++) CHECK(pthread_create(&threads[n], NULL, work, (void *)n) == 0);
    for (int n = 0; n < THREADS; n++) CHECK(pthread_join(threads[n], (void **)&sums[n]) == 0);
    for (int n = 0; n < THREADS; n++) printf("threads: %llu\n", (unsigned long long)sums[n]);
    /* A forked child that ends has nothing to tell. */
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) exit(0);
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0);
    OK(clReleaseProgram(program));
    OK(clReleaseContext(context));
    puts("threads: verified");
    return 0;
}
