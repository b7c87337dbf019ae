// SPDX-License-Identifier: MIT OR GPL-2.0-only
/*
 * usvm_ref: the kernel's own drm_gpusvm, drm_pagemap and device-private memory behind a few ioctls, so that a test can
 * ask them what they do. There is no GPU: the DRM device hangs off a faux device, device memory is kernel memory that
 * stands in for device-private pages, and the CPU copies.
 *
 * Everything that decides (chunk choice, flags, errors, migration) is the kernel's. What a driver must add is the
 * example from drm_gpusvm's own documentation: an invalidate callback that unmaps, marks and queues, and a garbage
 * collector that evicts partial ranges and removes.
 *
 * Locking: space->lock is the "driver_svm_lock" of drm_gpusvm's documentation; it is held over every call that finds,
 * inserts, removes or uses a range. space->log_lock (a spinlock) covers the event log and the collector's queue, which
 * the invalidate callback fills under drm_gpusvm's notifier lock. vram.lock is taken with interrupts off, because the
 * last put of a device page can come from anywhere.
 *
 * The module cannot be unloaded: the virtual machine it runs in is thrown away.
 */

#include <linux/bitmap.h>
#include <linux/device/faux.h>
#include <linux/dma-mapping.h>
#include <linux/fs.h>
#include <linux/highmem.h>
#include <linux/memremap.h>
#include <linux/migrate.h>
#include <linux/miscdevice.h>
#include <linux/mm.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>

#include <drm/drm_device.h>
#include <drm/drm_drv.h>
#include <drm/drm_gpusvm.h>
#include <drm/drm_pagemap.h>

#include "usvm_ref.h"

#define VRAM_BLOCKS	128			/* of 2 MiB: 256 MiB of device memory */
#define VRAM_PAGES	(VRAM_BLOCKS * 512UL)
#define BLOCK_ORDER	10			/* a block lies in twice its size, */
#define BLOCK_OFFSET	(17 * PAGE_SIZE)	/* so far from a multiple of 2 MiB: see tests/kernel-ref/README.md */
#define VRAM_BASE	(1ULL << 40)		/* device addresses start here, so that 0 means none */
#define MAX_EVENTS	16384

/* ---- the device: its memory and how it is copied ---------------------------------------------------------------- */

struct ref_device {
	struct drm_device drm;
	struct dev_pagemap pagemap;
	struct drm_pagemap dpagemap;
};

static struct ref_device *gpu;

/* Device memory: pages pfn_base.. are the device-private struct pages, store[] the bytes behind them. */
static struct {
	spinlock_t lock;
	unsigned long pfn_base;
	unsigned long limit;			/* pages that may be given out */
	unsigned long used;
	DECLARE_BITMAP(map, VRAM_PAGES);
	void *store[VRAM_BLOCKS];
	struct list_head allocs;		/* struct ref_bo, oldest first */
} vram;

/* One device memory allocation: what drm_pagemap migrates a range into. */
struct ref_bo {
	struct drm_pagemap_devmem devmem;
	struct list_head link;
	struct kref refs;
	unsigned long first;			/* first page in vram.map */
	unsigned long npages;
};

static void *vram_page(unsigned long index)
{
	return vram.store[index / 512] + BLOCK_OFFSET + (index % 512) * PAGE_SIZE;
}

/* The bytes behind a device-private page. A block is physically contiguous, so a 2 MiB folio is too. */
static void *device_bytes(struct page *page)
{
	return vram_page(page_to_pfn(page) - vram.pfn_base);
}

/* The bytes behind an address that drm_pagemap or drm_gpusvm mapped. There is no IOMMU: a DMA address is physical. */
static void *mapped_bytes(const struct drm_pagemap_addr *addr)
{
	if (addr->proto == DRM_INTERCONNECT_DRIVER)
		return vram_page((addr->addr - VRAM_BASE) >> PAGE_SHIFT);
	return phys_to_virt(addr->addr);
}

static long vram_take(unsigned long npages)
{
	unsigned long flags, at;

	spin_lock_irqsave(&vram.lock, flags);
	at = bitmap_find_next_zero_area(vram.map, VRAM_PAGES, 0, npages, npages - 1);
	if (at >= VRAM_PAGES || vram.used + npages > vram.limit) {
		spin_unlock_irqrestore(&vram.lock, flags);
		return -ENOSPC;
	}
	bitmap_set(vram.map, at, npages);
	vram.used += npages;
	spin_unlock_irqrestore(&vram.lock, flags);
	return at;
}

