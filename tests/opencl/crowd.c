/* Launches that can reach many things: b small blocks, r pages of which every second is for reading only. */
#include "common.h"
#include <sys/mman.h>

enum { N = 1000, PAGE = 4096 };

static const char source[] = "__kernel void add(__global uint *sum) { *sum += 1; }\n";

int main(int argc, char **argv) {
    CHECK(argc == 2);
    open_device();
    cl_kernel kernel = kernel_of(build(source), "add");
    void *all[N];
    char *pages = mmap(NULL, 2 * N * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    CHECK(pages != MAP_FAILED);
    for (size_t n = 0; n < N; n++) {
        all[n] = pages + 2 * n * PAGE;
        if (*argv[1] == 'b') all[n] = clSVMAlloc(context, CL_MEM_READ_WRITE, 64, 0);
        CHECK(all[n]);
        *(char *)all[n] = 1;
        if (*argv[1] == 'r') CHECK(mprotect(all[n], PAGE, PROT_READ) == 0);
    }
    uint32_t *sum = clSVMAlloc(context, CL_MEM_READ_WRITE, PAGE, 0);
    CHECK(sum);
    *sum = 0;
    OK(clSetKernelArgSVMPointer(kernel, 0, sum));
    OK(clSetKernelExecInfo(kernel, CL_KERNEL_EXEC_INFO_SVM_PTRS, sizeof all, all));
    for (int n = 0; n < 2; n++) run(kernel, 1, NULL);
    OK(clFinish(queue));
    CHECK(*sum == 2);
    puts("crowd: verified");
    return 0;
}
