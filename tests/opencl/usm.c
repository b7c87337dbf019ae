/* A program that needs cl_intel_unified_shared_memory: every function of the extension, its queries and its errors.
   Prints the same lines wherever it runs; exits with 3 where the device has no USM. */
#include "common.h"
#include <pthread.h>
#include <unistd.h>

static clHostMemAllocINTEL_fn host_alloc;
static clDeviceMemAllocINTEL_fn device_alloc;
static clSharedMemAllocINTEL_fn shared_alloc;
static clMemFreeINTEL_fn mem_free;
static clMemBlockingFreeINTEL_fn blocking_free;
static clGetMemAllocInfoINTEL_fn alloc_info;
static clSetKernelArgMemPointerINTEL_fn set_pointer;
static clEnqueueMemFillINTEL_fn fill;
static clEnqueueMemsetINTEL_fn set;
static clEnqueueMemcpyINTEL_fn copy;
static clEnqueueMigrateMemINTEL_fn migrate;
static clEnqueueMemAdviseINTEL_fn advise;

static const char *SOURCE =
    "kernel void add(global const uint *a, global const uint *b, global uint *c) {\n"
    "    size_t i = get_global_id(0);\n"
    "    c[i] = a[i] + 3 * b[i];\n"
    "}\n"
    "typedef struct node { global struct node *next; ulong value; } node;\n"
    "kernel void walk(global node *head, global ulong *sum) {\n"
    "    ulong s = 0;\n"
    "    for (global node *n = head; n; n = n->next) { s += n->value; n->value = s; }\n"
    "    *sum = s;\n"
    "}\n"
    "kernel void shared_counter(volatile global int *counter) { atomic_inc(counter); }\n";

/* Before revision 1.2 of the extension, no flag at all was an error. */
static cl_mem_migration_flags to_device = CL_MIGRATE_MEM_OBJECT_HOST;
static cl_mem_advice_intel no_advice = 0x4208;

/* Drivers of their own have oddities of their own; any argument spares them what is not the same everywhere. */
static int exact;

static void *find(const char *name) {
    void *f = clGetExtensionFunctionAddressForPlatform(platform, name);
    if (!f) {
        printf("no %s\n", name);
        exit(3);
    }
    return f;
}

static void find_all(void) {
    host_alloc = find("clHostMemAllocINTEL");
    device_alloc = find("clDeviceMemAllocINTEL");
    shared_alloc = find("clSharedMemAllocINTEL");
    mem_free = find("clMemFreeINTEL");
    blocking_free = find("clMemBlockingFreeINTEL");
    alloc_info = find("clGetMemAllocInfoINTEL");
    set_pointer = find("clSetKernelArgMemPointerINTEL");
    fill = find("clEnqueueMemFillINTEL");
    set = find("clEnqueueMemsetINTEL");
    copy = find("clEnqueueMemcpyINTEL");
    migrate = find("clEnqueueMigrateMemINTEL");
    advise = find("clEnqueueMemAdviseINTEL");
    CHECK(clGetExtensionFunctionAddressForPlatform(platform, "clNoSuchFunctionINTEL") == NULL);
}

/* The older way to a function, without a platform. */
static void find_by_name_alone(void) {
    clSharedMemAllocINTEL_fn alloc = clGetExtensionFunctionAddress("clSharedMemAllocINTEL");
    clMemFreeINTEL_fn unmake = clGetExtensionFunctionAddress("clMemFreeINTEL");
    CHECK(alloc && unmake && clGetExtensionFunctionAddress("clNoSuchFunctionINTEL") == NULL);
    cl_int e;
    char *p = alloc(context, device, NULL, 100, 0, &e);
    OK(e);
    p[99] = 1;
    OK(unmake(context, p));
}

