/* usvm as a provider of the real Unified Memory Framework, with and without a pool on top. */
#include "check.h"
#include <umf.h>
#include <umf/pools/pool_disjoint.h>
#include <umf/pools/pool_proxy.h>
#include <usvm_umf.h>

#define UMF_OK(call)                                                                                                   \
    do {                                                                                                               \
        umf_result_t result_ = (call);                                                                                 \
        if (result_ != UMF_RESULT_SUCCESS) {                                                                           \
            fprintf(stderr, "%s:%d: %s: %d (%s)\n", __FILE__, __LINE__, #call, (int)result_, last_message());          \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define M2 ((size_t)2 << 20)

static usvm_space_t space;
static umf_memory_provider_ops_t ops;

static void provider_alone(umf_memory_provider_handle_t provider, int has_space) {
    const char *name = NULL;
    UMF_OK(umfMemoryProviderGetName(provider, &name));
    CHECK(strcmp(name, "usvm") == 0);
    size_t page = 0;
    UMF_OK(umfMemoryProviderGetMinPageSize(provider, NULL, &page));
    CHECK(page == 4096);
    UMF_OK(umfMemoryProviderGetRecommendedPageSize(provider, 8 << 20, &page));
    CHECK(page == M2);

    void *ptr = NULL, *aligned = NULL;
    UMF_OK(umfMemoryProviderAlloc(provider, 3 * M2, 0, &ptr));
    CHECK((uintptr_t)ptr % M2 == 0);
    UMF_OK(umfMemoryProviderAlloc(provider, 100, 1 << 16, &aligned));
    CHECK((uintptr_t)aligned % (1 << 16) == 0);
    unsigned char *at = ptr;
    OK(usvm_fill(space, at, 5, 3 * M2));
    CHECK(at[0] == 5 && at[3 * M2 - 1] == 5);
    if (has_space)
        CHECK(place_of(space, at, 3 * M2, USVM_ATTR_PREFERRED_LOCATION).type == USVM_LOCATION_DEVICE);

    UMF_OK(umfMemoryProviderPurgeForce(provider, at, M2));
    CHECK(at[0] == 0 && at[M2 - 1] == 0 && at[M2] == 5);
    umf_result_t lazy = umfMemoryProviderPurgeLazy(provider, at + M2, 4096);
    CHECK(lazy == (has_space ? UMF_RESULT_SUCCESS : UMF_RESULT_ERROR_NOT_SUPPORTED));
    CHECK(umfMemoryProviderPurgeLazy(provider, at + 1, 4096) == UMF_RESULT_ERROR_INVALID_ALIGNMENT);

    UMF_OK(umfMemoryProviderAllocationSplit(provider, at, 3 * M2, M2));
    UMF_OK(umfMemoryProviderFree(provider, at, M2));
    at += M2;
    CHECK(at[M2] == 5);
    UMF_OK(umfMemoryProviderAllocationSplit(provider, at, 2 * M2, M2));
    UMF_OK(umfMemoryProviderAllocationMerge(provider, at, at + M2, 2 * M2));
    UMF_OK(umfMemoryProviderFree(provider, at, 2 * M2));
    UMF_OK(umfMemoryProviderFree(provider, aligned, 100));
    CHECK(umfMemoryProviderAlloc(provider, SIZE_MAX / 2, 0, &ptr) == UMF_RESULT_ERROR_OUT_OF_HOST_MEMORY);
    CHECK(umfMemoryProviderAlloc(provider, 4096, 24, &ptr) == UMF_RESULT_ERROR_INVALID_ALIGNMENT);
}

static void pool_on_top(umf_memory_pool_handle_t pool) {
    enum { BLOCKS = 400 };
    unsigned char *blocks[BLOCKS];
    size_t sizes[BLOCKS];
    for (int i = 0; i < BLOCKS; i++) {
        sizes[i] = i % 40 == 0 ? M2 + (size_t)i : 64 + (size_t)i * 97;
        blocks[i] = umfPoolMalloc(pool, sizes[i]);
        CHECK(blocks[i] != NULL);
        OK(usvm_fill(space, blocks[i], i, sizes[i]));
    }
    for (int i = 0; i < BLOCKS; i++) {
        CHECK(blocks[i][0] == (unsigned char)i && blocks[i][sizes[i] - 1] == (unsigned char)i);
        UMF_OK(umfPoolFree(pool, blocks[i]));
    }
}

int main(void) {
    space = open_space("vram=64M");
    ops = usvm_umf_provider_ops();
    usvm_umf_params_t params = {sizeof params, space, {USVM_LOCATION_DEVICE, 0}};
    umf_memory_provider_handle_t provider;

    CHECK(umfMemoryProviderCreate(&ops, NULL, &provider) == UMF_RESULT_SUCCESS);
    provider_alone(provider, 0);
    UMF_OK(umfMemoryProviderDestroy(provider));

    usvm_umf_params_t wrong = params;
    wrong.struct_size = 3;
    CHECK(umfMemoryProviderCreate(&ops, &wrong, &provider) == UMF_RESULT_ERROR_INVALID_ARGUMENT);

    UMF_OK(umfMemoryProviderCreate(&ops, &params, &provider));
    provider_alone(provider, 1);

    umf_memory_pool_handle_t pool;
    UMF_OK(umfPoolCreate(umfProxyPoolOps(), provider, NULL, 0, &pool));
    pool_on_top(pool);
    UMF_OK(umfPoolDestroy(pool));

    umf_disjoint_pool_params_handle_t disjoint;
    UMF_OK(umfDisjointPoolParamsCreate(&disjoint));
    UMF_OK(umfPoolCreate(umfDisjointPoolOps(), provider, disjoint, 0, &pool));
    pool_on_top(pool);
    UMF_OK(umfPoolDestroy(pool));
    UMF_OK(umfDisjointPoolParamsDestroy(disjoint));
    UMF_OK(umfMemoryProviderDestroy(provider));

    /* An error of usvm's own comes through with its message. */
    usvm_umf_params_t far = {sizeof far, space, {USVM_LOCATION_DEVICE, 7}};
    UMF_OK(umfMemoryProviderCreate(&ops, &far, &provider));
    void *ptr;
    const char *message = NULL;
    int32_t error = 0;
    CHECK(umfMemoryProviderAlloc(provider, 4096, 0, &ptr) == UMF_RESULT_ERROR_MEMORY_PROVIDER_SPECIFIC);
    umfMemoryProviderGetLastNativeError(provider, &message, &error);
    CHECK(message && strstr(message, "location.id"));
    UMF_OK(umfMemoryProviderDestroy(provider));
    close_space(space);
    puts("umf: good");
    return 0;
}
