/*
 * usvm: user-space shared virtual memory for GPUs.
 *
 * Any pointer of this process works on the device, at the same address; what the device uses moves into device memory
 * and back by itself. C99 and later, C++11 and later. Link with pkg-config (usvm) or CMake (usvm::usvm).
 *
 *     usvm_device_t device;
 *     usvm_space_t space;
 *     usvm_init(NULL);
 *     usvm_device_get(0, &device);
 *     usvm_space_create(device, NULL, &space);
 *     usvm_fill(space, pointer, 42, bytes);        // done by the device, in its memory
 *     pointer[0] += 1;                             // the CPU touches it: it comes back
 *     usvm_space_destroy(space);
 *     usvm_shutdown();
 *
 * Rules for all functions, unless one says otherwise:
 *
 *  - Any thread may call any function at any time, also from inside a notifier's callback. Not from signal handlers.
 *  - Functions that return usvm_result_t give USVM_SUCCESS (0) or say why not; usvm_last_error() then has a message that
 *    begins with the name of the argument that was wrong. Outputs are written on success only.
 *  - Pointers are checked: NULL, unreadable and unwritable ones are errors, not crashes (but for NULL only where a seccomp
 *    filter forbids process_vm_readv).
 *  - Handles (device, space, fence, notifier) are numbers in the shape of pointers, checked at each use: one that was
 *    destroyed, or that belongs to another kind or to the time before usvm_shutdown, is USVM_ERROR_INVALID_HANDLE.
 *    Between usvm_shutdown and the next usvm_init everything that needs usvm is USVM_ERROR_NOT_RUNNING.
 *  - Structures begin with their size as the caller knows it (struct_size, or size), so that they can grow.
 *  - Addresses and lengths are bytes. A range need not be aligned: what is not a matter of contents (advise, prefetch,
 *    evict, attributes, notifiers) is done for all pages that it touches.
 *  - What is no call's answer (memory that was lost with a device, a thread of usvm that died) is told on standard error.
 *  - A forked child begins without usvm: handles of the parent are invalid there, and usvm_init() starts anew.
 */
#ifndef USVM_H
#define USVM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__) || defined(__clang__)
#define USVM_API __attribute__((visibility("default")))
#define USVM_MALLOC_LIKE(...) __attribute__((malloc, alloc_size(__VA_ARGS__), warn_unused_result))
#define USVM_MUST_USE __attribute__((warn_unused_result))
#else
#define USVM_API
#define USVM_MALLOC_LIKE(...)
#define USVM_MUST_USE
#endif

/* ---------------------------------------------------------------- versions */

#define USVM_MAKE_VERSION(major, minor, patch) (((uint32_t)(major) << 16) | ((uint32_t)(minor) << 8) | (uint32_t)(patch))
#define USVM_VERSION_MAJOR(version) ((uint32_t)(version) >> 16)
#define USVM_VERSION_MINOR(version) (((uint32_t)(version) >> 8) & 0xffu)
#define USVM_VERSION_PATCH(version) ((uint32_t)(version) & 0xffu)

/** The version of this header. */
#define USVM_VERSION USVM_MAKE_VERSION(0, 1, 0)

/** The version of the library that is loaded, as USVM_MAKE_VERSION makes it. Never fails. */
USVM_API uint32_t usvm_version(void);

/* ----------------------------------------------------------------- results */