static void capabilities(void) {
    const cl_device_info names[] = {
        CL_DEVICE_HOST_MEM_CAPABILITIES_INTEL,
        CL_DEVICE_DEVICE_MEM_CAPABILITIES_INTEL,
        CL_DEVICE_SINGLE_DEVICE_SHARED_MEM_CAPABILITIES_INTEL,
    };
    for (int n = 0; n < 3; n++) {
        cl_device_unified_shared_memory_capabilities_intel bits = 0;
        size_t size = 0;
        OK(clGetDeviceInfo(device, names[n], sizeof bits, &bits, &size));
        CHECK(size == sizeof bits && bits & CL_UNIFIED_SHARED_MEMORY_ACCESS_INTEL);
        GIVES(CL_INVALID_VALUE, clGetDeviceInfo(device, names[n], 1, &bits, NULL));
    }
    size_t size;
    OK(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS_WITH_VERSION, 0, NULL, &size));
    cl_name_version *all = malloc(size);
    OK(clGetDeviceInfo(device, CL_DEVICE_EXTENSIONS_WITH_VERSION, size, all, NULL));
    int found = 0;
    for (size_t n = 0; n < size / sizeof *all; n++) {
        if (strcmp(all[n].name, "cl_intel_unified_shared_memory") != 0) continue;
        found++;
        if (all[n].version >= CL_MAKE_VERSION(1, 2, 0)) to_device = 0, no_advice = 0;
    }
    CHECK(found == 1);
    free(all);
    puts("capabilities: told");
}

