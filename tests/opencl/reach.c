/* One launch that reaches a block of 8 MiB in one way only, named by the argument: its argument as SVM (a) or as unified
   shared memory (m); a table of its own that leads there, with the block named by the list of SVM (s) or of unified shared
   memory (u), or all blocks of its kind (k); or not named at all, and not used (-). What else the launch uses is a page. */
#include "common.h"

enum { N = 2 << 20 };

static const char source[] =
    "__kernel void direct(__global uint *block, __global ulong *sum) {\n"
    "    ulong s = 0;\n"
    "    for (uint n = 0; n < 2 << 20; n++) s += block[n];\n"
    "    *sum = s;\n"
    "}\n"
    "__kernel void table(__global ulong *table, __global ulong *sum) {\n"
    "    ulong s = 0;\n"
    "    __global uint *block = (__global uint *)table[0];\n"
    "    if (block) for (uint n = 0; n < 2 << 20; n++) s += block[n];\n"
    "    *sum = s;\n"
    "}\n";

#define ENTRY(type, name) type name = clGetExtensionFunctionAddressForPlatform(platform, #name); CHECK(name)

int main(int argc, char **argv) {
    CHECK(argc == 2);
    open_device();
    ENTRY(clSharedMemAllocINTEL_fn, clSharedMemAllocINTEL);
    ENTRY(clSetKernelArgMemPointerINTEL_fn, clSetKernelArgMemPointerINTEL);
    ENTRY(clMemBlockingFreeINTEL_fn, clMemBlockingFreeINTEL);
    char way = *argv[1];
    int is_svm = way == 'a' || way == 's', is_direct = way == 'a' || way == 'm';
    cl_int e = CL_SUCCESS;
    uint32_t *block = is_svm ? clSVMAlloc(context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, N * 4, 0)
                             : clSharedMemAllocINTEL(context, device, NULL, N * 4, 0, &e);
    OK(e);
    uint64_t *small = clSVMAlloc(context, CL_MEM_READ_WRITE | CL_MEM_SVM_FINE_GRAIN_BUFFER, 4096, 0);
    CHECK(block && small);
    uint64_t expected = 0;
    for (uint32_t n = 0; n < N; n++) expected += block[n] = n * 2654435761u;
    small[0] = way == '-' ? 0 : (uintptr_t)block;
    cl_kernel kernel = kernel_of(build(source), is_direct ? "direct" : "table");
    if (way == 'm') OK(clSetKernelArgMemPointerINTEL(kernel, 0, block));
    else OK(clSetKernelArgSVMPointer(kernel, 0, way == 'a' ? (void *)block : small));
    OK(clSetKernelArgSVMPointer(kernel, 1, small + 1));
    cl_bool yes = CL_TRUE;
    void *list[] = {block};
    if (way == 's') OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_SVM_PTRS, sizeof list, list));
    if (way == 'u') OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_USM_PTRS_INTEL, sizeof list, list));
    if (way == 'k') OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_INDIRECT_SHARED_ACCESS_INTEL, sizeof yes, &yes));
    run(kernel, 1, NULL);
    OK(clFinish(queue));
    CHECK(small[1] == (way == '-' ? 0 : expected));
    if (is_svm) clSVMFree(context, block);
    else OK(clMemBlockingFreeINTEL(context, block));
    clSVMFree(context, small);
    puts("reach: verified");
    return 0;
}