/** Why something was not done. Nothing is lost when one of these is returned, unless it says so. */
typedef enum usvm_result {
    USVM_SUCCESS = 0,
    USVM_ERROR_INVALID_ARGUMENT = 1,       /**< EINVAL: an argument makes no sense; the message names it */
    USVM_ERROR_INVALID_HANDLE = 2,         /**< EBADF: not a handle of this kind, or not any more */
    USVM_ERROR_NOT_RUNNING = 3,            /**< ESHUTDOWN: usvm_init was not called, or usvm withdrew */
    USVM_ERROR_NOT_SUPPORTED = 4,          /**< EOPNOTSUPP: the device or the kernel cannot do this */
    USVM_ERROR_NOT_MAPPED = 5,             /**< ENOENT: nothing is mapped there */
    USVM_ERROR_NOT_WRITABLE = 6,           /**< EPERM: a write was asked of memory that is not writable */
    USVM_ERROR_OUTSIDE_SPACE = 7,          /**< EINVAL: an address that no device reaches */
    USVM_ERROR_GONE = 8,                   /**< EFAULT: the mapping went away meanwhile, or is PROT_NONE */
    USVM_ERROR_DEVICE_FAULT = 9,           /**< EFAULT: work touched memory that was not made resident before */
    USVM_ERROR_MIXED_RESIDENCY = 10,       /**< EOPNOTSUPP: partly on the device; evict it and try again */
    USVM_ERROR_BUSY = 11,                  /**< EBUSY: pages are pinned, locked or held and did not become free */
    USVM_ERROR_AGAIN = 12,                 /**< EAGAIN: mappings kept changing; a bounded number of tries was made */
    USVM_ERROR_OUT_OF_DEVICE_MEMORY = 13,  /**< ENOMEM: more is needed at once than the device has */
    USVM_ERROR_OUT_OF_HOST_MEMORY = 14,    /**< ENOMEM: host memory or address space ran out */
    USVM_ERROR_DEVICE_LOST = 15,           /**< EIO: the device is gone; data that lived only there is lost */
    USVM_ERROR_TIMEOUT = 16,               /**< ETIMEDOUT: the time passed first */
    USVM_ERROR_BUFFER_TOO_SMALL = 17,      /**< ERANGE: the size that is needed was written */
    USVM_ERROR_SYSTEM = 18,                /**< a system call failed: usvm_last_error has its errno */
    USVM_ERROR_INTERNAL = 19,              /**< a defect of usvm */
    USVM_RESULT_FORCE_32 = 0x7fffffff
} usvm_result_t;

/** The name of a result, e.g. "USVM_ERROR_BUSY"; "USVM_ERROR_UNKNOWN" for other numbers. Never NULL, never freed. */
USVM_API const char *usvm_result_name(usvm_result_t result);

/**
 * What the calling thread's last failed call had to say: *message (if not NULL) gets the text, "" when nothing failed
 * yet, valid until the thread's next failing call; *native (if not NULL) the errno that belongs to it. Successful calls
 * change neither, and this call does not either.
 */
USVM_API usvm_result_t usvm_last_error(const char **message, int *native);

/* -------------------------------------------------------- start and end */

/** The environment (USVM_*) is not looked at. */
#define USVM_CONFIG_IGNORE_ENVIRONMENT 0x1u

/** How usvm is to run, where the environment and the defaults are not wanted. */
typedef struct usvm_config {
    size_t struct_size;  /**< sizeof(usvm_config_t) */
    const char *options; /**< "key=value;key=value" with the keys of USVM_CONF, over the environment; or NULL */
    uint32_t flags;      /**< USVM_CONFIG_*, or 0 */
    uint32_t reserved;   /**< 0 */
} usvm_config_t;

/**
 * Starts usvm in this process, or counts one more user of it. NULL: the environment (USVM_*) and defaults. When it runs
 * already, the configuration is checked and otherwise not used. Each success wants its usvm_shutdown.
 */
USVM_API usvm_result_t usvm_init(const usvm_config_t *config);

/**
 * Ends one usvm_init. With the last one all memory comes home, everything else ends too (open accesses, notifiers), and
 * all handles become invalid. Calls of other threads that are under way fail with USVM_ERROR_NOT_RUNNING.
 */
USVM_API usvm_result_t usvm_shutdown(void);

/* ----------------------------------------------------------------- devices */

/** A device. Not owned: nothing destroys it. */
typedef struct usvm_device *usvm_device_t;

#define USVM_DEVICE_CAP_FAULTS 0x1u         /**< an access without a mapping waits and is served */
#define USVM_DEVICE_CAP_SYSTEM_ATOMICS 0x2u /**< atomics work on memory that is not on the device */
#define USVM_DEVICE_CAP_SIMULATED 0x4u      /**< the embedded device: no hardware */

