/* A driver for tests, an ICD with one device that computes nothing: what its device says of its memory is in FAKE_SVM
   (capability bits) and FAKE_UNIFIED, and it tells on standard output what it is asked to do. */
#define CL_TARGET_OPENCL_VERSION 300
#define CL_USE_DEPRECATED_OPENCL_1_2_APIS
#include <CL/cl_icd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static cl_icd_dispatch table;
struct object { cl_icd_dispatch *dispatch; int references; };
static struct object the_platform = {&table, 1}, the_device = {&table, 1}, the_context = {&table, 1};
static int live_events;

static struct object *make(void) {
    struct object *o = malloc(sizeof *o);
    *o = (struct object){&table, 1};
    return o;
}

static unsigned long setting(const char *name) {
    const char *text = getenv(name);
    return text ? strtoul(text, NULL, 0) : 0;
}

static cl_int answer(const void *from, size_t have, size_t size, void *value, size_t *size_ret) {
    if (value && size < have) return CL_INVALID_VALUE;
    if (value) memcpy(value, from, have);
    if (size_ret) *size_ret = have;
    return CL_SUCCESS;
}
#define WORDS(text) answer(text, sizeof text, size, value, size_ret)
#define VALUE(type, x) answer(&(type){x}, sizeof(type), size, value, size_ret)

static cl_int get_platform_ids(cl_uint count, cl_platform_id *list, cl_uint *count_ret) {
    if (list && count) *list = (cl_platform_id)&the_platform;
    if (count_ret) *count_ret = 1;
    return CL_SUCCESS;
}

static cl_int platform_info(cl_platform_id p, cl_platform_info name, size_t size, void *value, size_t *size_ret) {
    (void)p;
    switch (name) {
    case CL_PLATFORM_PROFILE: return WORDS("FULL_PROFILE");
    case CL_PLATFORM_VERSION: return WORDS("OpenCL 3.0 fake");
    case CL_PLATFORM_NAME: return WORDS("Fake");
    case CL_PLATFORM_VENDOR: return WORDS("usvm's tests");
    case CL_PLATFORM_EXTENSIONS: return WORDS("cl_khr_icd");
    case CL_PLATFORM_ICD_SUFFIX_KHR: return WORDS("FAKE");
    default: return CL_INVALID_VALUE;
    }
}

static cl_int get_device_ids(cl_platform_id p, cl_device_type t, cl_uint count, cl_device_id *list, cl_uint *count_ret) {
    (void)p, (void)t;
    if (list && count) *list = (cl_device_id)&the_device;
    if (count_ret) *count_ret = 1;
    return CL_SUCCESS;
}

static cl_int device_info(cl_device_id d, cl_device_info name, size_t size, void *value, size_t *size_ret) {
    (void)d;
    switch (name) {
    case CL_DEVICE_TYPE: return VALUE(cl_device_type, CL_DEVICE_TYPE_GPU);
    case CL_DEVICE_NAME: return WORDS("fake");
    case CL_DEVICE_PLATFORM: return VALUE(cl_platform_id, (cl_platform_id)&the_platform);
    case CL_DEVICE_EXTENSIONS: return WORDS("");
    case CL_DEVICE_SVM_CAPABILITIES: return VALUE(cl_device_svm_capabilities, setting("FAKE_SVM"));
    case CL_DEVICE_HOST_UNIFIED_MEMORY: return VALUE(cl_bool, setting("FAKE_UNIFIED") != 0);
    case CL_DEVICE_MAX_MEM_ALLOC_SIZE: return VALUE(cl_ulong, 1 << 20);
    default: return CL_INVALID_VALUE;
    }
}

static cl_context create_context(const cl_context_properties *p, cl_uint n, const cl_device_id *d,
                                 void (CL_CALLBACK *f)(const char *, const void *, size_t, void *), void *u, cl_int *e) {
    (void)p, (void)n, (void)d, (void)f, (void)u;
    if (e) *e = CL_SUCCESS;
    return (cl_context)&the_context;
}

static cl_int release_context(cl_context c) { (void)c; return CL_SUCCESS; }

static cl_int context_info(cl_context c, cl_context_info name, size_t size, void *value, size_t *size_ret) {
    (void)c;
    if (name == CL_CONTEXT_DEVICES) return VALUE(cl_device_id, (cl_device_id)&the_device);
    return CL_INVALID_VALUE;
}

static cl_command_queue create_queue(cl_context c, cl_device_id d, const cl_queue_properties *p, cl_int *e) {
    (void)c, (void)d, (void)p;
    if (e) *e = CL_SUCCESS;
    return (cl_command_queue)make();
}

static cl_int queue_info(cl_command_queue q, cl_command_queue_info name, size_t size, void *value, size_t *size_ret) {
    (void)q;
    if (name == CL_QUEUE_CONTEXT) return VALUE(cl_context, (cl_context)&the_context);
    if (name == CL_QUEUE_DEVICE) return VALUE(cl_device_id, (cl_device_id)&the_device);
    return CL_INVALID_VALUE;
}

