/* An ordinary OpenCL program with unified shared memory: a vector addition on shared memory, and a linked list that the
   host builds, the device walks and changes, and the host walks again. Nothing in it knows of usvm.

   cc -O2 usm_list.c -o usm_list -lOpenCL */
#define CL_TARGET_OPENCL_VERSION 300
#include <CL/cl.h>
#include <CL/cl_ext.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define OK(call)                                                  \
    do {                                                          \
        cl_int error = (call);                                    \
        if (error != CL_SUCCESS) {                                \
            fprintf(stderr, "%s: error %d\n", #call, error);      \
            exit(1);                                              \
        }                                                         \
    } while (0)

enum { ITEMS = 1 << 20, NODES = 10000 };

typedef struct node {
    struct node *next;
    cl_ulong value;
} node;

static const char *source =
    "typedef struct node { global struct node *next; ulong value; } node;\n"
    "kernel void add(global const float *a, global const float *b, global float *c) {\n"
    "    size_t i = get_global_id(0);\n"
    "    c[i] = a[i] + b[i];\n"
    "}\n"
    "kernel void square_all(global node *head) {\n"
    "    for (global node *n = head; n; n = n->next) n->value *= n->value;\n"
    "}\n";

int main(void) {
    cl_platform_id platform;
    cl_device_id device;
    char name[128], extensions[8192];
    cl_int error;
    OK(clGetPlatformIDs(1, &platform, NULL));
    OK(clGetDeviceIDs(platform, CL_DEVICE_TYPE_ALL, 1, &device, NULL));
    OK(clGetDeviceInfo(device, CL_DEVICE_NAME, sizeof name, name, NULL));
    OK(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS, sizeof extensions, extensions, NULL));
    printf("device: %s\n", name);
    if (!strstr(extensions, "cl_intel_unified_shared_memory")) {
        puts("it has no unified shared memory (cl_intel_unified_shared_memory); this program needs it");
        return 1;
    }
    clSharedMemAllocINTEL_fn shared_alloc = clGetExtensionFunctionAddressForPlatform(platform, "clSharedMemAllocINTEL");
    clMemFreeINTEL_fn mem_free = clGetExtensionFunctionAddressForPlatform(platform, "clMemFreeINTEL");
    clSetKernelArgMemPointerINTEL_fn set_pointer =
        clGetExtensionFunctionAddressForPlatform(platform, "clSetKernelArgMemPointerINTEL");
    if (!shared_alloc || !mem_free || !set_pointer) {
        puts("its functions are missing");
        return 1;
    }

    cl_context context = clCreateContext(NULL, 1, &device, NULL, NULL, &error);
    OK(error);
    cl_command_queue queue = clCreateCommandQueueWithProperties(context, device, NULL, &error);
    OK(error);
    cl_program program = clCreateProgramWithSource(context, 1, &source, NULL, &error);
    OK(error);
    OK(clBuildProgram(program, 1, &device, "", NULL, NULL));

    /* The same pointers on both sides; no buffers, no mapping. */
    float *vector[3];
    for (int v = 0; v < 3; v++) {
        vector[v] = shared_alloc(context, device, NULL, ITEMS * sizeof(float), 0, &error);
        OK(error);
    }
    for (int i = 0; i < ITEMS; i++) vector[0][i] = (float)i, vector[1][i] = (float)(2 * i);
    cl_kernel add = clCreateKernel(program, "add", &error);
    OK(error);
    for (cl_uint v = 0; v < 3; v++) OK(set_pointer(add, v, vector[v]));
    size_t items = ITEMS;
    OK(clEnqueueNDRangeKernel(queue, add, 1, NULL, &items, NULL, 0, NULL, NULL));
    OK(clFinish(queue));
    int wrong = 0;
    for (int i = 0; i < ITEMS; i++) wrong += vector[2][i] != (float)i + (float)(2 * i);

    /* Pointers in memory mean the same on both sides, too. */
    node *head = NULL;
    for (cl_ulong n = 0; n < NODES; n++) {
        node *fresh = shared_alloc(context, device, NULL, sizeof *fresh, 0, &error);
        OK(error);
        *fresh = (node){head, n};
        head = fresh;
    }
    cl_kernel square = clCreateKernel(program, "square_all", &error);
    OK(error);
    cl_bool yes = CL_TRUE;
    OK(clSetKernelExecInfo(square, CL_KERNEL_EXEC_INFO_INDIRECT_SHARED_ACCESS_INTEL, sizeof yes, &yes));
    OK(set_pointer(square, 0, head));
    size_t one = 1;
    OK(clEnqueueNDRangeKernel(queue, square, 1, NULL, &one, NULL, 0, NULL, NULL));
    OK(clFinish(queue));
    cl_ulong expected = NODES;
    while (head) {
        node *next = head->next;
        expected--;
        wrong += head->value != expected * expected;
        OK(mem_free(context, head));
        head = next;
    }
    wrong += expected != 0;
    for (int v = 0; v < 3; v++) OK(mem_free(context, vector[v]));

    printf("%d additions and a list of %d nodes in shared memory: %s\n", ITEMS, NODES, wrong ? "WRONG" : "verified");
    OK(clReleaseKernel(add));
    OK(clReleaseKernel(square));
    OK(clReleaseProgram(program));
    OK(clReleaseCommandQueue(queue));
    OK(clReleaseContext(context));
    return wrong != 0;
}