static void vectors(cl_program program) {
    enum { N = 1 << 18 };
    size_t bytes = N * sizeof(uint32_t);
    cl_int e;
    uint32_t *a = host_alloc(context, NULL, bytes, 0, &e);
    OK(e);
    uint32_t *b = device_alloc(context, device, NULL, bytes, 64, &e);
    OK(e);
    uint32_t *c = shared_alloc(context, device, NULL, bytes, 128, &e);
    OK(e);
    CHECK(((uintptr_t)b & 63) == 0 && ((uintptr_t)c & 127) == 0);
    uint32_t *plain = malloc(bytes);
    for (uint32_t n = 0; n < N; n++) a[n] = n * 2654435761u, plain[n] = ~n;

    cl_event copied, launched;
    OK(copy(queue, CL_FALSE, b, plain, bytes, 0, NULL, &copied));
    cl_kernel add = kernel_of(program, "add");
    OK(set_pointer(add, 0, a));
    OK(set_pointer(add, 1, b));
    OK(set_pointer(add, 2, c));
    GIVES(CL_INVALID_ARG_INDEX, set_pointer(add, 3, c));
    size_t items = N;
    OK(clEnqueueNDRangeKernel(queue, add, 1, NULL, &items, NULL, 1, &copied, &launched));
    OK(clWaitForEvents(1, &launched));
    for (uint32_t n = 0; n < N; n++) CHECK(c[n] == n * 2654435761u + 3 * ~n);

    cl_command_type type;
    OK(clGetEventInfo(copied, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_MEMCPY_INTEL);
    OK(clRetainEvent(copied));
    OK(clReleaseEvent(copied));
    OK(clGetEventInfo(copied, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_MEMCPY_INTEL);
    OK(clGetEventInfo(launched, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_NDRANGE_KERNEL);
    OK(clReleaseEvent(copied));
    OK(clReleaseEvent(launched));

    /* Interior pointers as arguments: the second half onto the first. */
    OK(set_pointer(add, 0, c + N / 2));
    OK(set_pointer(add, 2, c));
    run(add, N / 2, NULL);
    OK(copy(queue, CL_TRUE, plain, c, bytes, 0, NULL, NULL));
    printf("vectors: %016llx\n", (unsigned long long)sum_of(plain, N));
    OK(clReleaseKernel(add));
    OK(mem_free(context, a));
    OK(mem_free(context, b));
    OK(blocking_free(context, c));
    free(plain);
}

typedef struct node {
    struct node *next;
    uint64_t value;
} node;

static void list(cl_program program) {
    enum { N = 2000 };
    cl_int e;
    node *head = NULL;
    for (int n = 0; n < N; n++) {
        node *new = shared_alloc(context, device, NULL, sizeof *new, 0, &e);
        OK(e);
        *new = (node){head, (uint64_t)n * n};
        head = new;
    }
    uint64_t *sum = host_alloc(context, NULL, sizeof *sum, 0, &e);
    OK(e);
    cl_kernel walk = kernel_of(program, "walk");
    cl_bool yes = CL_TRUE;
    OK(clSetKernelExecInfo(walk, CL_KERNEL_EXEC_INFO_INDIRECT_SHARED_ACCESS_INTEL, sizeof yes, &yes));
    OK(clSetKernelExecInfo(walk, CL_KERNEL_EXEC_INFO_INDIRECT_HOST_ACCESS_INTEL, sizeof yes, &yes));
    OK(clSetKernelExecInfo(walk, CL_KERNEL_EXEC_INFO_INDIRECT_DEVICE_ACCESS_INTEL, sizeof yes, &yes));
    void *pointers[] = {head, sum};
    OK(clSetKernelExecInfo(walk, CL_KERNEL_EXEC_INFO_USM_PTRS_INTEL, sizeof pointers, pointers));
    OK(set_pointer(walk, 0, head));
    OK(set_pointer(walk, 1, sum));
    cl_kernel clone = clCloneKernel(walk, &e);
    OK(e);
    run(walk, 1, NULL);
    OK(clFinish(queue));
    uint64_t expected = 0;
    for (uint64_t n = 0; n < N; n++) expected += n * n;
    CHECK(*sum == expected);
    run(clone, 1, NULL);
    OK(clFinish(queue));
    printf("list: %llu, then %llu\n", (unsigned long long)expected, (unsigned long long)*sum);
    OK(clReleaseKernel(clone));
    OK(clReleaseKernel(walk));
    while (head) {
        node *next = head->next;
        OK(mem_free(context, head));
        head = next;
    }
    OK(mem_free(context, sum));
}

static void commands(cl_program program) {
    enum { N = 100000 };
    cl_int e;
    uint32_t *s = shared_alloc(context, device, NULL, N * 4, 0, &e);
    OK(e);
    const uint32_t pattern[4] = {1, 22, 333, 4444};
    cl_event gate = clCreateUserEvent(context, &e);
    OK(e);
    cl_event filled, moved, told;
    cl_command_type type;
    cl_int status;
    OK(set(queue, s, 0xAB, N * 4, 0, NULL, NULL));
    OK(clFinish(queue));
    CHECK(s[0] == 0xABABABABu && s[N - 1] == 0xABABABABu);
    OK(fill(queue, s, pattern, sizeof pattern, N * 4, 1, &gate, &filled));
    OK(migrate(queue, s, N * 4, to_device, 1, &filled, &moved));
    OK(advise(queue, s, N * 4, no_advice, 1, &moved, &told));
    OK(clGetEventInfo(told, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status, NULL));
    CHECK(status != CL_COMPLETE);
    OK(clSetUserEventStatus(gate, CL_COMPLETE));
    OK(clWaitForEvents(1, &told));
    OK(clGetEventInfo(filled, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_MEMFILL_INTEL);
    OK(clGetEventInfo(moved, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_MIGRATEMEM_INTEL);
    OK(clGetEventInfo(told, CL_EVENT_COMMAND_TYPE, sizeof type, &type, NULL));
    CHECK(type == CL_COMMAND_MEMADVISE_INTEL);
    for (int n = 0; n < N; n++) CHECK(s[n] == pattern[n & 3]);
    OK(clReleaseEvent(gate));
    OK(clReleaseEvent(filled));
    OK(clReleaseEvent(moved));
    OK(clReleaseEvent(told));

    uint32_t onto[8] = {0};
    if (exact) OK(migrate(queue, s, N * 4, CL_MIGRATE_MEM_OBJECT_HOST, 0, NULL, NULL));
    OK(copy(queue, CL_TRUE, onto, s + 5, sizeof onto, 0, NULL, NULL));
    CHECK(onto[0] == 22 && onto[7] == 1);
    OK(copy(queue, CL_TRUE, s, s + 50000, 4 * 50000, 0, NULL, NULL));

    int *counter = shared_alloc(context, device, NULL, sizeof *counter, 0, &e);
    OK(e);
    *counter = 5;
    cl_kernel k = kernel_of(program, "shared_counter");
    OK(set_pointer(k, 0, counter));
    for (int n = 0; n < 20; n++) run(k, 1000, NULL);
    OK(clFinish(queue));
    CHECK(*counter == 20005);
    printf("commands: %016llx, %d\n", (unsigned long long)sum_of(s, N), *counter);

    /* A blocking free waits for what still uses the block. */
    cl_event late;
    run(k, 1000, &late);
    OK(blocking_free(context, counter));
    OK(clGetEventInfo(late, CL_EVENT_COMMAND_EXECUTION_STATUS, sizeof status, &status, NULL));
    CHECK(status == CL_COMPLETE);
    OK(clReleaseEvent(late));
    OK(clReleaseKernel(k));
    OK(mem_free(context, s));
}

static void expect_info(const void *p, cl_unified_shared_memory_type_intel type, void *base, size_t size,
                        cl_device_id of, cl_mem_alloc_flags_intel flags) {
    cl_unified_shared_memory_type_intel t;
    void *b;
    size_t s, got;
    cl_device_id d;
    cl_mem_alloc_flags_intel f;
    OK(alloc_info(context, p, CL_MEM_ALLOC_TYPE_INTEL, sizeof t, &t, &got));
    CHECK(t == type && got == sizeof t);
    OK(alloc_info(context, p, CL_MEM_ALLOC_BASE_PTR_INTEL, sizeof b, &b, &got));
    CHECK(b == base && got == sizeof b);
    OK(alloc_info(context, p, CL_MEM_ALLOC_SIZE_INTEL, sizeof s, &s, &got));
    CHECK(s == size && got == sizeof s);
    OK(alloc_info(context, p, CL_MEM_ALLOC_DEVICE_INTEL, sizeof d, &d, NULL));
    CHECK(d == of);
    OK(alloc_info(context, p, CL_MEM_ALLOC_FLAGS_INTEL, sizeof f, &f, NULL));
    CHECK(f == flags);
}

static void queries(void) {
    cl_int e;
    const cl_mem_properties_intel near_device[] = {
        CL_MEM_ALLOC_FLAGS_INTEL, CL_MEM_ALLOC_INITIAL_PLACEMENT_DEVICE_INTEL | CL_MEM_ALLOC_WRITE_COMBINED_INTEL, 0};
    char *h = host_alloc(context, NULL, 1000, 0, &e), *d = device_alloc(context, device, NULL, 2000, 0, &e);
    char *s = shared_alloc(context, device, near_device, 3000, 0, &e);
    char *n = shared_alloc(context, NULL, NULL, 4000, 0, NULL);
    CHECK(h && d && s && n);
    expect_info(h + 999, CL_MEM_TYPE_HOST_INTEL, h, 1000, NULL, 0);
    expect_info(d, CL_MEM_TYPE_DEVICE_INTEL, d, 2000, device, 0);
    expect_info(s + 1234, CL_MEM_TYPE_SHARED_INTEL, s, 3000, device, near_device[1]);
    expect_info(n, CL_MEM_TYPE_SHARED_INTEL, n, 4000, NULL, 0);
    expect_info(&e, CL_MEM_TYPE_UNKNOWN_INTEL, NULL, 0, NULL, 0);
    expect_info(NULL, CL_MEM_TYPE_UNKNOWN_INTEL, NULL, 0, NULL, 0);
    expect_info(h + 1000, CL_MEM_TYPE_UNKNOWN_INTEL, NULL, 0, NULL, 0);
    cl_uint small;
    GIVES(CL_INVALID_VALUE, alloc_info(context, h, CL_MEM_ALLOC_SIZE_INTEL, 4, &small, NULL));
    GIVES(CL_INVALID_VALUE, alloc_info(context, h, 0x1234, 4, &small, NULL));
    GIVES(CL_INVALID_CONTEXT, alloc_info(NULL, h, CL_MEM_ALLOC_SIZE_INTEL, 0, NULL, NULL));
    OK(mem_free(context, h));
    expect_info(h, CL_MEM_TYPE_UNKNOWN_INTEL, NULL, 0, NULL, 0);
    OK(mem_free(context, d));
    OK(mem_free(context, s));
    OK(mem_free(context, n));
    puts("queries: exact");
}

/* Allocations that must be refused, with the extension's error. */
static void refused(void) {
    cl_ulong most;
    OK(clGetDeviceInfo(device, CL_DEVICE_MAX_MEM_ALLOC_SIZE, sizeof most, &most, NULL));
    const cl_mem_properties_intel unknown[] = {0x7777, 1, 0}, bad_bits[] = {CL_MEM_ALLOC_FLAGS_INTEL, 1 << 20, 0},
                                  twice[] = {CL_MEM_ALLOC_FLAGS_INTEL, 1, CL_MEM_ALLOC_FLAGS_INTEL, 1, 0},
                                  placed[] = {CL_MEM_ALLOC_FLAGS_INTEL, CL_MEM_ALLOC_INITIAL_PLACEMENT_HOST_INTEL, 0},
                                  both[] = {CL_MEM_ALLOC_FLAGS_INTEL, CL_MEM_ALLOC_INITIAL_PLACEMENT_HOST_INTEL |
                                                                         CL_MEM_ALLOC_INITIAL_PLACEMENT_DEVICE_INTEL, 0};
    cl_int e;
#define REFUSED(error, call)                        \
    do {                                            \
        e = CL_SUCCESS;                             \
        CHECK((call) == NULL);                      \
        if (e != (error)) FAIL("%s gave %d, not %s", #call, e, #error); \
    } while (0)
    REFUSED(CL_INVALID_CONTEXT, host_alloc(NULL, NULL, 64, 0, &e));
    REFUSED(CL_INVALID_CONTEXT, shared_alloc(NULL, device, NULL, 64, 0, &e));
    REFUSED(CL_INVALID_DEVICE, device_alloc(context, NULL, NULL, 64, 0, &e));
    REFUSED(CL_INVALID_DEVICE, shared_alloc(context, (cl_device_id)&most, NULL, 64, 0, &e));
    REFUSED(CL_INVALID_VALUE, host_alloc(context, NULL, 64, 3, &e));
    REFUSED(CL_INVALID_VALUE, device_alloc(context, device, NULL, 64, 4096, &e));
    REFUSED(CL_INVALID_PROPERTY, host_alloc(context, unknown, 64, 0, &e));
    REFUSED(CL_INVALID_PROPERTY, shared_alloc(context, device, bad_bits, 64, 0, &e));
    REFUSED(CL_INVALID_PROPERTY, shared_alloc(context, device, twice, 64, 0, &e));
    REFUSED(CL_INVALID_PROPERTY, host_alloc(context, placed, 64, 0, &e));
    REFUSED(CL_INVALID_PROPERTY, device_alloc(context, device, placed, 64, 0, &e));
    REFUSED(CL_INVALID_PROPERTY, shared_alloc(context, device, both, 64, 0, &e));
    REFUSED(CL_INVALID_BUFFER_SIZE, host_alloc(context, NULL, 0, 0, &e));
    REFUSED(CL_INVALID_BUFFER_SIZE, device_alloc(context, device, NULL, most + 1, 0, &e));
    CHECK(host_alloc(context, NULL, 0, 0, NULL) == NULL);
}

/* A copy that waits for what fails, before it or meanwhile, fails itself. */
static void *fail(void *gate) {
    usleep(50000);
    OK(clSetUserEventStatus(gate, -5));
    return NULL;
}

static void failing_events(char *s) {
    cl_int e;
    for (size_t size = 0; size <= 64; size += 64) {
        cl_event gate = clCreateUserEvent(context, &e);
        OK(e);
        pthread_t thread;
        CHECK(pthread_create(&thread, NULL, fail, gate) == 0);
        GIVES(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST, copy(queue, CL_TRUE, s, s + 64, size, 1, &gate, NULL));
        CHECK(pthread_join(thread, NULL) == 0);
        GIVES(CL_EXEC_STATUS_ERROR_FOR_EVENTS_IN_WAIT_LIST, copy(queue, CL_TRUE, s, s + 64, size, 1, &gate, NULL));
        OK(clReleaseEvent(gate));
        OK(copy(queue, CL_TRUE, s, s + 64, size, 0, NULL, NULL));
    }
}

static void errors(cl_program program) {
    refused();
    cl_int e;
    char *s = shared_alloc(context, device, NULL, 4096, 0, &e);
    OK(e);
    cl_event none = NULL;
    const cl_ulong16 pattern = {{0}};
    GIVES(CL_INVALID_COMMAND_QUEUE, fill(NULL, s, &pattern, 4, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, NULL, &pattern, 4, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, s, NULL, 4, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, s, &pattern, 3, 63, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, s, &pattern, 256, 256, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, s + 1, &pattern, 4, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, fill(queue, s, &pattern, 4, 63, 0, NULL, NULL));
    GIVES(CL_INVALID_EVENT_WAIT_LIST, fill(queue, s, &pattern, 4, 64, 1, NULL, NULL));
    GIVES(CL_INVALID_EVENT_WAIT_LIST, fill(queue, s, &pattern, 4, 64, 0, &none, NULL));
    GIVES(CL_INVALID_EVENT_WAIT_LIST, fill(queue, s, &pattern, 4, 64, 1, &none, NULL));
    OK(fill(queue, s, &pattern, 128, 0, 0, NULL, NULL));
    OK(copy(queue, CL_TRUE, s, s + 64, 0, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, copy(queue, CL_TRUE, NULL, s, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, copy(queue, CL_TRUE, s, NULL, 64, 0, NULL, NULL));
    GIVES(CL_MEM_COPY_OVERLAP, copy(queue, CL_TRUE, s, s + 63, 64, 0, NULL, NULL));
    GIVES(CL_MEM_COPY_OVERLAP, copy(queue, CL_TRUE, s + 63, s, 64, 0, NULL, NULL));
    GIVES(CL_INVALID_EVENT_WAIT_LIST, copy(queue, CL_TRUE, s, s + 64, 64, 1, NULL, NULL));
    failing_events(s);
    GIVES(CL_INVALID_COMMAND_QUEUE, migrate(NULL, s, 4096, 0, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, migrate(queue, s, 4096, 1 << 10, 0, NULL, NULL));
    GIVES(CL_INVALID_COMMAND_QUEUE, advise(NULL, s, 4096, 0, 0, NULL, NULL));
    GIVES(CL_INVALID_VALUE, advise(queue, s, 4096, 0xFFFF, 0, NULL, NULL));
    GIVES(CL_INVALID_CONTEXT, mem_free(NULL, s));
    GIVES(CL_INVALID_VALUE, mem_free(context, s + 1));
    GIVES(CL_INVALID_VALUE, mem_free(context, &e));
    OK(mem_free(context, NULL));
    OK(blocking_free(context, NULL));
    OK(mem_free(context, s));
    GIVES(CL_INVALID_VALUE, blocking_free(context, s));
    GIVES(CL_INVALID_KERNEL, set_pointer(NULL, 0, s));
    cl_kernel k = kernel_of(program, "add");
    GIVES(CL_INVALID_VALUE, clSetKernelExecInfo(k, CL_KERNEL_EXEC_INFO_INDIRECT_HOST_ACCESS_INTEL, 1, &e));
    GIVES(CL_INVALID_VALUE, clSetKernelExecInfo(k, CL_KERNEL_EXEC_INFO_USM_PTRS_INTEL, 7, &s));
    OK(set_pointer(k, 0, NULL));
    OK(clReleaseKernel(k));
    puts("errors: as specified");
}

int main(int argc, char **argv) {
    exact = argc == 1;
    (void)argv;
    open_device();
    if (!has_extension("cl_intel_unified_shared_memory")) {
        puts("no cl_intel_unified_shared_memory");
        return 3;
    }
    find_all();
    capabilities();
    cl_program program = build(SOURCE);
    vectors(program);
    list(program);
    commands(program);
    if (exact) find_by_name_alone();
    if (exact) queries();
    if (exact) errors(program);
    OK(clReleaseProgram(program));
    OK(clReleaseCommandQueue(queue));
    OK(clReleaseContext(context));
    puts("usm: verified");
    return 0;
}
