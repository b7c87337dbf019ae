#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Breaks one rule of usvm's space at a time and asks the replay of the kept traces to notice.

    mutate.py [--only PATTERN] [--scratch DIR]     needs cargo; some minutes

Each variant is applied to a scratch copy of the workspace, usvm-replay is built there and run. Prints a table: the rule,
what was broken, the first trace and operation that notices, how many traces do. Fails if one is not noticed or does not
apply. Not part of `make test`.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SPACE = "runtime/src/space/"
LOOKUP, CHUNK, PAGES, INVALIDATE = (SPACE + f for f in ("lookup.rs", "chunk.rs", "pages.rs", "invalidate.rs"))
NOTIFIER, RANGE, TREE, MOD = (SPACE + f for f in ("notifier.rs", "range.rs", "tree.rs", "mod.rs"))
ERROR, PORTS = "runtime/src/ground/error.rs", SPACE + "ports.rs"

BOUNDS = "let bounds = [vma.span, self.window_of(addr), request.gpuva, limits];"
UNCHECKED = "if size != SZ_4K && size <= request.ctx.check_pages_threshold && unchecked {"
NO_CHUNK = "return Err(Error::OutsideSpace { addr });\n        };\n        let size"
NOT_WRITABLE = "    if !ctx.read_only && !vma.write {\n        return Err(Error::NotWritable { addr });\n    }\n"
SPECIAL = """    if vma.kind == VmaKind::Special {
        return Err(Error::os("mapping the kernel's own pages for a device", Errno(libc::EIO)));
    }
"""
LIMITS = """        if !(limits.contains(addr) || self.kernel_exact() && addr == limits.end) {
            return Err(Error::OutsideSpace { addr });
        }
"""
MIGRATE = "request.ctx.devmem_possible && vma.migratable()"
STILL_GOOD = """            && (self.kernel_exact()
                || (ctx.read_only || held.contains(RangeFlags::WRITABLE))
                    && (!ctx.devmem_only || held.contains(RangeFlags::HAS_DEVMEM_PAGES))
                    && (!held.contains(RangeFlags::MIXED) || ctx.allow_mixed && !ctx.devmem_only))"""
HIT = "self.update(|flags, _| (flags.difference(RangeFlags::PAGES) | set, invalidation.stamp())).0"
BEFORE_PAGES = "let before = range.state.hit(&invalidation, set);"
FIND_OLD = "            if let Some(range) = self.find(addr) {\n                return Ok(range);\n            }\n"
LINK_OLD = "if let Some(range) = window.and_then(|w| w.tree.find(&self.levels, addr)) {"

