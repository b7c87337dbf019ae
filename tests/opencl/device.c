/* What a device's memory allows, by the driver of driver.c: prints all it gets. */
#include "common.h"

int main(void) {
    cl_int e;
    open_device();
    printf("extension: %s\n", has_extension("cl_intel_unified_shared_memory") ? "yes" : "no");
    cl_device_svm_capabilities svm = 0;
    OK(clGetDeviceInfo(device, CL_DEVICE_SVM_CAPABILITIES, sizeof svm, &svm, NULL));
    cl_bitfield usm[5] = {0};
    for (cl_uint n = 0; n < 5; n++) {
        e = clGetDeviceInfo(device, CL_DEVICE_HOST_MEM_CAPABILITIES_INTEL + n, sizeof usm[n], &usm[n], NULL);
        if (e != CL_SUCCESS) usm[n] = 99;
    }
    printf("svm %llu, usm %llu %llu %llu %llu %llu\n", (unsigned long long)svm, (unsigned long long)usm[0],
           (unsigned long long)usm[1], (unsigned long long)usm[2], (unsigned long long)usm[3], (unsigned long long)usm[4]);
    clHostMemAllocINTEL_fn host_alloc = clGetExtensionFunctionAddressForPlatform(platform, "clHostMemAllocINTEL");
    clDeviceMemAllocINTEL_fn device_alloc = clGetExtensionFunctionAddressForPlatform(platform, "clDeviceMemAllocINTEL");
    clSharedMemAllocINTEL_fn shared_alloc = clGetExtensionFunctionAddressForPlatform(platform, "clSharedMemAllocINTEL");
    clMemBlockingFreeINTEL_fn blocking_free = clGetExtensionFunctionAddressForPlatform(platform, "clMemBlockingFreeINTEL");
    if (!device_alloc) {
        CHECK(!host_alloc && !shared_alloc && !blocking_free);
        puts("no functions");
        return 0;
    }
    void *h = host_alloc(context, NULL, 5000, 0, &e);
    printf("host: %d\n", e);
    void *s = shared_alloc(context, device, NULL, 6000, 0, &e);
    printf("shared: %d\n", e);
    void *d = device_alloc(context, device, NULL, 7000, 0, &e);
    printf("device: %d\n", e);
    CHECK(d);
    /* More than the device can have in one block. */
    CHECK(device_alloc(context, device, NULL, (1 << 20) + 1, 0, &e) == NULL && e == CL_INVALID_BUFFER_SIZE);

    const char *source = "";
    cl_program program = clCreateProgramWithSource(context, 1, &source, NULL, &e);
    cl_kernel kernel = kernel_of(program, "any");
    cl_bool yes = CL_TRUE;
    OK(clSetKernelArgSVMPointer(kernel, 0, d));
    run(kernel, 1, NULL);
    puts("indirectly, from here on");
    OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_INDIRECT_DEVICE_ACCESS_INTEL, sizeof yes, &yes));
    run(kernel, 1, NULL);
    void *more = device_alloc(context, device, NULL, 100, 0, &e);
    OK(e);
    run(kernel, 1, NULL);
    run(kernel, 1, NULL);
    size_t too_many = (size_t)-1;
    GIVES(CL_INVALID_GLOBAL_WORK_SIZE, clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &too_many, NULL, 0, NULL, NULL));
    cl_event wanted;
    run(kernel, 1, &wanted);
    OK(clReleaseEvent(wanted));
    OK(blocking_free(context, more));
    OK(blocking_free(context, d));
    if (h) OK(blocking_free(context, h));
    if (s) OK(blocking_free(context, s));
    OK(clReleaseKernel(kernel));

    /* The driver gives the next context the same handle: the blocks of the first are not its blocks. */
    clGetMemAllocInfoINTEL_fn info = clGetExtensionFunctionAddressForPlatform(platform, "clGetMemAllocInfoINTEL");
    void *left = device_alloc(context, device, NULL, 300, 0, &e);
    OK(e);
    size_t size = 0;
    OK(info(context, left, CL_MEM_ALLOC_SIZE_INTEL, sizeof size, &size, NULL));
    CHECK(size == 300);
    OK(clReleaseContext(context));
    CHECK(clCreateContext(NULL, 1, &device, NULL, NULL, &e) == context);
    OK(info(context, left, CL_MEM_ALLOC_SIZE_INTEL, sizeof size, &size, NULL));
    printf("of the context before: %zu bytes\n", size);
    kernel = kernel_of(program, "any");
    OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_INDIRECT_DEVICE_ACCESS_INTEL, sizeof yes, &yes));
    OK(clReleaseKernel(kernel));
    free(left);
    int *live = clGetExtensionFunctionAddressForPlatform(platform, "fakeLiveEventsFAKE");
    printf("events that nobody released: %d\n", *live);
    return 0;
}