static void bo_free(struct kref *refs)
{
	struct ref_bo *bo = container_of(refs, struct ref_bo, refs);

	kfree(bo);
}

/* The last page of the allocation is free: its memory can be given out again. */
static void bo_release(struct drm_pagemap_devmem *devmem)
{
	struct ref_bo *bo = container_of(devmem, struct ref_bo, devmem);
	unsigned long flags;

	spin_lock_irqsave(&vram.lock, flags);
	bitmap_clear(vram.map, bo->first, bo->npages);
	vram.used -= bo->npages;
	list_del_init(&bo->link);
	spin_unlock_irqrestore(&vram.lock, flags);
	kref_put(&bo->refs, bo_free);
}

static int bo_pfns(struct drm_pagemap_devmem *devmem, unsigned long npages, unsigned long *pfn)
{
	struct ref_bo *bo = container_of(devmem, struct ref_bo, devmem);
	unsigned long i;

	for (i = 0; i < npages; i++)
		pfn[i] = vram.pfn_base + bo->first + i;
	return 0;
}

/* pages[i] is the device page, addr[i] the source; a device page without a source was a hole and must read as zero. */
static int copy_to_devmem(struct page **pages, struct drm_pagemap_addr *addr, unsigned long npages,
			  struct dma_fence *fence)
{
	unsigned long i, step;

	for (i = 0; i < npages; i += step) {
		step = 1;
		if (!pages[i])
			continue;
		step = folio_nr_pages(page_folio(pages[i]));
		if (addr[i].addr)
			memcpy(device_bytes(pages[i]), mapped_bytes(&addr[i]), PAGE_SIZE << addr[i].order);
		else
			memset(device_bytes(pages[i]), 0, step * PAGE_SIZE);
	}
	return 0;
}

/* pages[i] is the device page, addr[i] the destination. */
static int copy_to_ram(struct page **pages, struct drm_pagemap_addr *addr, unsigned long npages,
		       struct dma_fence *fence)
{
	unsigned long i, step;

	for (i = 0; i < npages; i += step) {
		step = 1;
		if (!pages[i] || !addr[i].addr)
			continue;
		step = 1UL << addr[i].order;
		memcpy(mapped_bytes(&addr[i]), device_bytes(pages[i]), step * PAGE_SIZE);
	}
	return 0;
}

static const struct drm_pagemap_devmem_ops bo_ops = {
	.devmem_release = bo_release,
	.populate_devmem_pfn = bo_pfns,
	.copy_to_devmem = copy_to_devmem,
	.copy_to_ram = copy_to_ram,
};

static struct drm_pagemap_addr device_map(struct drm_pagemap *dpagemap, struct device *dev, struct page *page,
					  unsigned int order, enum dma_data_direction dir)
{
	u64 at = VRAM_BASE + ((page_to_pfn(page) - vram.pfn_base) << PAGE_SHIFT);

	return drm_pagemap_addr_encode(at, DRM_INTERCONNECT_DRIVER, order, dir);
}

static void device_unmap(struct drm_pagemap *dpagemap, struct device *dev, const struct drm_pagemap_addr *addr)
{
}

/* Called by drm_pagemap_populate_mm with the mmap lock held for reading. */
static int populate_mm(struct drm_pagemap *dpagemap, unsigned long start, unsigned long end, struct mm_struct *mm,
		       unsigned long timeslice_ms)
{
	struct drm_pagemap_migrate_details details = { .timeslice_ms = timeslice_ms };
	unsigned long flags;
	struct ref_bo *bo;
	long at;

	bo = kzalloc(sizeof(*bo), GFP_KERNEL);
	if (!bo)
		return -ENOMEM;
	bo->npages = (end - start) >> PAGE_SHIFT;
	at = vram_take(bo->npages);
	if (at < 0) {
		kfree(bo);
		return at;
	}
	bo->first = at;
	kref_init(&bo->refs);
	drm_pagemap_devmem_init(&bo->devmem, gpu->drm.dev, mm, &bo_ops, dpagemap, end - start, NULL);
	spin_lock_irqsave(&vram.lock, flags);
	list_add_tail(&bo->link, &vram.allocs);
	spin_unlock_irqrestore(&vram.lock, flags);
	/* Consumes the allocation, also on error. */
	return drm_pagemap_migrate_to_devmem(&bo->devmem, mm, start, end, &details);
}