# (rule, what is broken, [(file, text, instead)...])
VARIANTS = [
    ("chunk alignment", "the block around the page before", [
        (CHUNK, "Candidate { index, span: Span::around(addr, size) }",
         "Candidate { index, span: Span::around(addr - (addr & SZ_4K), size) }")]),
    ("chunk alignment", "chunks begin at the fault's 64K", [
        (CHUNK, "Candidate { index, span: Span::around(addr, size) }",
         "Candidate { index, span: Span::sized(addr & !(0xffff & (size - 1)), size) }")]),
    ("largest chunk first", "smallest first", [
        (CHUNK, "let sizes = self.sizes.iter().enumerate().skip(from);",
         "let sizes = self.sizes.iter().enumerate().skip(from).rev();")]),
    ("VMA bound", "ignored", [(LOOKUP, BOUNDS, BOUNDS.replace("vma.span", "limits"))]),
    ("VMA bound", "start ignored", [(LOOKUP, BOUNDS, BOUNDS.replace("vma.span", "Span::new(0, vma.span.end)"))]),
    ("VMA bound", "end ignored", [
        (LOOKUP, BOUNDS, BOUNDS.replace("vma.span", "Span::new(vma.span.start, u64::MAX)"))]),
    ("VMA bound", "end off by a page", [
        (LOOKUP, BOUNDS, BOUNDS.replace("vma.span", "Span::new(vma.span.start, vma.span.end - 0x1000)"))]),
    ("notifier bound", "larger chunks taken as the notifier's whole window", [
        (LOOKUP, BOUNDS, BOUNDS.replace("self.window_of(addr)", "limits")),
        (LOOKUP, "self.levels.of_size(chunk.span.len())?", "self.levels.of_size(chunk.span.len()).unwrap_or(0)")]),
    ("notifier bound", "a chunk as large as the window refused", [
        (LOOKUP, "self.levels.of_size(chunk.span.len())?", "self.levels.of_size(chunk.span.len()).filter(|l| *l > 0)?")]),
    ("GPU VA bound", "ignored", [(LOOKUP, BOUNDS, BOUNDS.replace("request.gpuva", "limits"))]),
    ("GPU VA bound", "low end ignored", [
        (LOOKUP, BOUNDS, BOUNDS.replace("request.gpuva", "Span::new(0, request.gpuva.end)"))]),
    ("GPU VA bound", "high end ignored", [
        (LOOKUP, BOUNDS, BOUNDS.replace("request.gpuva", "Span::new(request.gpuva.start, u64::MAX)"))]),
    ("GPU VA bound", "also for ranges that exist", [
        (LOOKUP, FIND_OLD, FIND_OLD.replace("self.find(addr)", "self.find(addr).filter(|r| gpuva.covers(r.span()))")),
        (LOOKUP, LINK_OLD, LINK_OLD.replace("addr))", "addr)).filter(|r| request.gpuva.covers(r.span()))"))]),
    ("space's limits", "kernel-exact chunks clipped to them", [
        (LOOKUP, "let limits = if self.kernel_exact() {", "let limits = if false {")]),
    ("space's limits", "default chunks not clipped to them", [
        (LOOKUP, "let limits = if self.kernel_exact() {", "let limits = if true {")]),
    ("space's limits", "kernel-exact refuses one past the end", [
        (LOOKUP, "self.kernel_exact() && addr == limits.end", "false")]),
    ("space's limits", "default accepts one past the end", [
        (LOOKUP, "self.kernel_exact() && addr == limits.end", "addr == limits.end")]),
    ("space's limits", "start not checked", [
        (LOOKUP, "if !(limits.contains(addr)", "if !(addr < limits.end")]),
    ("overlap", "not checked", [
        (LOOKUP, "let free = !window.is_some_and(|w| w.tree.overlaps(&self.levels, addr, level));",
         "let free = true;")]),
    ("overlap", "only ranges that hold the chunk's start", [
        (LOOKUP, "w.tree.overlaps(&self.levels, addr, level));",
         "w.tree.find(&self.levels, chunk.span.start).is_some() && w.tree.overlaps(&self.levels, addr, level)"
         " || level == 0 && w.tree.overlaps(&self.levels, addr, level));")]),
    ("overlap", "unmapped ranges not found", [
        (LOOKUP, FIND_OLD, FIND_OLD.replace("self.find(addr)", "self.find(addr).filter(|r| !r.is_gone())")),
        (LOOKUP, LINK_OLD, LINK_OLD.replace("addr))", "addr)).filter(|r| !r.is_gone())"))]),
    ("check-pages threshold", "compared with <", [(LOOKUP, UNCHECKED, UNCHECKED.replace("<=", "<"))]),
    ("check-pages threshold", "one byte less is enough", [
        (LOOKUP, UNCHECKED, UNCHECKED.replace("size <= ", "size - 1 <= "))]),
    ("check-pages threshold", "the next larger size is checked, too", [
        (LOOKUP, UNCHECKED, UNCHECKED.replace("size <= ", "size / 32 <= "))]),
    ("check-pages threshold", "pages never checked", [(LOOKUP, UNCHECKED, "if false && unchecked {")]),
    ("check-pages threshold", "every chunk checked", [
        (LOOKUP, UNCHECKED, "if size != SZ_4K && unchecked {")]),
    ("check-pages threshold", "only chunks above it checked", [(LOOKUP, UNCHECKED, UNCHECKED.replace("<=", ">"))]),
    ("check-pages threshold", "4K checked too", [(LOOKUP, UNCHECKED, UNCHECKED.replace("size != SZ_4K && ", ""))]),
    ("check-pages threshold", "a size is left out after one that is not populated", [
        (LOOKUP, "from = chunk.index + 1", "from = chunk.index + 2")]),
    ("notifier window", "twice as large", [
        (LOOKUP, "Span::around(addr, self.config.notifier_size)", "Span::around(addr, self.config.notifier_size * 2)")]),
    ("notifier window", "an event reaches the first notifier only", [
        (INVALIDATE, "in self.windows_in(&windows, event.span) {", "in self.windows_in(&windows, event.span).take(1) {")]),
    ("notifier window", "an event reaches the notifier before, too", [
        (MOD, "windows.range(first..span.end.max(first))",
         "windows.range(first.saturating_sub(self.config.notifier_size)..span.end.max(first))")]),
    ("notifier window", "an event that ends at a notifier's start reaches it", [
        (MOD, "windows.range(first..span.end.max(first))", "windows.range(first..=span.end.max(first))")]),
    ("notifier's sequence", "not advanced", [
        (NOTIFIER, "self.notifier.seq.store(self.stamp, Ordering::Release);", "self.notifier.seq.store(2, Ordering::Release);")]),
    ("notifier's sequence", "pages of before an event are used", [
        (NOTIFIER, "if stamp > ticket.0 {", "if stamp > ticket.0 && false {")]),
    ("notifier's life", "stays without ranges", [(MOD, "if window.tree.is_empty() {", "if false {")]),
    ("notifier's life", "goes with any range", [(MOD, "if window.tree.is_empty() {", "if true {")]),
    ("notifier's life", "a find that fails leaves one", [
        (LOOKUP, NO_CHUNK, """windows.entry(start).or_insert_with(|| Window {
                notifier: Arc::new(Notifier::new(self.window_of(addr), self.clock.now())),
                tree: ChunkTree::new(),
            });
            """ + NO_CHUNK)]),
    ("events' ranges", "the whole notifier is hit", [
        (INVALIDATE, "window.tree.visit(&self.levels, start, event.span,",
         "window.tree.visit(&self.levels, start, window.notifier.span(),")]),
    ("events' ranges", "the range after the event is hit", [
        (INVALIDATE, "window.tree.visit(&self.levels, start, event.span,",
         "window.tree.visit(&self.levels, start, Span::new(event.span.start, event.span.end.saturating_add(1)),")]),
    ("events' ranges", "the last page is not hit", [
        (INVALIDATE, "window.tree.visit(&self.levels, start, event.span,",
         "window.tree.visit(&self.levels, start, Span::new(event.span.start, event.span.end - 0x1000),")]),
    ("MIGRATE_DEVMEM", "for any mapping", [(LOOKUP, MIGRATE, "request.ctx.devmem_possible")]),
    ("MIGRATE_DEVMEM", "without devmem_possible", [(LOOKUP, MIGRATE, "vma.migratable()")]),
    ("MIGRATE_DEVMEM", "for private files", [
        (PORTS, "self.kind == VmaKind::Anonymous\n", "matches!(self.kind, VmaKind::Anonymous | VmaKind::File)\n")]),
    ("MIGRATE_DEVMEM", "for shared memory", [
        (PORTS, "self.kind == VmaKind::Anonymous\n", "matches!(self.kind, VmaKind::Anonymous | VmaKind::Shared)\n")]),
    ("UNMAPPED", "set by CLEAR as well", [
        (INVALIDATE, "EventKind::Unmap => unmap_flags", "EventKind::Unmap | EventKind::Clear => unmap_flags")]),
    ("UNMAPPED", "never set", [
        (INVALIDATE, "EventKind::Unmap => unmap_flags", "EventKind::Release => unmap_flags")]),
    ("UNMAPPED", "set by any event", [
        (INVALIDATE, "                    _ => RangeFlags::empty(),", "                    _ => RangeFlags::UNMAPPED,")]),
    ("UNMAPPED", "forgotten at the next event", [
        (NOTIFIER, HIT, "self.update(|flags, _| (flags.difference(RangeFlags::PAGES | RangeFlags::UNMAPPED) | set,"
                        " invalidation.stamp())).0")]),
    ("PARTIAL_UNMAP", "never", [(INVALIDATE, "PARTIAL_UNMAP, !hole.covers(range)", "PARTIAL_UNMAP, false")]),
    ("PARTIAL_UNMAP", "always", [(INVALIDATE, "PARTIAL_UNMAP, !hole.covers(range)", "PARTIAL_UNMAP, true")]),
    ("PARTIAL_UNMAP", "unless the event is exactly the range", [
        (INVALIDATE, "PARTIAL_UNMAP, !hole.covers(range)", "PARTIAL_UNMAP, hole != range")]),
    ("PARTIAL_UNMAP", "only if the range begins before", [
        (INVALIDATE, "PARTIAL_UNMAP, !hole.covers(range)", "PARTIAL_UNMAP, range.start < hole.start")]),
    ("PARTIAL_UNMAP", "only if the range ends after", [
        (INVALIDATE, "PARTIAL_UNMAP, !hole.covers(range)", "PARTIAL_UNMAP, range.end > hole.end")]),
    ("HAS_DMA_MAPPING, HAS_DEVMEM_PAGES", "an event leaves both", [
        (NOTIFIER, HIT, HIT.replace("flags.difference(RangeFlags::PAGES)", "flags"))]),
    ("HAS_DMA_MAPPING, HAS_DEVMEM_PAGES", "an event leaves the second", [
        (NOTIFIER, HIT, HIT.replace("RangeFlags::PAGES", "RangeFlags::HAS_DMA_MAPPING"))]),
    ("HAS_DMA_MAPPING, HAS_DEVMEM_PAGES", "unmap_pages does nothing", [
        (RANGE, "self.state.drop_pages()", "self.state.load().0")]),
    ("HAS_DMA_MAPPING", "not set", [
        (NOTIFIER, "RangeFlags::HAS_DMA_MAPPING | more.intersection", "more.intersection")]),
    ("HAS_DEVMEM_PAGES", "not set", [(PAGES, "flags |= RangeFlags::HAS_DEVMEM_PAGES;", "")]),
    ("HAS_DEVMEM_PAGES", "set for system pages", [
        (PAGES, "let mut flags = RangeFlags::empty();", "let mut flags = RangeFlags::HAS_DEVMEM_PAGES;")]),
    ("mapping's direction", "always for writing", [
        (PAGES, "flags.set(RangeFlags::WRITABLE, !ctx.read_only);", "flags.set(RangeFlags::WRITABLE, true);")]),
    ("mapping's direction", "always read-only", [
        (PAGES, "flags.set(RangeFlags::WRITABLE, !ctx.read_only);", "")]),
    ("get_pages faults", "always for reading", [
        (PAGES, "source.fault(range.span(), !ctx.read_only)", "source.fault(range.span(), false)")]),
    ("get_pages faults", "always for writing", [
        (PAGES, "source.fault(range.span(), !ctx.read_only)", "source.fault(range.span(), true)")]),
    ("get_pages EFAULT", "an unmapped range is mapped", [
        (NOTIFIER, "flags.intersects(RangeFlags::UNMAPPED | RangeFlags::REMOVED) {", "flags.contains(RangeFlags::REMOVED) {")]),
    ("get_pages EFAULT", "unmapped is asked before the fault's EPERM", [
        (PAGES, "            let folios = match source",
         "            if range.is_gone() {\n                return Err(Error::Gone { addr: range.start() });\n            }\n"
         "            let folios = match source")]),
    ("get_pages EOPNOTSUPP", "two allocations accepted", [
        (PAGES, "if other_allocation && !ctx.allow_mixed || other_device {", "if other_device {")]),
    ("get_pages EOPNOTSUPP", "allow_mixed ignored for allocations", [
        (PAGES, "if other_allocation && !ctx.allow_mixed || other_device {", "if other_allocation || other_device {")]),
    ("get_pages EOPNOTSUPP", "allow_mixed ignored for system pages", [
        (PAGES, "if device_of.is_some() && !ctx.allow_mixed {", "if device_of.is_some() {")]),
    ("get_pages EOPNOTSUPP", "system after device accepted", [
        (PAGES, "if device_of.is_some() && !ctx.allow_mixed {", "if false {")]),
    ("get_pages EOPNOTSUPP", "device after system accepted", [
        (PAGES, "page > 0 && allocation_of != Some(allocation)",
         "allocation_of.is_some_and(|before| before != allocation)")]),
    ("get_pages devmem_only", "ignored", [(PAGES, "                if ctx.devmem_only {", "                if false {")]),
    ("get_pages devmem_only", "asked before mixed pages are", [
        (PAGES, "                if device_of.is_some() && !ctx.allow_mixed {",
         "                if ctx.devmem_only {\n                    return gone(page);\n                }\n"
         "                if device_of.is_some() && !ctx.allow_mixed {")]),
    ("still valid", "kernel-exact looks at the context", [
        (PAGES, STILL_GOOD, STILL_GOOD.replace("self.kernel_exact()", "false"))]),
    ("still valid", "default mode ignores the context", [
        (PAGES, STILL_GOOD, STILL_GOOD.replace("self.kernel_exact()", "true"))]),
    ("still valid", "default mode ignores read_only", [
        (PAGES, STILL_GOOD, STILL_GOOD.replace("(ctx.read_only || held.contains(RangeFlags::WRITABLE))", "true"))]),
    ("still valid", "default mode ignores devmem_only", [
        (PAGES, STILL_GOOD, STILL_GOOD.replace(
            "(!ctx.devmem_only || held.contains(RangeFlags::HAS_DEVMEM_PAGES))", "true"))]),
    ("still valid", "default mode ignores mixed pages", [
        (PAGES, STILL_GOOD, STILL_GOOD.replace(
            "(!held.contains(RangeFlags::MIXED) || ctx.allow_mixed && !ctx.devmem_only)", "true"))]),
    ("still valid", "never", [(PAGES, "range.pages_valid_hint()\n", "false && range.pages_valid_hint()\n")]),
    ("still valid", "always", [(PAGES, "range.pages_valid_hint()\n", "true\n")]),
    ("still valid", "only with device pages", [
        (RANGE, "intersects(RangeFlags::HAS_DEVMEM_PAGES | RangeFlags::HAS_DMA_MAPPING)",
         "contains(RangeFlags::HAS_DEVMEM_PAGES)")]),
    ("garbage collection", "ranges not removed", [
        (INVALIDATE, "removed += usize::from(self.remove(range));", "removed += 1;")]),
    ("garbage collection", "only partly unmapped ranges queued", [
        (INVALIDATE, "if info.queued() {", "if info.queued() && after.contains(RangeFlags::PARTIAL_UNMAP) {")]),
    ("garbage collection", "queued again at every unmap", [
        (INVALIDATE, "if info.queued() {", "if after.contains(RangeFlags::QUEUED) {")]),
    ("garbage collection", "last in first out", [
        (INVALIDATE, "list.ranges.pop_front()", "list.ranges.pop_back()")]),
    ("garbage collection", "one range for each call", [
        (INVALIDATE, "            item.range = None;\n        }", "            item.range = None;\n            break;\n        }")]),
    ("remove", "the range stays findable", [
        (MOD, "let removed = window.tree.remove(&self.levels, range.start());", "let removed = Some(range.clone());")]),
    ("no-VMA error", "the next mapping is taken", [
        (LOOKUP, "let vma = vma.ok_or(Error::NoVma { addr })?;",
         "let vma = vma.or(aspace.find_vma((addr | 0xffff) + 1)?).ok_or(Error::NoVma { addr })?;")]),
    ("permission error", "not checked", [(LOOKUP, NOT_WRITABLE, "")]),
    ("permission error", "read_only ignored", [
        (LOOKUP, NOT_WRITABLE, NOT_WRITABLE.replace("!ctx.read_only && ", ""))]),
    ("permission error", "reading needs VM_READ", [
        (LOOKUP, NOT_WRITABLE, NOT_WRITABLE.replace("!ctx.read_only && !vma.write", "!ctx.read_only && !vma.write || !vma.read"))]),
    ("EIO", "not checked", [(LOOKUP, SPECIAL, "")]),
    ("order of errors", "EIO before EPERM", [(LOOKUP, NOT_WRITABLE + SPECIAL, SPECIAL + NOT_WRITABLE)]),
    ("order of errors", "ENOENT before the limits' EINVAL", [
        (LOOKUP, LIMITS, "        usable_vma(aspace, addr, ctx)?;\n" + LIMITS)]),
    ("order of errors", "an existing range before the mapping's errors", [
        (LOOKUP, "            let vma = usable_vma(aspace, addr, ctx)?;\n" + FIND_OLD,
         FIND_OLD + "            let vma = usable_vma(aspace, addr, ctx)?;\n")]),
    ("errno", "no chunk fits: ENOENT", [
        (LOOKUP, NO_CHUNK, NO_CHUNK.replace("OutsideSpace", "NoVma"))]),
    ("errno", "mixed pages: EINVAL", [
        (ERROR, "Error::Mixed { .. } | Error::NotSupported(_) => libc::EOPNOTSUPP,",
         "Error::Mixed { .. } => libc::EINVAL,\n            Error::NotSupported(_) => libc::EOPNOTSUPP,")]),
]