static cl_int retain_queue(cl_command_queue q) { ((struct object *)q)->references++; return CL_SUCCESS; }
static cl_int release_queue(cl_command_queue q) { ((struct object *)q)->references--; return CL_SUCCESS; }
static cl_int finish(cl_command_queue q) {
    printf("driver: finish a queue with %d references\n", ((struct object *)q)->references);
    return CL_SUCCESS;
}

static cl_kernel create_kernel(cl_program p, const char *name, cl_int *e) {
    (void)p, (void)name;
    if (e) *e = CL_SUCCESS;
    return (cl_kernel)make();
}
static cl_program create_program(cl_context c, cl_uint n, const char **s, const size_t *l, cl_int *e) {
    (void)c, (void)n, (void)s, (void)l;
    if (e) *e = CL_SUCCESS;
    return (cl_program)make();
}
static cl_int kernel_info(cl_kernel k, cl_kernel_info name, size_t size, void *value, size_t *size_ret) {
    (void)k;
    if (name == CL_KERNEL_CONTEXT) return VALUE(cl_context, (cl_context)&the_context);
    return CL_INVALID_VALUE;
}
static cl_int set_pointer(cl_kernel k, cl_uint i, const void *v) { (void)k, (void)i, (void)v; return CL_SUCCESS; }
static cl_int exec_info(cl_kernel k, cl_kernel_exec_info name, size_t size, const void *value) {
    (void)k, (void)value;
    if (name != CL_KERNEL_EXEC_INFO_SVM_PTRS) return CL_INVALID_VALUE;
    printf("driver: %zu pointers reached indirectly\n", size / sizeof(void *));
    return CL_SUCCESS;
}

static cl_int launch(cl_command_queue q, cl_kernel k, cl_uint d, const size_t *o, const size_t *g, const size_t *l,
                     cl_uint n, const cl_event *w, cl_event *e) {
    (void)q, (void)k, (void)d, (void)o, (void)g, (void)l, (void)n, (void)w;
    if (e) *e = (cl_event)make(), live_events++;
    /* A kernel of -1 items cannot be queued. */
    if (g && *g == (size_t)-1) {
        if (e) live_events--;
        return CL_INVALID_GLOBAL_WORK_SIZE;
    }
    puts("driver: launch");
    return CL_SUCCESS;
}
static cl_int set_callback(cl_event e, cl_int s, void (CL_CALLBACK *f)(cl_event, cl_int, void *), void *u) {
    (void)s;
    f(e, CL_COMPLETE, u);
    return CL_SUCCESS;
}
static cl_int release_event(cl_event e) {
    if (--((struct object *)e)->references == 0) live_events--, free(e);
    return CL_SUCCESS;
}
static cl_int release_kernel(cl_kernel k) { free(k); return CL_SUCCESS; }

static void *svm_alloc(cl_context c, cl_svm_mem_flags flags, size_t size, cl_uint alignment) {
    (void)c, (void)alignment;
    printf("driver: %zu bytes with flags %#llx\n", size, (unsigned long long)flags);
    return aligned_alloc(4096, (size + 4095) & ~(size_t)4095);
}
static void svm_free(cl_context c, void *p) { (void)c; free(p); }

static void *find(const char *name);
static void *find_for(cl_platform_id p, const char *name) { (void)p; return find(name); }

__attribute__((constructor)) static void fill(void) {
    table.clGetPlatformIDs = get_platform_ids;
    table.clGetPlatformInfo = platform_info;
    table.clGetDeviceIDs = get_device_ids;
    table.clGetDeviceInfo = device_info;
    table.clCreateContext = create_context;
    table.clReleaseContext = release_context;
    table.clGetContextInfo = context_info;
    table.clCreateCommandQueueWithProperties = create_queue;
    table.clGetCommandQueueInfo = queue_info;
    table.clRetainCommandQueue = retain_queue;
    table.clReleaseCommandQueue = release_queue;
    table.clFinish = finish;
    table.clCreateProgramWithSource = create_program;
    table.clCreateKernel = create_kernel;
    table.clReleaseKernel = release_kernel;
    table.clGetKernelInfo = kernel_info;
    table.clSetKernelArgSVMPointer = set_pointer;
    table.clSetKernelExecInfo = exec_info;
    table.clEnqueueNDRangeKernel = launch;
    table.clSetEventCallback = set_callback;
    table.clReleaseEvent = release_event;
    table.clSVMAlloc = svm_alloc;
    table.clSVMFree = svm_free;
    table.clGetExtensionFunctionAddress = find;
    table.clGetExtensionFunctionAddressForPlatform = find_for;
}

static void *live(void) { return &live_events; }

static void *find(const char *name) {
    if (strcmp(name, "clIcdGetPlatformIDsKHR") == 0) return (void *)get_platform_ids;
    if (strcmp(name, "clGetPlatformInfo") == 0) return (void *)platform_info;
    if (strcmp(name, "fakeLiveEventsFAKE") == 0) return live();
    return NULL;
}

/* What loaders look for in a driver. */
__attribute__((visibility("default"))) void *clGetExtensionFunctionAddress(const char *name) { return find(name); }