static const struct drm_pagemap_ops pagemap_ops = {
	.device_map = device_map,
	.device_unmap = device_unmap,
	.populate_mm = populate_mm,
};

/* What TTM does under memory pressure: the oldest allocations go back to RAM. Gives how many went. */
static int evict_oldest(unsigned long want, u64 *done)
{
	int err = 0;

	for (*done = 0; *done < want && !err; (*done)++) {
		struct ref_bo *bo;
		unsigned long flags;

		spin_lock_irqsave(&vram.lock, flags);
		bo = list_first_entry_or_null(&vram.allocs, struct ref_bo, link);
		if (bo)
			kref_get(&bo->refs);
		spin_unlock_irqrestore(&vram.lock, flags);
		if (!bo)
			break;
		err = drm_pagemap_evict_to_ram(&bo->devmem);
		kref_put(&bo->refs, bo_free);
		if (err)
			break;
	}
	return err;
}

/* What every time in the bench is compared with. Two blocks of device memory that nothing uses yet. */
static u64 time_memcpy(void)
{
	u64 start;

	if (vram.used > VRAM_PAGES - 1024)
		return 0;
	start = ktime_get_ns();
	memcpy(vram.store[VRAM_BLOCKS - 1], vram.store[VRAM_BLOCKS - 2] + BLOCK_OFFSET, 512 * PAGE_SIZE);
	return ktime_get_ns() - start;
}

/* ---- the space: a drm_gpusvm and what a driver keeps beside it --------------------------------------------------- */

struct ref_range {
	struct drm_gpusvm_range base;
	struct list_head gc;			/* in ref_space.gc while it waits for the collector */
};

struct ref_space {
	struct drm_gpusvm svm;
	struct mutex lock;
	bool live;
	unsigned long chunks[USVM_REF_MAX_CHUNKS];
	spinlock_t log_lock;
	struct list_head gc;
	u32 gc_len;
	u32 nevents;
	struct usvm_ref_event *events;
};

static struct ref_space *to_space(struct drm_gpusvm *svm)
{
	return container_of(svm, struct ref_space, svm);
}

static struct ref_range *to_range(struct drm_gpusvm_range *range)
{
	return container_of(range, struct ref_range, base);
}

static struct drm_gpusvm_range *range_alloc(struct drm_gpusvm *svm)
{
	struct ref_range *range = kzalloc(sizeof(*range), GFP_KERNEL);

	if (!range)
		return NULL;
	INIT_LIST_HEAD(&range->gc);
	return &range->base;
}

static void range_free(struct drm_gpusvm_range *range)
{
	kfree(to_range(range));
}

/* Under svm->notifier_lock, held for writing. */
static void invalidate(struct drm_gpusvm *svm, struct drm_gpusvm_notifier *notifier,
		       const struct mmu_notifier_range *mmu)
{
	struct ref_space *space = to_space(svm);
	struct drm_gpusvm_ctx ctx = { .in_notifier = true };
	struct drm_gpusvm_range *range = NULL;
	struct usvm_ref_event event = {
		.start = mmu->start,
		.end = mmu->end,
		.notifier = drm_gpusvm_notifier_start(notifier),
		.type = mmu->event,
	};

	drm_gpusvm_for_each_range(range, notifier, mmu->start, mmu->end) {
		if (!event.hits++)
			event.first = drm_gpusvm_range_start(range);
		event.last = drm_gpusvm_range_end(range);
		drm_gpusvm_range_unmap_pages(svm, range, &ctx);
		if (mmu->event != MMU_NOTIFY_UNMAP)
			continue;
		drm_gpusvm_range_set_unmapped(range, mmu);
		spin_lock(&space->log_lock);
		if (list_empty(&to_range(range)->gc)) {
			list_add_tail(&to_range(range)->gc, &space->gc);
			space->gc_len++;
		}
		spin_unlock(&space->log_lock);
	}

	spin_lock(&space->log_lock);
	if (space->nevents < MAX_EVENTS)
		space->events[space->nevents] = event;
	space->nevents++;
	spin_unlock(&space->log_lock);
}

static const struct drm_gpusvm_ops svm_ops = {
	.range_alloc = range_alloc,
	.range_free = range_free,
	.invalidate = invalidate,
};

