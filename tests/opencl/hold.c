/* A launch that waits for a user event, and what others do meanwhile with the 8 MiB that it will use. The argument's letters:
   h hints from another queue that they are wanted at the device while the launch waits, e the same after its end; x exits
   before the launch may begin. The processor changes every word in any case, before and after. */
#include "common.h"
#include <time.h>
#include <unistd.h>

enum { N = 2 << 20 };

static const char source[] =
    "__kernel void add(__global uint *block, __constant uint *by) { block[get_global_id(0)] += *by; }\n";

static void hint(cl_command_queue other, uint32_t *block) {
    const void *blocks[] = {block};
    size_t size = N * 4;
    OK(clEnqueueSVMMigrateMem(other, 1, blocks, &size, 0, 0, NULL, NULL));
    OK(clFinish(other));
    /* A hint is followed soon, not at once. */
    usleep(300000);
}

static void change(uint32_t *block) {
    for (uint32_t n = 0; n < N; n++) block[n] += n;
}

/* What main left behind must not hold up the end, as memory that is held for good would. */
static time_t left;

static void end(void) {
    if (left && time(NULL) - left > 7) {
        fputs("the end was held up\n", stderr);
        _exit(1);
    }
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    /* Runs after the handlers that usvm registers from now on. */
    CHECK(!atexit(end));
    const char *what = argv[1];
    open_device();
    cl_int e;
    cl_command_queue other = clCreateCommandQueueWithProperties(context, device, NULL, &e);
    OK(e);
    cl_event gate = clCreateUserEvent(context, &e);
    OK(e);
    uint32_t *block = clSVMAlloc(context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, N * 4, 0);
    uint32_t *by = clSVMAlloc(context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, 4096, 0);
    CHECK(block && by);
    memset(block, 0, N * 4);
    *by = 7;
    cl_kernel kernel = kernel_of(build(source), "add");
    OK(clSetKernelArgSVMPointer(kernel, 0, block));
    OK(clSetKernelArgSVMPointer(kernel, 1, by));
    size_t items = N, none = 0;
    /* A launch that the driver refuses holds nothing. */
    CHECK(clEnqueueNDRangeKernel(queue, kernel, 4, NULL, &none, NULL, 0, NULL, NULL) != CL_SUCCESS);
    OK(clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &items, NULL, 1, &gate, NULL));
    if (strchr(what, 'h')) hint(other, block);
    change(block);
    if (strchr(what, 'x')) {
        puts("hold: left");
        left = time(NULL);
        return 0;
    }
    OK(clSetUserEventStatus(gate, CL_COMPLETE));
    OK(clFinish(queue));
    /* That the launch is complete is told by a thread of the driver's. */
    usleep(300000);
    if (strchr(what, 'e')) hint(other, block);
    change(block);
    for (uint32_t n = 0; n < N; n++) CHECK(block[n] == 2 * n + 7);
    clSVMFree(context, block);
    clSVMFree(context, by);
    puts("hold: verified");
    return 0;
}