def copy_workspace(scratch):
    for name in ("Cargo.toml", "Cargo.lock", "rustfmt.toml"):
        shutil.copy2(ROOT / name, scratch / name)
    skip = shutil.ignore_patterns("traces", "target", ".cache")
    for name in ("runtime", "tests", "bench", "examples"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        # New times: what an earlier run left built must not pass for this.
        shutil.copytree(ROOT / name, scratch / name, ignore=skip, copy_function=shutil.copyfile)


def build(scratch):
    """The replayer, or what the compiler said. Not optimised: building takes longer than replaying."""
    env = dict(os.environ, CARGO_TARGET_DIR=str(scratch / "target"), CARGO_PROFILE_DEV_DEBUG="0",
               CARGO_PROFILE_DEV_OPT_LEVEL="0")
    cargo = [os.environ.get("CARGO", "cargo"), "build", "--quiet", "-p", "usvm-tests", "--bin", "usvm-replay"]
    done = subprocess.run(cargo, cwd=scratch, env=env, capture_output=True, text=True)
    return None if done.returncode == 0 else done.stderr


def replay(scratch, traces):
    """The traces that notice, and the first operation that does."""
    program = str(scratch / "target/debug/usvm-replay")
    noticed, first = set(), None
    for trace in traces:
        name = trace.name.removesuffix(".trace.xz")
        try:
            done = subprocess.run([program, str(trace)], capture_output=True, text=True, timeout=60)
        except subprocess.TimeoutExpired:
            noticed.add(name)
            first = first or (name, "does not end")
            continue
        if done.returncode == 0:
            continue
        noticed.add(name)
        found = re.match(rf"{re.escape(name)}: op (\d+) (\w+) [^\n]*?: (default mode|panics)?", done.stdout)
        how = f"op {found[1]} {found[2]}" + (f", {found[3]}" if found[3] else "") if found else done.stderr[-200:]
        first = first or (name, how)
    return noticed, first


def apply(scratch, edits):
    for file, old, new in edits:
        path = scratch / file
        text = path.read_text()
        if text.count(old) != 1:
            return f"the text is there {text.count(old)} times in {file}"
        path.write_text(text.replace(old, new))
    return None


def main():
    args = argparse.ArgumentParser()
    args.add_argument("--only", default="")
    args.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "usvm-mutate")
    args = args.parse_args()
    scratch = args.scratch
    scratch.mkdir(parents=True, exist_ok=True)
    copy_workspace(scratch)
    traces = sorted((ROOT / "tests/kernel-ref/traces").glob("*.trace.xz"))
    error = build(scratch)
    if error or replay(scratch, traces)[0]:
        sys.exit(error or "the replay finds differences without any rule broken")
    failed = []
    print("| rule | broken | first noticed by | traces that notice |\n|---|---|---|---|", flush=True)
    for rule, broken, edits in VARIANTS:
        if not re.search(args.only, f"{rule}: {broken}"):
            continue
        error = apply(scratch, edits) or build(scratch)
        noticed, first = (set(), None) if error else replay(scratch, traces)
        for file in {file for file, _, _ in edits}:
            (scratch / file).write_text((ROOT / file).read_text())
        if not noticed:
            failed.append(f"{rule}: {broken}: {error or 'survives'}")
        where = f"{first[0]}, {first[1]}" if first else "**not noticed**"
        print(f"| {rule} | {broken} | {where} | {len(noticed)} |", flush=True)
    print("\n".join(failed), file=sys.stderr)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