static void remove_range(struct ref_space *space, struct drm_gpusvm_range *range)
{
	spin_lock(&space->log_lock);
	if (!list_empty(&to_range(range)->gc)) {
		list_del_init(&to_range(range)->gc);
		space->gc_len--;
	}
	spin_unlock(&space->log_lock);
	drm_gpusvm_range_remove(&space->svm, range);
}

/* The collector of drm_gpusvm's documentation: what is left of a partly unmapped range goes back to RAM first. */
static u64 collect(struct ref_space *space)
{
	struct ref_range *range;
	u64 removed = 0;

	for (;;) {
		spin_lock(&space->log_lock);
		range = list_first_entry_or_null(&space->gc, struct ref_range, gc);
		if (range) {
			list_del_init(&range->gc);
			space->gc_len--;
		}
		spin_unlock(&space->log_lock);
		if (!range)
			return removed;
		if (range->base.pages.flags.partial_unmap)
			drm_gpusvm_range_evict(&space->svm, &range->base);
		/* The eviction's own invalidations may have queued it again. */
		remove_range(space, &range->base);
		removed++;
	}
}

static struct drm_gpusvm_range *range_at(struct ref_space *space, u64 addr)
{
	struct drm_gpusvm_notifier *notifier;

	notifier = drm_gpusvm_notifier_find(&space->svm, addr, addr + 1);
	return notifier ? drm_gpusvm_range_find(notifier, addr, addr + 1) : NULL;
}

static struct drm_gpusvm_ctx to_ctx(const struct usvm_ref_ctx *in)
{
	return (struct drm_gpusvm_ctx) {
		.device_private_page_owner = in->flags & USVM_REF_OWNER ? gpu : NULL,
		.check_pages_threshold = in->check_pages_threshold,
		.timeslice_ms = in->timeslice_ms,
		.read_only = !!(in->flags & USVM_REF_READ_ONLY),
		.devmem_possible = !!(in->flags & USVM_REF_DEVMEM_POSSIBLE),
		.devmem_only = !!(in->flags & USVM_REF_DEVMEM_ONLY),
		.allow_mixed = !!(in->flags & USVM_REF_ALLOW_MIXED),
	};
}

static void describe(struct ref_space *space, struct drm_gpusvm_range *range, struct usvm_ref_range *out)
{
	unsigned long i, npages = drm_gpusvm_range_size(range) >> PAGE_SHIFT;

	memset(out, 0, sizeof(*out));
	drm_gpusvm_notifier_lock(&space->svm);
	out->start = drm_gpusvm_range_start(range);
	out->end = drm_gpusvm_range_end(range);
	out->flags = range->pages.flags.__flags;
	if (range->pages.flags.has_dma_mapping) {
		for (i = 0; i < npages; out->segments++) {
			struct drm_pagemap_addr *addr = &range->pages.dma_addr[out->segments];

			if (addr->proto == DRM_INTERCONNECT_SYSTEM)
				out->sys_pages += 1 << addr->order;
			else
				out->dev_pages += 1 << addr->order;
			out->read_only = addr->dir == DMA_TO_DEVICE;
			i += 1UL << addr->order;
		}
	}
	spin_lock(&space->log_lock);
	out->queued = !list_empty(&to_range(range)->gc);
	spin_unlock(&space->log_lock);
	drm_gpusvm_notifier_unlock(&space->svm);
}

/* ---- the calls -------------------------------------------------------------------------------------------------- */

static long create_space(struct ref_space *space, const struct usvm_ref_create *in)
{
	unsigned int i;
	int err;

	if (space->live)
		return -EBUSY;
	if (!in->num_chunks || in->num_chunks > USVM_REF_MAX_CHUNKS || !in->notifier_size)
		return -EINVAL;
	for (i = 0; i < in->num_chunks; i++)
		space->chunks[i] = in->chunks[i];
	vram.limit = min_t(unsigned long, in->vram_pages ?: VRAM_PAGES, VRAM_PAGES);
	memset(&space->svm, 0, sizeof(space->svm));
	err = drm_gpusvm_init(&space->svm, "usvm_ref", &gpu->drm, current->mm, in->mm_start, in->mm_range,
			      in->notifier_size, &svm_ops, space->chunks, in->num_chunks);
	if (err)
		return err;
	drm_gpusvm_driver_set_lock(&space->svm, &space->lock);
	space->live = true;
	return 0;
}