/** What a device is and can do. */
typedef struct usvm_device_info {
    size_t struct_size;         /**< in: sizeof(usvm_device_info_t); out: bytes that were written */
    char name[64];              /**< for people, e.g. "sim:arc-a770" */
    uint64_t vram_bytes;        /**< device memory */
    uint64_t vram_free_bytes;   /**< free device memory now, maybe in pieces */
    uint64_t cpu_visible_bytes; /**< device memory that the CPU can reach (small BAR) */
    uint64_t min_page_bytes;    /**< smallest device-memory page */
    uint64_t capabilities;      /**< USVM_DEVICE_CAP_* */
} usvm_device_info_t;

/** *count gets the number of devices. */
USVM_API usvm_result_t usvm_device_count(uint32_t *count);

/** *device gets device number index, counted from 0. */
USVM_API usvm_result_t usvm_device_get(uint32_t index, usvm_device_t *device);

/** Fills *info as far as its struct_size says. */
USVM_API usvm_result_t usvm_device_get_info(usvm_device_t device, usvm_device_info_t *info);

/* ------------------------------------------------------------------ spaces */

/** This process's address space as one device sees it. */
typedef struct usvm_space *usvm_space_t;

/** How a space is to be. */
typedef struct usvm_space_config {
    size_t struct_size; /**< sizeof(usvm_space_config_t) */
    const char *policy; /**< as for usvm_set_policy; NULL: as it is */
} usvm_space_config_t;

/**
 * *space gets a space of device. config may be NULL. A process has one address space: policy, statistics, advice and
 * residency are the same seen from each space; a space stands for its device, its accesses and its notifiers.
 */
USVM_API usvm_result_t usvm_space_create(usvm_device_t device, const usvm_space_config_t *config, usvm_space_t *space);

/** Ends a space, its open accesses and its notifiers. Memory stays where it is. */
USVM_API usvm_result_t usvm_space_destroy(usvm_space_t space);

/** Takes the migration policy of that name from now on: "adaptive", "gpusvm" (as the kernel's) or "remote". */
USVM_API usvm_result_t usvm_set_policy(usvm_space_t space, const char *policy);

/* ------------------------------------------------------------------ memory */

/*
 * An allocator with the shapes of C11's, for memory that is meant to migrate: blocks of 2 MiB or more are whole pieces of
 * 2 MiB, smaller ones share such pieces with others of this allocator and with nothing else. What is known about blocks
 * lies elsewhere: freeing one that is on a device touches and moves nothing. Any other memory migrates as well.
 *
 * Needs no usvm_init, and blocks outlive usvm_shutdown. Failures are NULL with errno set (ENOMEM, EINVAL), and
 * usvm_last_error. Notifiers are not called inside these functions: see usvm_notifier_register.
 */

USVM_API void *usvm_malloc(size_t size) USVM_MALLOC_LIKE(1);
USVM_API void *usvm_calloc(size_t count, size_t size) USVM_MALLOC_LIKE(1, 2);
USVM_API void *usvm_realloc(void *ptr, size_t size) USVM_MUST_USE;
/** alignment is a power of two; size need not be a multiple of it. */
USVM_API void *usvm_aligned_alloc(size_t alignment, size_t size) USVM_MALLOC_LIKE(2);
/**
 * Frees what the functions above gave; NULL is nothing. Memory that these functions did not give is left alone, and
 * usvm_last_error tells (so it is with usvm_realloc, NULL and EINVAL, and usvm_usable_size, 0). What was freed already or
 * points into a block is not told apart: as with free().
 */
USVM_API void usvm_free(void *ptr);
/** Bytes that may be used at ptr, at least what was asked for; 0 for NULL. */
USVM_API size_t usvm_usable_size(const void *ptr);

/* --------------------------------------------------------------- placement */

/** A kind of place. */
typedef enum usvm_location_type {
    USVM_LOCATION_NONE = 0,   /**< none was set; as an argument where none is needed */
    USVM_LOCATION_HOST = 1,   /**< host memory; id 0 */
    USVM_LOCATION_DEVICE = 2, /**< the memory of device number id */
    USVM_LOCATION_MIXED = 3,  /**< only as an answer: not the same for all of the range */
    USVM_LOCATION_FORCE_32 = 0x7fffffff
} usvm_location_type_t;

/** A place where memory can be. */
typedef struct usvm_location {
    usvm_location_type_t type;
    uint32_t id;
} usvm_location_t;

