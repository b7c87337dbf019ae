/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/*
 * usvm_ref: the ioctls of /dev/usvm_ref, shared by the module and the guest driver.
 *
 * One open file is one drm_gpusvm ("space") over the mm of the process that issued USVM_REF_CREATE. Every call that
 * names a range names it by any address inside it. Calls answer 0 or a negative errno; where the kernel helper itself
 * returned an error, the ioctl returns exactly that one.
 */
#ifndef USVM_REF_H
#define USVM_REF_H

#include <linux/types.h>
#ifdef __KERNEL__
#include <linux/ioctl.h>
#else
#include <sys/ioctl.h>
#endif

#define USVM_REF_MAX_CHUNKS 8

struct usvm_ref_create {
	__u64 mm_start;
	__u64 mm_range;
	__u64 notifier_size;
	__u64 chunks[USVM_REF_MAX_CHUNKS];	/* descending powers of two, the last is 4096 */
	__u32 num_chunks;
	__u32 vram_pages;			/* capacity of the device in 4K pages; 0: all of it */
};

/* drm_gpusvm_ctx as bits. */
#define USVM_REF_READ_ONLY	0x01
#define USVM_REF_DEVMEM_POSSIBLE	0x02
#define USVM_REF_DEVMEM_ONLY	0x04
#define USVM_REF_ALLOW_MIXED	0x08
#define USVM_REF_OWNER		0x10	/* device_private_page_owner = ours; without it NULL */

struct usvm_ref_ctx {
	__u32 flags;
	__u32 timeslice_ms;
	__u64 check_pages_threshold;
};

/* drm_gpusvm_pages_flags, in the order of the kernel's bits. */
#define USVM_REF_F_MIGRATE_DEVMEM 0x01
#define USVM_REF_F_UNMAPPED	0x02
#define USVM_REF_F_PARTIAL_UNMAP 0x04
#define USVM_REF_F_HAS_DEVMEM	0x08
#define USVM_REF_F_HAS_DMA	0x10

struct usvm_ref_range {
	__u64 start;
	__u64 end;
	__u32 flags;
	__u32 sys_pages;	/* 4K pages mapped as system memory (0 unless HAS_DMA) */
	__u32 dev_pages;	/* 4K pages mapped as device memory */
	__u32 segments;		/* entries used in dma_addr[] */
	__u32 read_only;	/* the mapping is DMA_TO_DEVICE */
	__u32 queued;		/* waits for the garbage collector */
};

struct usvm_ref_find {
	__u64 addr;
	__u64 gpuva_start;
	__u64 gpuva_end;
	struct usvm_ref_ctx ctx;
	struct usvm_ref_range out;
	__u32 inserted;		/* out: 1 new range, 0 found */
	__u32 pad;
};

struct usvm_ref_on_range {
	__u64 addr;
	struct usvm_ref_ctx ctx;
	struct usvm_ref_range out;	/* the range after the call */
	__u64 value;			/* scan: enum drm_gpusvm_scan_result; gc: ranges removed; devevict: in count */
};

struct usvm_ref_gpu_rw {
	__u64 addr;		/* page aligned; [addr, addr + len) lies in one range */
	__u64 len;
	__u64 value;		/* write: page i gets value + i in its first 8 bytes; read: out, sum of those */
	__u32 write;
	__u32 pad;
};

/* One call of the invalidate callback: one per notifier that the event touches. */
struct usvm_ref_event {
	__u64 start;
	__u64 end;
	__u64 notifier;		/* start of the notifier it was delivered to */
	__u32 type;		/* enum mmu_notifier_event */
	__u32 hits;		/* ranges of the notifier that it touched */
	__u64 first;		/* start of the first range hit */
	__u64 last;		/* end of the last range hit */
};

struct usvm_ref_buf {
	__u64 ptr;
	__u32 capacity;		/* in entries */
	__u32 count;		/* out: entries there were; more than capacity: truncated */
};

struct usvm_ref_dump {
	struct usvm_ref_buf ranges;	/* struct usvm_ref_range, in address order */
	struct usvm_ref_buf notifiers;	/* pairs of __u64: start, end, in address order */
	__u32 gc_queue;			/* ranges in the garbage collector's queue */
	__u32 vram_used;		/* device pages allocated */
};

#define USVM_REF_CREATE		_IOW('U', 1, struct usvm_ref_create)
#define USVM_REF_DESTROY	_IO('U', 2)
#define USVM_REF_FIND		_IOWR('U', 3, struct usvm_ref_find)
#define USVM_REF_GET_PAGES	_IOWR('U', 4, struct usvm_ref_on_range)
#define USVM_REF_UNMAP_PAGES	_IOWR('U', 5, struct usvm_ref_on_range)
#define USVM_REF_MIGRATE	_IOWR('U', 6, struct usvm_ref_on_range)
#define USVM_REF_EVICT		_IOWR('U', 7, struct usvm_ref_on_range)
#define USVM_REF_DEVEVICT	_IOWR('U', 8, struct usvm_ref_on_range)
#define USVM_REF_REMOVE		_IOWR('U', 9, struct usvm_ref_on_range)
#define USVM_REF_GC		_IOWR('U', 10, struct usvm_ref_on_range)
#define USVM_REF_SCAN		_IOWR('U', 11, struct usvm_ref_on_range)
#define USVM_REF_GPU_RW		_IOWR('U', 12, struct usvm_ref_gpu_rw)
#define USVM_REF_EVENTS		_IOWR('U', 13, struct usvm_ref_buf)
#define USVM_REF_DUMP		_IOWR('U', 14, struct usvm_ref_dump)
#define USVM_REF_MEMCPY	_IOWR('U', 15, struct usvm_ref_on_range)	/* value: ns of the kernel's memcpy of 2 MiB */

#endif