static void destroy_space(struct ref_space *space)
{
	if (!space->live)
		return;
	drm_gpusvm_fini(&space->svm);
	space->live = false;
	INIT_LIST_HEAD(&space->gc);
	space->gc_len = 0;
}

static long find_range(struct ref_space *space, struct usvm_ref_find *arg)
{
	struct drm_gpusvm_ctx ctx = to_ctx(&arg->ctx);
	struct drm_gpusvm_range *before = range_at(space, arg->addr), *range;

	range = drm_gpusvm_range_find_or_insert(&space->svm, arg->addr, arg->gpuva_start, arg->gpuva_end, &ctx);
	if (IS_ERR(range))
		return PTR_ERR(range);
	arg->inserted = !before;
	describe(space, range, &arg->out);
	return 0;
}

static long on_range(struct ref_space *space, unsigned int cmd, struct usvm_ref_on_range *arg)
{
	struct drm_gpusvm_ctx ctx = to_ctx(&arg->ctx);
	struct drm_gpusvm_range *range = range_at(space, arg->addr);
	long err = 0;

	if (!range)
		return -ESRCH;
	switch (cmd) {
	case USVM_REF_GET_PAGES:
		err = drm_gpusvm_range_get_pages(&space->svm, range, &ctx);
		break;
	case USVM_REF_UNMAP_PAGES:
		drm_gpusvm_range_unmap_pages(&space->svm, range, &ctx);
		break;
	case USVM_REF_MIGRATE:
		err = drm_pagemap_populate_mm(&gpu->dpagemap, drm_gpusvm_range_start(range),
					      drm_gpusvm_range_end(range), space->svm.mm, ctx.timeslice_ms);
		break;
	case USVM_REF_EVICT:
		err = drm_gpusvm_range_evict(&space->svm, range);
		break;
	case USVM_REF_SCAN:
		arg->value = drm_gpusvm_scan_mm(range, ctx.device_private_page_owner, &gpu->pagemap);
		break;
	case USVM_REF_REMOVE:
		describe(space, range, &arg->out);
		remove_range(space, range);
		return 0;
	}
	describe(space, range, &arg->out);
	return err;
}

/* A load or store by the "GPU": only through a mapping that is valid, under the notifier lock. */
static long gpu_rw(struct ref_space *space, struct usvm_ref_gpu_rw *arg)
{
	struct drm_gpusvm_range *range = range_at(space, arg->addr);
	u64 at, end = arg->addr + arg->len, sum = 0;
	unsigned long j = 0;
	long err = 0;

	if (!range)
		return -ESRCH;
	if (!PAGE_ALIGNED(arg->addr | arg->len) || end > drm_gpusvm_range_end(range))
		return -EINVAL;
	drm_gpusvm_notifier_lock(&space->svm);
	if (!drm_gpusvm_range_pages_valid(&space->svm, range)) {
		drm_gpusvm_notifier_unlock(&space->svm);
		return -EAGAIN;
	}
	for (at = drm_gpusvm_range_start(range); at < end && !err; j++) {
		struct drm_pagemap_addr *addr = &range->pages.dma_addr[j];
		void *bytes = mapped_bytes(addr);
		u64 stop = at + (PAGE_SIZE << addr->order);

		if (arg->write && addr->dir == DMA_TO_DEVICE)
			err = -EPERM;
		for (; at < stop && !err; at += PAGE_SIZE, bytes += PAGE_SIZE) {
			if (at < arg->addr || at >= end)
				continue;
			if (arg->write)
				WRITE_ONCE(*(u64 *)bytes, arg->value + ((at - arg->addr) >> PAGE_SHIFT));
			else
				sum += READ_ONCE(*(u64 *)bytes);
		}
	}
	drm_gpusvm_notifier_unlock(&space->svm);
	if (!arg->write)
		arg->value = sum;
	return err;
}