/** Advice (the words of CUDA and Level Zero). Hints: they never change results. */
typedef enum usvm_advice {
    USVM_ADVICE_SET_READ_MOSTLY = 1,        /**< mostly read, by host and device: both may hold a copy */
    USVM_ADVICE_UNSET_READ_MOSTLY = 2,
    USVM_ADVICE_SET_PREFERRED_LOCATION = 3, /**< where it should live: host or device */
    USVM_ADVICE_UNSET_PREFERRED_LOCATION = 4,
    USVM_ADVICE_SET_ACCESSED_BY = 5,        /**< that device will use it wherever it lives, and does not draw it to itself */
    USVM_ADVICE_UNSET_ACCESSED_BY = 6,
    USVM_ADVICE_WILL_NEED = 7,              /**< will be used at location soon: goes there in the background */
    USVM_ADVICE_DONT_NEED = 8,              /**< not used soon: leaves device memory in the background; keeps contents */
    USVM_ADVICE_FORCE_32 = 0x7fffffff
} usvm_advice_t;

/** Advises about [ptr, ptr + len). The policy "adaptive" follows advice, the others do not. location is looked at by the SET_..._LOCATION, SET_ACCESSED_BY and WILL_NEED. */
USVM_API usvm_result_t usvm_advise(usvm_space_t space, const void *ptr, size_t len, usvm_advice_t advice,
                                   usvm_location_t location);

/** Work that was submitted and ends, well or with an error. */
typedef struct usvm_fence *usvm_fence_t;

/**
 * Brings [ptr, ptr + len) to location. fence NULL: returns when it is there, with the result. Otherwise *fence gets a
 * fence that is signalled then; it is the caller's to destroy. What cannot migrate is mapped instead.
 */
USVM_API usvm_result_t usvm_prefetch(usvm_space_t space, const void *ptr, size_t len, usvm_location_t location,
                                     usvm_fence_t *fence);

/** Brings [ptr, ptr + len) to the host and gives up its device memory. Waits for work that holds it. */
USVM_API usvm_result_t usvm_evict(usvm_space_t space, const void *ptr, size_t len);

/**
 * The contents of the whole pages inside [ptr, ptr + len) may be dropped: what was on the device is not copied back and
 * reads as zero, or as it was at some earlier time. Never another range's bytes.
 */
USVM_API usvm_result_t usvm_discard(usvm_space_t space, void *ptr, size_t len);

/* ------------------------------------------------------------------ access */

/** How memory is used. */
typedef enum usvm_access_mode {
    USVM_ACCESS_READ = 1,
    USVM_ACCESS_WRITE = 2,  /**< also read */
    USVM_ACCESS_ATOMIC = 3, /**< read-modify-write; needs device memory where the link has no atomics */
    USVM_ACCESS_FORCE_32 = 0x7fffffff
} usvm_access_mode_t;

/** What work on a device will use. */
typedef struct usvm_access {
    const void *ptr;
    size_t len;
    usvm_access_mode_t mode;
    uint32_t reserved; /**< 0 */
} usvm_access_t;

/** Most elements of one usvm_begin_access. */
#define USVM_MAX_ACCESSES 65536

/**
 * Begins a use of n ranges by the space's device, for work that usvm does not launch: all of them become resident or
 * mapped, coherent, and stay so until usvm_end_access. A CPU access to what went to the device waits for that end: let
 * no thread touch it that has to call usvm_end_access. What shares pages or migration units with other data does not go
 * (except for atomics), it is mapped: that other data stays usable. Accesses may overlap.
 *
 * fence NULL: returns when it is so; usvm_end_access(space, NULL) ends it, on the same thread, the last begun first.
 * Otherwise *fence gets a fence that is signalled when it is so, and that names this access to usvm_end_access.
 */
USVM_API usvm_result_t usvm_begin_access(usvm_space_t space, const usvm_access_t *accesses, size_t n,
                                         usvm_fence_t *fence);

/** Ends what usvm_begin_access began with that fence, also before it is signalled. The fence stays to be destroyed. */
USVM_API usvm_result_t usvm_end_access(usvm_space_t space, usvm_fence_t fence);

