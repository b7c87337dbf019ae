/* What the OpenCL test programs share: the first device, its queue, and checks that say what failed. */
#define CL_TARGET_OPENCL_VERSION 300
#define CL_USE_DEPRECATED_OPENCL_1_1_APIS
#include <CL/cl.h>
#include <CL/cl_ext.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FAIL(...)                                         \
    do {                                                  \
        fprintf(stderr, "%s:%d: ", __FILE__, __LINE__);   \
        fprintf(stderr, __VA_ARGS__);                     \
        fputc('\n', stderr);                              \
        exit(1);                                          \
    } while (0)
#define CHECK(what)                                       \
    do {                                                  \
        if (!(what)) FAIL("not true: %s", #what);         \
    } while (0)
#define OK(call)                                          \
    do {                                                  \
        cl_int e_ = (call);                               \
        if (e_ != CL_SUCCESS) FAIL("%s gave %d", #call, e_); \
    } while (0)
/* The call must give exactly this error. */
#define GIVES(error, call)                                \
    do {                                                  \
        cl_int e_ = (call);                               \
        if (e_ != (error)) FAIL("%s gave %d, not %s", #call, e_, #error); \
    } while (0)

__attribute__((unused)) static cl_platform_id platform;
__attribute__((unused)) static cl_device_id device;
__attribute__((unused)) static cl_context context;
__attribute__((unused)) static cl_command_queue queue;

static inline void open_device(void) {
    cl_int e;
    OK(clGetPlatformIDs(1, &platform, NULL));
    OK(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL));
    context = clCreateContext(NULL, 1, &device, NULL, NULL, &e);
    OK(e);
    queue = clCreateCommandQueueWithProperties(context, device, NULL, &e);
    OK(e);
}

static inline cl_program build(const char *source) {
    cl_int e;
    cl_program program = clCreateProgramWithSource(context, 1, &source, NULL, &e);
    OK(e);
    e = clBuildProgram(program, 1, &device, "-cl-std=CL1.2", NULL, NULL);
    if (e != CL_SUCCESS) {
        char log[4096] = "";
        clGetProgramBuildInfo(program, device, CL_PROGRAM_BUILD_LOG, sizeof log - 1, log, NULL);
        FAIL("build: %d\n%s", e, log);
    }
    return program;
}

static inline cl_kernel kernel_of(cl_program program, const char *name) {
    cl_int e;
    cl_kernel kernel = clCreateKernel(program, name, &e);
    OK(e);
    return kernel;
}

static inline void run(cl_kernel kernel, size_t items, cl_event *event) {
    OK(clEnqueueNDRangeKernel(queue, kernel, 1, NULL, &items, NULL, 0, NULL, event));
}

static inline uint64_t sum_of(const uint32_t *words, size_t count) {
    uint64_t sum = 14695981039346656037u;
    for (size_t n = 0; n < count; n++) sum = (sum ^ words[n]) * 1099511628211u;
    return sum;
}

static inline int has_extension(const char *name) {
    size_t size;
    OK(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, 0, NULL, &size));
    char *all = malloc(size);
    OK(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, size, all, NULL));
    CHECK(strlen(all) + 1 == size);
    int found = strstr(all, name) != NULL;
    free(all);
    return found;
}