static long take_events(struct ref_space *space, struct usvm_ref_buf *arg)
{
	struct usvm_ref_event *copy;
	u32 n, have;
	long err = 0;

	have = READ_ONCE(space->nevents);
	arg->count = 0;
	if (!have)
		return 0;
	copy = kvmalloc_array(min_t(u32, have, MAX_EVENTS) + 1, sizeof(*copy), GFP_KERNEL);
	if (!copy)
		return -ENOMEM;
	spin_lock(&space->log_lock);
	/* Events that came after `have` was read stay for the next call, unless the log overflowed. */
	n = min_t(u32, have, MAX_EVENTS);
	memcpy(copy, space->events, n * sizeof(*copy));
	if (space->nevents > have && space->nevents <= MAX_EVENTS) {
		memmove(space->events, space->events + n, (space->nevents - n) * sizeof(*copy));
		space->nevents -= n;
	} else {
		have = space->nevents;
		space->nevents = 0;
	}
	spin_unlock(&space->log_lock);
	arg->count = have;
	if (copy_to_user(u64_to_user_ptr(arg->ptr), copy, min(n, arg->capacity) * sizeof(*copy)))
		err = -EFAULT;
	kvfree(copy);
	return err;
}

static long dump(struct ref_space *space, struct usvm_ref_dump *arg)
{
	struct usvm_ref_range __user *ranges = u64_to_user_ptr(arg->ranges.ptr);
	u64 __user *notifiers = u64_to_user_ptr(arg->notifiers.ptr);
	struct drm_gpusvm_notifier *notifier;

	arg->ranges.count = 0;
	arg->notifiers.count = 0;
	drm_gpusvm_for_each_notifier(notifier, &space->svm, 0, LONG_MAX) {
		struct drm_gpusvm_range *range = NULL;
		u64 window[2] = { drm_gpusvm_notifier_start(notifier), drm_gpusvm_notifier_end(notifier) };

		if (arg->notifiers.count < arg->notifiers.capacity &&
		    copy_to_user(notifiers + 2 * arg->notifiers.count, window, sizeof(window)))
			return -EFAULT;
		arg->notifiers.count++;
		drm_gpusvm_for_each_range(range, notifier, 0, LONG_MAX) {
			struct usvm_ref_range one;

			describe(space, range, &one);
			if (arg->ranges.count < arg->ranges.capacity &&
			    copy_to_user(ranges + arg->ranges.count, &one, sizeof(one)))
				return -EFAULT;
			arg->ranges.count++;
		}
	}
	arg->gc_queue = READ_ONCE(space->gc_len);
	arg->vram_used = READ_ONCE(vram.used);
	return 0;
}

union ref_arg {
	struct usvm_ref_create create;
	struct usvm_ref_find find;
	struct usvm_ref_on_range on_range;
	struct usvm_ref_gpu_rw rw;
	struct usvm_ref_buf buf;
	struct usvm_ref_dump dump;
};

static long dispatch(struct ref_space *space, unsigned int cmd, union ref_arg *arg)
{
	if (cmd == USVM_REF_CREATE)
		return create_space(space, &arg->create);
	if (cmd == USVM_REF_EVENTS)
		return take_events(space, &arg->buf);
	if (cmd == USVM_REF_MEMCPY) {
		arg->on_range.value = time_memcpy();
		return 0;
	}
	if (!space->live)
		return -EBADFD;
	switch (cmd) {
	case USVM_REF_DESTROY:
		destroy_space(space);
		return 0;
	case USVM_REF_FIND:
		return find_range(space, &arg->find);
	case USVM_REF_GC:
		arg->on_range.value = collect(space);
		return 0;
	case USVM_REF_DEVEVICT:
		return evict_oldest(arg->on_range.value, &arg->on_range.value);
	case USVM_REF_GPU_RW:
		return gpu_rw(space, &arg->rw);
	case USVM_REF_DUMP:
		return dump(space, &arg->dump);
	case USVM_REF_GET_PAGES:
	case USVM_REF_UNMAP_PAGES:
	case USVM_REF_MIGRATE:
	case USVM_REF_EVICT:
	case USVM_REF_REMOVE:
	case USVM_REF_SCAN:
		return on_range(space, cmd, &arg->on_range);
	}
	return -ENOTTY;
}

static long ref_ioctl(struct file *file, unsigned int cmd, unsigned long user)
{
	struct ref_space *space = file->private_data;
	union ref_arg arg = {};
	long ret;

	if (_IOC_SIZE(cmd) > sizeof(arg))
		return -ENOTTY;
	if (_IOC_DIR(cmd) & _IOC_WRITE && copy_from_user(&arg, (void __user *)user, _IOC_SIZE(cmd)))
		return -EFAULT;
	mutex_lock(&space->lock);
	ret = dispatch(space, cmd, &arg);
	mutex_unlock(&space->lock);
	/* Results are handed back on error too: a failed get_pages still describes its range. */
	if (_IOC_DIR(cmd) & _IOC_READ && copy_to_user((void __user *)user, &arg, _IOC_SIZE(cmd)))
		return -EFAULT;
	return ret;
}