/** Waits at most timeout_ns for the work: -1 is for ever, 0 only looks. USVM_ERROR_TIMEOUT, or the work's own result. */
USVM_API usvm_result_t usvm_fence_wait(usvm_fence_t fence, int64_t timeout_ns);

/** Ends the handle, at any time; the work goes on. An access begun with it that was not ended ends now. */
USVM_API usvm_result_t usvm_fence_destroy(usvm_fence_t fence);

/** Copies len bytes from src to dst by the device, wherever they are; they may overlap (memmove). Returns when done. */
USVM_API usvm_result_t usvm_copy(usvm_space_t space, void *dst, const void *src, size_t len);

/** Sets len bytes at dst to the low 8 bits of byte by the device. Returns when done. */
USVM_API usvm_result_t usvm_fill(usvm_space_t space, void *dst, int byte, size_t len);

/* -------------------------------------------------------------- attributes */

/** What can be asked about a range, and the type of the answer. */
typedef enum usvm_attr {
    USVM_ATTR_RESIDENT_HOST_BYTES = 1,     /**< uint64_t: mapped bytes that are with the CPU */
    USVM_ATTR_RESIDENT_DEVICE_BYTES = 2,   /**< uint64_t: bytes whose only current copy is in device memory */
    USVM_ATTR_RESIDENT_SHARED_BYTES = 3,   /**< uint64_t: bytes with the CPU that a device has a copy of, too */
    USVM_ATTR_RETAINED_HOST_BYTES = 4,     /**< uint64_t: host memory kept for what is on a device */
    USVM_ATTR_DIRTY_BYTES = 5,             /**< uint64_t: bytes on a device that a return has to copy */
    USVM_ATTR_PAGE_SIZE = 6,               /**< uint64_t: smallest unit in which it migrates; 0: no device used it yet */
    USVM_ATTR_LAST_LOCATION = 7,           /**< usvm_location_t: where it is, since it last moved */
    USVM_ATTR_LAST_PREFETCH_LOCATION = 8,  /**< usvm_location_t: where it was last asked to go (prefetch, WILL_NEED) */
    USVM_ATTR_READ_MOSTLY = 9,             /**< uint32_t: 1 if set for all of it, else 0 */
    USVM_ATTR_PREFERRED_LOCATION = 10,     /**< usvm_location_t */
    USVM_ATTR_ACCESSED_BY = 11,            /**< usvm_location_t */
    USVM_ATTR_NEED = 12,                   /**< uint32_t: USVM_ADVICE_WILL_NEED, _DONT_NEED, or 0: neither, or mixed */
    USVM_ATTR_FORCE_32 = 0x7fffffff
} usvm_attr_t;

/** Answers about the pages of [ptr, ptr + len) into value, which has size bytes: exactly those of the answer's type. */
USVM_API usvm_result_t usvm_range_get_attribute(usvm_space_t space, const void *ptr, size_t len, usvm_attr_t attr,
                                                void *value, size_t size);

/* --------------------------------------------------------------- notifiers */

/** Why a notifier's callback is called. More may follow: treat others as UNMAP. */
typedef enum usvm_notify_reason {
    USVM_NOTIFY_UNMAP = 1,   /**< munmap, or a mapping placed over it: before the pages go */
    USVM_NOTIFY_REMAP = 2,   /**< mremap takes it elsewhere, or may: before it does */
    USVM_NOTIFY_DISCARD = 3, /**< madvise or usvm_discard drops the contents: before they go */
    USVM_NOTIFY_PROTECT = 4, /**< mprotect: before it changes */
    USVM_NOTIFY_MIGRATE = 5, /**< its pages moved to or from a device: after they did */
    USVM_NOTIFY_FORCE_32 = 0x7fffffff
} usvm_notify_reason_t;

/** A notifier's callback. [addr, addr + len) is the part of the notifier's range that is concerned. */
typedef void (*usvm_notifier_callback_t)(void *user, void *addr, size_t len, usvm_notify_reason_t reason);

/** A registered callback. */
typedef struct usvm_notifier *usvm_notifier_t;

