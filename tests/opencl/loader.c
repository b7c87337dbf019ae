/* Plays an OpenCL loader that takes the layer whose path is the argument: the table is that of the installed Khronos
   headers, so every field the layer replaces must lie where the headers have it, and what it passes on must arrive at the
   function of that name. */
#define _GNU_SOURCE
#define CL_TARGET_OPENCL_VERSION 300
#include <CL/cl_layer.h>
#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHECK(what)                                                             \
    do {                                                                        \
        if (!(what)) {                                                          \
            fprintf(stderr, "%s:%d: not true: %s\n", __FILE__, __LINE__, #what); \
            exit(1);                                                            \
        }                                                                       \
    } while (0)

enum { WORDS = sizeof(cl_icd_dispatch) / sizeof(void *), BEHIND = 8 };
typedef cl_int (*init_fn)(cl_uint, const cl_icd_dispatch *, cl_uint *, const cl_icd_dispatch **);
typedef cl_int (*init_with_fn)(cl_uint, const cl_icd_dispatch *, cl_uint *, const cl_icd_dispatch **,
                               const cl_properties *);

static const char *called;
static cl_int say_release_kernel(cl_kernel k) { (void)k; called = "clReleaseKernel"; return -71; }
static cl_int say_retain_event(cl_event e) { (void)e; called = "clRetainEvent"; return -72; }
static cl_int say_set_arg(cl_kernel k, cl_uint i, const void *v) { (void)k; (void)i; (void)v; called = "clSetKernelArgSVMPointer"; return -73; }
static cl_int say_unmap(cl_command_queue q, void *p, cl_uint n, const cl_event *w, cl_event *e) {
    (void)q, (void)p, (void)n, (void)w, (void)e;
    called = "clEnqueueSVMUnmap";
    return -74;
}
static cl_kernel say_clone(cl_kernel k, cl_int *e) { (void)k; called = "clCloneKernel"; *e = -75; return NULL; }

static const struct { const char *name; size_t offset; } replaced[] = {
#define ENTRY(name) {#name, offsetof(cl_icd_dispatch, name)}
    ENTRY(clGetPlatformInfo), ENTRY(clGetDeviceInfo), ENTRY(clGetExtensionFunctionAddress),
    ENTRY(clGetExtensionFunctionAddressForPlatform), ENTRY(clCreateContext), ENTRY(clCreateContextFromType),
    ENTRY(clCreateCommandQueue),
    ENTRY(clCreateCommandQueueWithProperties), ENTRY(clRetainCommandQueue), ENTRY(clReleaseCommandQueue),
    ENTRY(clCreateKernel), ENTRY(clCreateKernelsInProgram), ENTRY(clCloneKernel), ENTRY(clRetainKernel),
    ENTRY(clReleaseKernel), ENTRY(clSetKernelArg), ENTRY(clSetKernelArgSVMPointer), ENTRY(clSetKernelExecInfo),
    ENTRY(clEnqueueNDRangeKernel), ENTRY(clEnqueueTask), ENTRY(clSVMAlloc), ENTRY(clSVMFree), ENTRY(clEnqueueSVMFree),
    ENTRY(clEnqueueSVMMap), ENTRY(clEnqueueSVMUnmap), ENTRY(clEnqueueSVMMigrateMem), ENTRY(clGetEventInfo),
    ENTRY(clRetainEvent), ENTRY(clReleaseEvent),
#undef ENTRY
};

static int is_replaced(size_t offset) {
    for (size_t n = 0; n < sizeof replaced / sizeof *replaced; n++) {
        if (replaced[n].offset == offset) return 1;
    }
    return 0;
}

/* A whole table: what is replaced, and that calls arrive. */
static void whole(void *const *given, const cl_icd_dispatch *layer, cl_uint count) {
    CHECK(layer && count >= WORDS && count <= WORDS + BEHIND);
    for (size_t n = 0; n < WORDS; n++) {
        void *theirs = ((void *const *)layer)[n];
        if (is_replaced(n * sizeof(void *))) {
            Dl_info info;
            CHECK(theirs && theirs != given[n] && dladdr(theirs, &info) && strstr(info.dli_fname, "usvm"));
        } else {
            CHECK(theirs == NULL);
        }
    }
    cl_int e = 0;
    CHECK(layer->clReleaseKernel((cl_kernel)&e) == -71 && !strcmp(called, "clReleaseKernel"));
    CHECK(layer->clRetainEvent((cl_event)&e) == -72 && !strcmp(called, "clRetainEvent"));
    CHECK(layer->clSetKernelArgSVMPointer((cl_kernel)&e, 3, &e) == -73 && !strcmp(called, "clSetKernelArgSVMPointer"));
    CHECK(layer->clEnqueueSVMUnmap((cl_command_queue)&e, &e, 0, NULL, NULL) == -74 && !strcmp(called, "clEnqueueSVMUnmap"));
    CHECK(layer->clCloneKernel((cl_kernel)&e, &e) == NULL && e == -75 && !strcmp(called, "clCloneKernel"));
}

int main(int argc, char **argv) {
    CHECK(argc == 2);
    void *library = dlopen(argv[1], RTLD_LAZY | RTLD_LOCAL);
    if (!library) fprintf(stderr, "%s\n", dlerror());
    CHECK(library);
    pfn_clGetLayerInfo info = (pfn_clGetLayerInfo)dlsym(library, "clGetLayerInfo");
    init_fn init = (init_fn)dlsym(library, "clInitLayer");
    init_with_fn init_with = (init_with_fn)dlsym(library, "clInitLayerWithProperties");
    CHECK(info && init && init_with);

    cl_layer_api_version version = 0;
    size_t size = 0;
    char name[16] = "";
    CHECK(info(CL_LAYER_API_VERSION, sizeof version, &version, &size) == CL_SUCCESS);
    CHECK(version == CL_LAYER_API_VERSION_100 && size == sizeof version);
    CHECK(info(CL_LAYER_API_VERSION, 1, &version, NULL) == CL_INVALID_VALUE);
    CHECK(info(CL_LAYER_NAME, sizeof name, name, NULL) == CL_SUCCESS && !strcmp(name, "usvm"));
    CHECK(info(0x1234, sizeof version, &version, NULL) == CL_INVALID_VALUE);

    /* Every function is there: those of no interest somewhere in this program, never to be called. */
    static void *table[WORDS + BEHIND];
    for (int n = 0; n < WORDS + BEHIND; n++) table[n] = (void *)&main;
    cl_icd_dispatch *named = (cl_icd_dispatch *)table;
    named->clReleaseKernel = say_release_kernel;
    named->clRetainEvent = say_retain_event;
    named->clSetKernelArgSVMPointer = say_set_arg;
    named->clEnqueueSVMUnmap = say_unmap;
    named->clCloneKernel = say_clone;
    const cl_icd_dispatch *layer = NULL;
    cl_uint count = 0;
    CHECK(init(WORDS, NULL, &count, &layer) == CL_INVALID_VALUE);
    CHECK(init(WORDS, named, NULL, &layer) == CL_INVALID_VALUE);
    CHECK(init(WORDS, named, &count, NULL) == CL_INVALID_VALUE);
    CHECK(init(WORDS, named, &count, &layer) == CL_SUCCESS);
    whole(table, layer, count);
    layer = NULL;
    CHECK(init_with(WORDS + BEHIND, named, &count, &layer, NULL) == CL_SUCCESS);
    whole(table, layer, count);

    /* What the loader does not have stays away; a loader of OpenCL 1.0 has a shorter table. */
    named->clReleaseKernel = NULL;
    CHECK(init(WORDS, named, &count, &layer) == CL_SUCCESS && layer->clReleaseKernel == NULL && layer->clRetainEvent);
    cl_uint old = offsetof(cl_icd_dispatch, clSVMAlloc) / sizeof(void *);
    CHECK(init(old, named, &count, &layer) == CL_SUCCESS && count == old);
    CHECK(layer->clRetainEvent && !layer->clSVMAlloc && !layer->clEnqueueSVMMap);

    /* More loaders than the layer can tell apart: the further ones are left alone. */
    for (int n = 0; n < 12; n++) CHECK(init(WORDS, named, &count, &layer) == CL_SUCCESS);
    CHECK(count > 0 && layer && !layer->clRetainEvent);
    puts("loader: verified");
    return 0;
}
