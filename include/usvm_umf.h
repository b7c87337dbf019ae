/*
 * usvm as a memory provider of the Unified Memory Framework (UMF 1.0 and later; include its headers' path).
 *
 *     usvm_umf_params_t params = {sizeof params, space, {USVM_LOCATION_DEVICE, 0}};
 *     umf_memory_provider_ops_t ops = usvm_umf_provider_ops();
 *     umf_memory_provider_handle_t provider;
 *     umfMemoryProviderCreate(&ops, &params, &provider);
 *
 * Gives whole pages, on 2 MiB for 2 MiB and more, that the CPU and devices share and that migrate; any of UMF's pools
 * goes on top (the disjoint pool keeps its own data elsewhere: freeing touches nothing). Without parameters (NULL), or
 * without a space in them, it needs no usvm_init. Thread-safe. The space must outlive the provider.
 *
 * Header only: libusvm does not depend on libumf.
 */
#ifndef USVM_UMF_H
#define USVM_UMF_H

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <umf/memory_provider_ops.h>
#include <usvm.h>

#ifdef __cplusplus
extern "C" {
#endif

/** How a provider is to be. */
typedef struct usvm_umf_params {
    size_t struct_size;        /**< sizeof(usvm_umf_params_t) */
    usvm_space_t space;        /**< for discarding and the preferred location; may be NULL */
    usvm_location_t preferred; /**< where its memory should live; USVM_LOCATION_NONE: wherever it is used */
} usvm_umf_params_t;

#define USVM_UMF_PAGE_ ((size_t)4096)
#define USVM_UMF_HUGE_ ((size_t)2 << 20)
#define USVM_UMF_ANONYMOUS_ 0x20 /* MAP_ANONYMOUS, which strict C hides */

static inline umf_result_t usvm_umf_initialize_(const void *params, void **provider) {
    usvm_umf_params_t *own;
    const usvm_umf_params_t *given = (const usvm_umf_params_t *)params;
    if (!provider || (given && given->struct_size != sizeof *given))
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    own = (usvm_umf_params_t *)calloc(1, sizeof *own);
    if (!own)
        return UMF_RESULT_ERROR_OUT_OF_HOST_MEMORY;
    if (given)
        *own = *given;
    if (!own->space && own->preferred.type != USVM_LOCATION_NONE) {
        free(own);
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    }
    *provider = own;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_finalize_(void *provider) {
    free(provider);
    return UMF_RESULT_SUCCESS;
}

static inline size_t usvm_umf_pages_(size_t size) {
    return (size + (USVM_UMF_PAGE_ - 1)) & ~(USVM_UMF_PAGE_ - 1);
}

static inline umf_result_t usvm_umf_alloc_(void *provider, size_t size, size_t alignment, void **ptr) {
    const usvm_umf_params_t *own = (const usvm_umf_params_t *)provider;
    size_t length = usvm_umf_pages_(size), all, head;
    char *at;
    void *mapped;
    if (!ptr)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    if (alignment & (alignment - 1))
        return UMF_RESULT_ERROR_INVALID_ALIGNMENT;
    if (alignment < USVM_UMF_PAGE_)
        alignment = USVM_UMF_PAGE_;
    if (length >= USVM_UMF_HUGE_ && alignment < USVM_UMF_HUGE_)
        alignment = USVM_UMF_HUGE_;
    if (length < size || length + alignment < length)
        return UMF_RESULT_ERROR_OUT_OF_HOST_MEMORY;
    if (length == 0) {
        *ptr = NULL;
        return UMF_RESULT_SUCCESS;
    }
    all = length + alignment - USVM_UMF_PAGE_;
    mapped = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | USVM_UMF_ANONYMOUS_, -1, 0);
    if (mapped == MAP_FAILED)
        return UMF_RESULT_ERROR_OUT_OF_HOST_MEMORY;
    at = (char *)(((uintptr_t)mapped + alignment - 1) & ~(uintptr_t)(alignment - 1));
    head = (size_t)(at - (char *)mapped);
    if (head)
        munmap(mapped, head);
    if (all - head > length)
        munmap(at + length, all - head - length);
    if (own->preferred.type != USVM_LOCATION_NONE &&
        usvm_advise(own->space, at, length, USVM_ADVICE_SET_PREFERRED_LOCATION, own->preferred) != USVM_SUCCESS) {
        munmap(at, length);
        return UMF_RESULT_ERROR_MEMORY_PROVIDER_SPECIFIC;
    }
    *ptr = at;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_free_(void *provider, void *ptr, size_t size) {
    const usvm_umf_params_t *own = (const usvm_umf_params_t *)provider;
    size_t length = usvm_umf_pages_(size);
    if (!ptr || length == 0)
        return UMF_RESULT_SUCCESS;
    if (own->preferred.type != USVM_LOCATION_NONE) {
        /* What is mapped here next shall not inherit it. */
        (void)usvm_advise(own->space, ptr, length, USVM_ADVICE_UNSET_PREFERRED_LOCATION, own->preferred);
    }
    return munmap(ptr, length) == 0 ? UMF_RESULT_SUCCESS : UMF_RESULT_ERROR_INVALID_ARGUMENT;
}

static inline umf_result_t usvm_umf_last_error_(void *provider, const char **message, int32_t *error) {
    int native = 0;
    (void)provider;
    if (!message || !error)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    (void)usvm_last_error(message, &native);
    *error = native;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_recommended_(void *provider, size_t size, size_t *page) {
    (void)provider;
    if (!page)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    *page = size >= USVM_UMF_HUGE_ ? USVM_UMF_HUGE_ : USVM_UMF_PAGE_;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_min_page_(void *provider, const void *ptr, size_t *page) {
    (void)provider;
    (void)ptr;
    if (!page)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    *page = USVM_UMF_PAGE_;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_name_(void *provider, const char **name) {
    (void)provider;
    if (!name)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    *name = "usvm";
    return UMF_RESULT_SUCCESS;
}

static inline int usvm_umf_whole_(const void *ptr, size_t size) {
    return ((uintptr_t)ptr | size) % USVM_UMF_PAGE_ == 0;
}

static inline umf_result_t usvm_umf_purge_lazy_(void *provider, void *ptr, size_t size) {
    const usvm_umf_params_t *own = (const usvm_umf_params_t *)provider;
    if (!usvm_umf_whole_(ptr, size))
        return UMF_RESULT_ERROR_INVALID_ALIGNMENT;
    if (!own->space)
        return UMF_RESULT_ERROR_NOT_SUPPORTED;
    if (usvm_discard(own->space, ptr, size) != USVM_SUCCESS)
        return UMF_RESULT_ERROR_MEMORY_PROVIDER_SPECIFIC;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_purge_force_(void *provider, void *ptr, size_t size) {
    const int flags = MAP_PRIVATE | USVM_UMF_ANONYMOUS_ | MAP_FIXED;
    (void)provider;
    if (!usvm_umf_whole_(ptr, size))
        return UMF_RESULT_ERROR_INVALID_ALIGNMENT;
    if (mmap(ptr, size, PROT_READ | PROT_WRITE, flags, -1, 0) != ptr)
        return UMF_RESULT_ERROR_OUT_OF_HOST_MEMORY;
    return UMF_RESULT_SUCCESS;
}

/* The pages of two neighbours are the pages of one: nothing is kept for either. */
static inline umf_result_t usvm_umf_merge_(void *provider, void *low, void *high, size_t total) {
    (void)provider;
    if (!usvm_umf_whole_(low, 0) || !usvm_umf_whole_(high, 0) || (char *)high <= (char *)low ||
        (size_t)((char *)high - (char *)low) >= total)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    return UMF_RESULT_SUCCESS;
}

static inline umf_result_t usvm_umf_split_(void *provider, void *ptr, size_t total, size_t first) {
    (void)provider;
    if (!usvm_umf_whole_(ptr, first) || first == 0 || first >= total)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    return UMF_RESULT_SUCCESS;
}

#if UMF_PROVIDER_OPS_VERSION_CURRENT >= UMF_MAKE_VERSION(1, 2)
static inline umf_result_t usvm_umf_cache_line_(void *provider, size_t *size) {
    (void)provider;
    if (!size)
        return UMF_RESULT_ERROR_INVALID_ARGUMENT;
    *size = 64;
    return UMF_RESULT_SUCCESS;
}
#endif

/** The operations: UMF copies them, so a variable of the caller's will do. */
static inline umf_memory_provider_ops_t usvm_umf_provider_ops(void) {
    umf_memory_provider_ops_t ops;
    memset(&ops, 0, sizeof ops);
    ops.version = UMF_PROVIDER_OPS_VERSION_CURRENT;
    ops.initialize = usvm_umf_initialize_;
    ops.finalize = usvm_umf_finalize_;
    ops.alloc = usvm_umf_alloc_;
    ops.free = usvm_umf_free_;
    ops.get_last_native_error = usvm_umf_last_error_;
    ops.get_recommended_page_size = usvm_umf_recommended_;
    ops.get_min_page_size = usvm_umf_min_page_;
    ops.get_name = usvm_umf_name_;
    ops.ext_purge_lazy = usvm_umf_purge_lazy_;
    ops.ext_purge_force = usvm_umf_purge_force_;
    ops.ext_allocation_merge = usvm_umf_merge_;
    ops.ext_allocation_split = usvm_umf_split_;
#if UMF_PROVIDER_OPS_VERSION_CURRENT >= UMF_MAKE_VERSION(1, 2)
    ops.get_cache_line_size = usvm_umf_cache_line_;
#endif
    return ops;
}

#ifdef __cplusplus
}
#endif

#endif /* USVM_UMF_H */