/**
 * Has callback called when [ptr, ptr + len) is unmapped, remapped, discarded, protected anew or migrated, for whoever
 * keeps device tables of its own (as drm_gpusvm's notifiers; it may be told more than once, or of something that then
 * fails).
 *
 * When it is called:
 *  - munmap, mremap, mmap with MAP_FIXED, madvise and mprotect, called by the program or any of its libraries: on the
 *    calling thread, before the change, so before the call returns. For this libusvm must come before the C library in
 *    the search for symbols: link with it, or preload it; dlopen is not enough. Under `usvm run` the preload library
 *    does the same.
 *  - What the C library unmaps inside itself (free of a large block, a thread's stack), brk, sbrk, shmdt and direct system
 *    calls are seen only where a device used the memory, and told right after, on a thread of usvm. pkey_mprotect is not
 *    seen: call mprotect.
 *  - usvm_free by itself changes nothing. When usvm's allocator gives pages back to the system, at once or some seconds
 *    later, or usvm_realloc moves those of a large block, that is told as DISCARD or REMAP after it was done, on a thread
 *    of usvm, and before the function of the allocator in which it happened returns.
 *  - MIGRATE is told after the pages moved, on a thread of usvm; what is held by usvm_begin_access does not migrate.
 *  - All that was told late is told before the next usvm_begin_access, usvm_fence_wait or usvm_prefetch returns.
 *
 * Those calls wait for callbacks that run at the time: hold no lock around them that a callback takes.
 *
 * A callback may call anything of usvm, touch any memory, and unmap; it is not told of what it does itself. It is not
 * called with any lock of usvm held, and must not end by an exception or longjmp. The thread that called munmap waits; if it
 * is an allocator of the program's own that holds locks meanwhile, the callback must not need them.
 */
USVM_API usvm_result_t usvm_notifier_register(usvm_space_t space, const void *ptr, size_t len,
                                              usvm_notifier_callback_t callback, void *user, usvm_notifier_t *notifier);

/**
 * Ends a notifier. Its callback is not called any more and runs nowhere when this returns. Inside a callback it does not
 * wait for others that run at the time.
 */
USVM_API usvm_result_t usvm_notifier_unregister(usvm_notifier_t notifier);

/* -------------------------------------------------------------- statistics */

#define USVM_STATS_VERSION 1

/** The statistics. Times are microseconds. Counters grow until usvm_stats_reset; resident_* and retained_* are now. */
typedef struct usvm_stats {
    uint64_t size;    /**< in: sizeof(usvm_stats_t); out: bytes that were written */
    uint64_t version; /**< out: USVM_STATS_VERSION of the library */
    uint64_t cpu_faults;
    uint64_t gpu_faults;
    uint64_t invalidations;
    uint64_t bytes_to_device;
    uint64_t bytes_to_host;
    uint64_t bytes_saved_clean;
    uint64_t bytes_saved_delta;
    uint64_t migrations_4k;
    uint64_t migrations_64k;
    uint64_t migrations_2m;
    uint64_t evictions;
    uint64_t thrash_events;
    uint64_t flips;
    uint64_t flip_fallbacks;
    uint64_t dropped_events;
    uint64_t cause_cpu_fault;
    uint64_t cause_gpu_access;
    uint64_t cause_prefetch;
    uint64_t cause_evict;
    uint64_t cause_user;
    uint64_t resident_device_bytes;
    uint64_t resident_shared_bytes;
    uint64_t retained_host_bytes;
    uint64_t fault_us_p50;
    uint64_t fault_us_p90;
    uint64_t fault_us_p99;
    uint64_t fault_us_max;
} usvm_stats_t;

/** Fills *stats as far as its size says. */
USVM_API usvm_result_t usvm_stats_get(usvm_space_t space, usvm_stats_t *stats);

/**
 * The statistics as one JSON object with the names above. *size: in, bytes at json; out, bytes needed, the final zero
 * included. json NULL only asks for the size; too little room is USVM_ERROR_BUFFER_TOO_SMALL with *size written.
 */
USVM_API usvm_result_t usvm_stats_get_json(usvm_space_t space, char *json, size_t *size);

/** Sets the counters to zero. */
USVM_API usvm_result_t usvm_stats_reset(usvm_space_t space);

#ifdef __cplusplus
}
#endif

#endif /* USVM_H */
