/* Says where a block of SVM will be used, in the ways that its argument names one by one, and then reads all of it: m maps
   and u unmaps it, d and h migrate it to the device and to the host, D and H do so in the words of unified shared memory.
   Whoever follows the hints is given time to. */
#include "common.h"
#include <unistd.h>

enum { N = 2 << 20 };

int main(int argc, char **argv) {
    CHECK(argc == 2);
    open_device();
    uint32_t *x = clSVMAlloc(context, CL_MEM_READ_WRITE, N * 4, 0);
    CHECK(x);
    OK(clEnqueueSVMMap(queue, CL_TRUE, CL_MAP_WRITE, x, N * 4, 0, NULL, NULL));
    for (uint32_t n = 0; n < N; n++) x[n] = n;
    int is_mapped = 1;
    clEnqueueMigrateMemINTEL_fn migrate = clGetExtensionFunctionAddressForPlatform(platform, "clEnqueueMigrateMemINTEL");
    for (const char *hint = argv[1]; *hint; hint++) {
        const void *list[] = {x};
        cl_mem_migration_flags to = *hint == 'h' || *hint == 'H' ? CL_MIGRATE_MEM_OBJECT_HOST : 0;
        switch (*hint) {
        case 'm': OK(clEnqueueSVMMap(queue, CL_TRUE, CL_MAP_READ, x, N * 4, 0, NULL, NULL)); break;
        case 'u': OK(clEnqueueSVMUnmap(queue, x, 0, NULL, NULL)); break;
        case 'D':
        case 'H': CHECK(migrate); OK(migrate(queue, x, N * 4, to, 0, NULL, NULL)); break;
        default: OK(clEnqueueSVMMigrateMem(queue, 1, list, NULL, to, 0, NULL, NULL));
        }
        is_mapped = *hint == 'm' || (*hint != 'u' && is_mapped);
        OK(clFinish(queue));
        usleep(200000);
    }
    for (uint32_t n = 0; n < N; n++) CHECK(x[n] == n);
    if (is_mapped) OK(clEnqueueSVMUnmap(queue, x, 0, NULL, NULL));
    OK(clFinish(queue));
    clSVMFree(context, x);
    puts("hints: verified");
    return 0;
}