static int ref_open(struct inode *inode, struct file *file)
{
	struct ref_space *space = kzalloc(sizeof(*space), GFP_KERNEL);

	if (!space)
		return -ENOMEM;
	space->events = vzalloc(MAX_EVENTS * sizeof(*space->events));
	if (!space->events) {
		kfree(space);
		return -ENOMEM;
	}
	mutex_init(&space->lock);
	spin_lock_init(&space->log_lock);
	INIT_LIST_HEAD(&space->gc);
	file->private_data = space;
	return 0;
}

static int ref_release(struct inode *inode, struct file *file)
{
	struct ref_space *space = file->private_data;

	mutex_lock(&space->lock);
	destroy_space(space);
	mutex_unlock(&space->lock);
	vfree(space->events);
	kfree(space);
	return 0;
}

/* A VM_IO | VM_PFNMAP mapping, the kind that drm_gpusvm refuses with EIO. It has no pages behind it. */
static int ref_mmap(struct file *file, struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_IO | VM_PFNMAP | VM_DONTEXPAND | VM_DONTDUMP);
	return 0;
}

static const struct file_operations ref_fops = {
	.owner = THIS_MODULE,
	.open = ref_open,
	.release = ref_release,
	.unlocked_ioctl = ref_ioctl,
	.mmap = ref_mmap,
};

static struct miscdevice ref_misc = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "usvm_ref",
	.fops = &ref_fops,
};

/* ---- start ------------------------------------------------------------------------------------------------------ */

static const struct file_operations drm_fops = {
	.owner = THIS_MODULE,		/* drm_pagemap takes a reference through it */
};

static const struct drm_driver ref_driver = {
	.name = "usvm_ref",
	.desc = "drm_gpusvm reference",
	.fops = &drm_fops,
};

static int vram_init(struct device *dev)
{
	struct resource *res;
	void *addr;
	int i;

	spin_lock_init(&vram.lock);
	INIT_LIST_HEAD(&vram.allocs);
	for (i = 0; i < VRAM_BLOCKS; i++) {
		vram.store[i] = (void *)__get_free_pages(GFP_KERNEL, BLOCK_ORDER);
		if (!vram.store[i])
			return -ENOMEM;
	}
	res = devm_request_free_mem_region(dev, &iomem_resource, VRAM_PAGES * PAGE_SIZE);
	if (IS_ERR(res))
		return PTR_ERR(res);
	gpu->pagemap.type = MEMORY_DEVICE_PRIVATE;
	gpu->pagemap.range.start = res->start;
	gpu->pagemap.range.end = res->end;
	gpu->pagemap.nr_range = 1;
	gpu->pagemap.owner = gpu;
	gpu->pagemap.ops = drm_pagemap_pagemap_ops_get();
	addr = devm_memremap_pages(dev, &gpu->pagemap);
	if (IS_ERR(addr))
		return PTR_ERR(addr);
	vram.pfn_base = PHYS_PFN(res->start);
	return 0;
}

static int __init ref_init(void)
{
	struct faux_device *faux = faux_device_create("usvm_ref", NULL, NULL);
	int err;

	if (!faux)
		return -ENODEV;
	gpu = devm_drm_dev_alloc(&faux->dev, &ref_driver, struct ref_device, drm);
	if (IS_ERR(gpu)) {
		err = PTR_ERR(gpu);
		goto fail;
	}
	err = dma_coerce_mask_and_coherent(&faux->dev, DMA_BIT_MASK(64));
	if (err)
		goto fail;
	err = vram_init(&faux->dev);
	if (err)
		goto fail;
	err = drm_pagemap_init(&gpu->dpagemap, &gpu->pagemap, &gpu->drm, &pagemap_ops);
	if (err)
		goto fail;
	err = misc_register(&ref_misc);
	if (err)
		goto fail;
	return 0;
fail:
	faux_device_destroy(faux);
	return err;
}
module_init(ref_init);

MODULE_DESCRIPTION("drm_gpusvm as a reference for usvm");
MODULE_LICENSE("Dual MIT/GPL");
