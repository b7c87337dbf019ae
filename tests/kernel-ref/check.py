#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""Checks traces of the kernel's drm_gpusvm: that they are well formed, and that an independent model gives the same.

    check.py TRACE[.xz]...      TRACE.md says what the lines mean

The model knows VMAs, page presence and events from the trace (inputs) and derives find_or_insert's choice, the flags,
the mappings of get_pages, most errors, the notifiers, and the contents of anonymous pages (expectations).
"""
import bisect
import lzma
import sys

PAGE = 4096
PRESENT = set(b"pHzZ")
DEVICE = set(b"dD")
READABLE_KINDS = {"anon", "file", "shmem", "hugetlb"}
ERRNO_OK = "0"


class Bad(Exception):
    pass


class Range:
    def __init__(self, start, end, migrate):
        self.start, self.end = start, end
        self.migrate = migrate
        self.unmapped = self.partial = self.devmem = self.dma = self.queued = False
        self.sys = self.dev = 0
        self.ro = False

    def drop_mapping(self):
        self.devmem = self.dma = self.ro = False
        self.sys = self.dev = 0

    def text(self):
        flags = "".join(c if on else "-" for c, on in
                        (("M", self.migrate), ("U", self.unmapped), ("P", self.partial), ("D", self.devmem),
                         ("A", self.dma)))
        mode = ("ro" if self.ro else "rw") if self.dma else "-"
        return (self.start, self.end, flags, self.sys, self.dev, mode, self.queued)


class Ctx:
    def __init__(self, text):
        words = text.split(",")
        self.ro, self.dm, self.only = "ro" in words, "dm" in words, "only" in words
        self.mixed, self.own = "mixed" in words, "own" in words


class Model:
    """What usvm's space must do, written once more and only from the kernel's rules."""

    def __init__(self, arena, size):
        self.arena, self.size = arena, size
        self.vmas = []
        self.pages = bytearray(b"." * (size // PAGE))
        self.owner = [0] * (size // PAGE)  # device allocation behind each page
        self.next_owner = 1
        self.starts, self.ranges = [], {}
        self.live = False

    # -- the inputs ---------------------------------------------------------------------------------------------------

    def vma_at(self, addr):
        for v in self.vmas:
            if v[0] <= addr < v[1]:
                return v
        return None

    def letters(self, start, end):
        return self.pages[(start - self.arena) // PAGE:(end - self.arena) // PAGE]

    # -- ranges and notifiers -------------------------------------------------------------------------------------------

    def window(self, addr):
        return addr - addr % self.notifier

    def insert(self, r):
        bisect.insort(self.starts, r.start)
        self.ranges[r.start] = r

    def delete(self, r):
        self.starts.remove(r.start)
        del self.ranges[r.start]

    def overlapping(self, start, end):
        i = bisect.bisect_right(self.starts, start)
        if i and self.ranges[self.starts[i - 1]].end > start:
            i -= 1
        out = []
        while i < len(self.starts) and self.starts[i] < end:
            out.append(self.ranges[self.starts[i]])
            i += 1
        return out

    def range_at(self, addr):
        found = self.overlapping(addr, addr + 1)
        return found[0] if found else None

    def notifiers(self):
        return sorted({self.window(s) for s in self.starts})

    # -- what the kernel does -------------------------------------------------------------------------------------------

    def invalidate(self, kind, start, end, window):
        hit = [r for r in self.overlapping(start, end) if self.window(r.start) == window]
        for r in hit:
            r.drop_mapping()
            if kind == "UNMAP":
                r.unmapped = True
                r.partial |= r.start < start or r.end > end
                r.queued = True
        return hit

    def populated(self, vma, start, end, own):
        if vma[2][0] != "r" or vma[3] not in READABLE_KINDS:
            return False
        return all(c in PRESENT or (own and c in DEVICE) for c in self.letters(start, end))

    def find(self, addr, ctx, threshold, low, high):
        """The range that find_or_insert gives, whether it is new, or an errno."""
        if not self.live:
            return "EBADFD"
        if addr < self.mm_start or addr > self.mm_start + self.mm_range:
            return "EINVAL"
        vma = self.vma_at(addr)
        if vma is None:
            return "ENOENT"
        if not ctx.ro and vma[2][1] != "w":
            return "EPERM"
        if vma[3] == "io":
            return "EIO"
        old = self.range_at(addr)
        if old:
            return (old, "old")
        window = self.window(addr)
        for chunk in self.chunks:
            start = addr - addr % chunk
            end = start + chunk
            if start < max(vma[0], window, low) or end > min(vma[1], window + self.notifier, high):
                continue
            if chunk != PAGE:
                if self.overlapping(start, end):
                    continue
                if chunk <= threshold and not self.populated(vma, start, end, ctx.own):
                    continue
            r = Range(start, end, ctx.dm and vma[3] == "anon")
            self.insert(r)
            return (r, "new")
        return "EINVAL"

    def fault(self, r, write, own, before):
        """hmm_range_fault over the range: None or the errno, by the VMAs in address order."""
        at = r.start
        while at < r.end:
            vma = self.vma_at(at)
            if vma is None or vma[2][0] != "r" or vma[3] == "io":
                return "EFAULT"
            stop = min(vma[1], r.end)
            if write and vma[2][1] != "w":
                letters = before[(at - r.start) // PAGE:(stop - r.start) // PAGE]
                if not own or any(c not in DEVICE for c in letters):
                    return "EPERM"
                return "EPERM?"  # device pages: the entry may still be writable
            at = stop
        return None

    def map_pages(self, r, ctx):
        """The mapping loop of get_pages over pages that are all there now."""
        first = (r.start - self.arena) // PAGE
        n = (r.end - r.start) // PAGE
        zone, seen_device, sys_pages, dev_pages = 0, False, 0, 0
        for i in range(n):
            c = self.pages[first + i]
            if c in DEVICE:
                owner = self.owner[first + i]
                if not ctx.mixed and zone != owner and i > 0:
                    return "EOPNOTSUPP"
                zone, seen_device = owner, True
                dev_pages += 1
            else:
                if seen_device and not ctx.mixed:
                    return "EOPNOTSUPP"
                if ctx.only:
                    return "EFAULT"
                sys_pages += 1
        r.dma, r.devmem, r.sys, r.dev, r.ro = True, seen_device, sys_pages, dev_pages, ctx.ro
        return ERRNO_OK

    def scan(self, r, own):
        kinds = set()
        at = r.start
        while at < r.end:
            vma = self.vma_at(at)
            if vma is None or vma[2][0] != "r" or vma[3] == "io":
                return "unpopulated"
            stop = min(vma[1], r.end)
            for c in self.letters(at, stop):
                if c in PRESENT:
                    kinds.add("system")
                elif own and c in DEVICE:
                    kinds.add("equal")
                else:
                    return "unpopulated"
            at = stop
        return "mixed" if len(kinds) == 2 else kinds.pop()


class Contents:
    """The first 8 bytes of each page of the arena as touch and gpuw left them; None where that cannot be told."""

    MASK = (1 << 64) - 1

    def __init__(self, model):
        self.m = model
        self.value = [0] * (model.size // PAGE)

    def index(self, addr):
        return (addr - self.m.arena) // PAGE

    def span(self, at, size):
        return range(self.index(at), min(self.index(at + size), len(self.value)))

    def set(self, at, size, value):
        for i in self.span(at, size):
            self.value[i] = value

    def write(self, at, size, value, allowed):
        for k, i in enumerate(self.span(at, size)):
            vma = self.m.vma_at(at + k * PAGE)
            if vma and vma[3] == "anon" and allowed(vma[2]):
                self.value[i] = value + k

    def host(self, op):
        """What a host operation does to contents. Where it failed, it may have done a part."""
        name, ok = op.words[0], op.result[0] == ERRNO_OK
        if name not in ("mmap", "munmap", "mremap", "madvise", "touch"):
            return
        at, size = int(op.words[1], 16), int(op.words[2], 16)
        if name == "touch":
            if op.words[3] == "w":
                self.write(at, size, op.number << 20, lambda perms: perms[1] == "w")
        elif name == "mremap":
            self.mremap(op, at, size, ok)
        elif name == "madvise" and op.words[3] not in ("dontneed", "free", "remove"):
            return
        elif name == "madvise" and op.words[3] == "free":
            self.set(at, size, None)
        else:
            anon = name != "mmap" or op.words[4] == "anon"
            self.set(at, size, 0 if ok and anon else None)

    def mremap(self, op, at, size, ok):
        new, how, to = int(op.words[3], 16), op.words[4], int(op.words[5], 16)
        if how == "inplace":
            if new > size:
                self.set(at + size, new - size, 0 if ok else None)
            return
        if not ok:
            self.set(to, new, None)
            return
        # A move of several mappings leaves what is at the destination of the gaps between them.
        moved = [(self.value[i], self.m.vma_at(at + k * PAGE)) for k, i in enumerate(self.span(at, size))]
        for i, (_, vma) in zip(self.span(at, size), moved):
            if vma:
                self.value[i] = 0
        for i, (v, vma) in zip(self.span(to, new), moved):
            if vma:
                self.value[i] = v

    def values(self, at, size, host):
        """What a read of each page gives, or None if one is not known."""
        out = []
        for k, i in enumerate(self.span(at, size)):
            vma = self.m.vma_at(at + k * PAGE)
            if vma is None or vma[3] == "io" or (host and vma[2][:3] == "---"):
                if host:
                    continue
                return None
            if vma[3] != "anon" or self.value[i] is None:
                return None
            out.append(self.value[i])
        return out

    def checksum(self, values):
        total = 0xCBF29CE484222325
        for v in values:
            total = ((total ^ v) * 0x100000001B3) & self.MASK
        return total


class Op:
    def __init__(self, number, words):
        self.number, self.words = number, words
        self.result = None
        self.events, self.vmas, self.pages, self.ranges, self.gone = [], None, [], [], []
        self.notifiers, self.notifiers_gone, self.extra = [], [], []


def read(path):
    opener = lzma.open if path.endswith(".xz") else open
    with opener(path, "rt", encoding="ascii") as f:
        yield from f


def parse(path):
    """Header fields and operations of a trace."""
    header, ops, end, expect_vmas = {}, [], None, 0
    for lineno, line in enumerate(read(path), 1):
        w = line.split()
        try:
            if not w:
                raise Bad("empty line")
            if end is not None:
                raise Bad("line after end")
            if w[0] == "op":
                if int(w[1]) != len(ops):
                    raise Bad("operation number")
                if expect_vmas:
                    raise Bad("VMA lines missing")
                ops.append(Op(int(w[1]), w[2:]))
            elif w[0] == "end":
                end = int(w[1])
                if end != len(ops):
                    raise Bad("operation count")
            elif not ops:
                header[w[0]] = w[1:]
            else:
                expect_vmas = parse_line(ops[-1], w, expect_vmas)
        except (Bad, ValueError, IndexError) as e:
            raise Bad(f"{path}:{lineno}: {e}: {line.strip()}") from e
    if end is None:
        raise Bad(f"{path}: no end line")
    if header.get("usvm-kernel-trace") != ["1"]:
        raise Bad(f"{path}: not a trace of version 1")
    return header, ops


def parse_line(op, w, expect_vmas):
    if expect_vmas and w[0] != "v":
        raise Bad("VMA line expected")
    if w[0] == "=":
        if op.result is not None:
            raise Bad("second result")
        op.result = w[1:]
    elif w[0] == "e":
        kind, start, end, window, hits = w[1], int(w[2], 16), int(w[3], 16), int(w[4], 16), int(w[5])
        rest = w[6:]
        step = int(rest.pop()[1:], 16) if rest and rest[-1][0] == "/" else end - start
        bounds = (int(rest[0], 16), int(rest[1], 16)) if hits else None
        if step <= 0 or (end - start) % step:
            raise Bad("event")
        for at in range(start, end, step):
            op.events.append((kind, at, at + step, window, hits, bounds))
    elif w[0] == "vma":
        op.vmas = []
        return int(w[1])
    elif w[0] == "v":
        if not expect_vmas:
            raise Bad("VMA line too many")
        op.vmas.append((int(w[1], 16), int(w[2], 16), w[3], w[4]))
        return expect_vmas - 1
    elif w[0] == "p":
        if len(w[3]) != 1 or w[3] not in ".pHzZdD":
            raise Bad("page state")
        op.pages.append((int(w[1], 16), int(w[2], 16), ord(w[3])))
    elif w[0] == "r":
        op.ranges.append((int(w[1], 16), int(w[2], 16), w[3], int(w[4]), int(w[5]), w[7], w[8:] == ["gc"]))
    elif w[0] == "x":
        op.gone.append(int(w[1], 16))
    elif w[0] == "n":
        op.notifiers.append((int(w[1], 16), int(w[2], 16)))
    elif w[0] == "nx":
        op.notifiers_gone.append(int(w[1], 16))
    elif w[0] in ("g", "ecount", "left", "elost"):
        op.extra.append(w)
    else:
        raise Bad("unknown line")
    return 0


class Checker:
    def __init__(self, path):
        self.path = path
        header, self.ops = parse(path)
        arena, size = (int(x, 16) for x in header["arena"])
        self.m = Model(arena, size)
        self.contents = Contents(self.m)
        self.sums = 0
        self.seen = {}          # ranges as the trace has them
        self.windows = set()    # notifiers as the trace has them
        self.differences = []
        self.counts = {}

    def differ(self, op, what, want, got):
        self.differences.append(f"{self.path}: op {op.number} {' '.join(op.words)}: {what}: model {want}, kernel {got}")

    def run(self):
        for op in self.ops:
            name = op.words[0]
            self.counts[name] = self.counts.get(name, 0) + 1
            if op.result is None:
                raise Bad(f"{self.path}: op {op.number} has no result")
            self.step(op)
        return self

    def step(self, op):
        """Before: device operations decide. Then the inputs of the operation. Then what follows from both."""
        name = op.words[0]
        before = getattr(self, "before_" + name, None)
        state = before(op) if before else None
        if name not in ("race", "procend"):
            self.apply_events(op)
        self.contents.host(op)
        self.apply_host(op)
        after = getattr(self, "after_" + name, None)
        if after:
            after(op, state)
        self.apply_trace(op)
        if name == "race":
            self.resync()
        self.compare(op)

    # -- inputs ---------------------------------------------------------------------------------------------------------

    def apply_events(self, op):
        for kind, start, end, window, hits, bounds in op.events:
            hit = self.m.invalidate(kind, start, end, window)
            have = (hit[0].start, hit[-1].end) if hit else None
            if len(hit) != hits or have != bounds:
                self.differ(op, f"ranges hit by {kind} {start:x} {end:x}", (len(hit), have), (hits, bounds))

    def apply_host(self, op):
        m = self.m
        if op.vmas is not None:
            last = 0
            for start, end, perms, kind in op.vmas:
                if start < last or end <= start or (start | end) % PAGE:
                    raise Bad(f"{self.path}: op {op.number}: VMAs out of order")
                last = end
            m.vmas = op.vmas
        for start, end, letter in op.pages:
            a, b = (start - m.arena) // PAGE, (end - m.arena) // PAGE
            if not 0 <= a < b <= len(m.pages):
                raise Bad(f"{self.path}: op {op.number}: pages outside the arena")
            self.page_owners(op, a, b, letter)
            m.pages[a:b] = bytes([letter]) * (b - a)

    def page_owners(self, op, a, b, letter):
        """Which device allocation is behind a page: a new one after migrate, the old one after a split."""
        m = self.m
        for i in range(a, b):
            if letter not in DEVICE:
                m.owner[i] = 0
            elif not m.owner[i]:
                m.owner[i] = m.next_owner

    def apply_trace(self, op):
        for start in op.gone:
            if start not in self.seen:
                raise Bad(f"{self.path}: op {op.number}: unknown range {start:x} gone")
            del self.seen[start]
        for r in op.ranges:
            self.seen[r[0]] = r
        for start, end in op.notifiers:
            if end - start != self.m.notifier:
                raise Bad(f"{self.path}: op {op.number}: notifier of {end - start:x} bytes")
            self.windows.add(start)
        for start in op.notifiers_gone:
            self.windows.remove(start)

    def compare(self, op):
        mine = {s: r.text() for s, r in self.m.ranges.items()}
        if mine != self.seen:
            for s in sorted(set(mine) | set(self.seen)):
                if mine.get(s) != self.seen.get(s):
                    self.differ(op, f"range {s:x}", mine.get(s), self.seen.get(s))
            self.resync()
        if self.m.live and set(self.m.notifiers()) != self.windows:
            self.differ(op, "notifiers", self.m.notifiers(), sorted(self.windows))

    def resync(self):
        m = self.m
        m.starts, m.ranges = [], {}
        for start, end, flags, sys_pages, dev_pages, mode, queued in self.seen.values():
            r = Range(start, end, "M" in flags)
            r.unmapped, r.partial, r.devmem, r.dma = "U" in flags, "P" in flags, "D" in flags, "A" in flags
            r.sys, r.dev, r.ro, r.queued = sys_pages, dev_pages, mode == "ro", queued
            m.insert(r)

    def want(self, op, want):
        got = " ".join(op.result)
        if want != got:
            self.differ(op, "result", want, got)

    # -- operations -----------------------------------------------------------------------------------------------------

    def before_create(self, op):
        m = self.m
        if m.live:
            self.want(op, "EBUSY")
            return
        m.mm_start, m.mm_range, m.notifier = (int(x, 16) for x in op.words[1:4])
        m.chunks = [int(x, 16) for x in op.words[4].split(",")]
        m.vram = int(op.words[5], 16) or 65536
        m.live = True
        self.want(op, ERRNO_OK)

    def before_destroy(self, op):
        self.m.starts, self.m.ranges, self.m.live = [], {}, False

    def before_find(self, op):
        m = self.m
        low, high = (int(x, 16) for x in op.words[4][4:].split(":"))
        got = m.find(int(op.words[1], 16), Ctx(op.words[2]), int(op.words[3][4:], 16), low, high)
        self.want(op, got if isinstance(got, str) else f"0 {got[0].start:x} {got[0].end:x} {got[1]}")

    def on_range(self, op):
        if not self.m.live:
            self.want(op, "EBADFD")
            return None
        r = self.m.range_at(int(op.words[1], 16))
        if r is None:
            self.want(op, "ESRCH")
        return r

    def before_pages(self, op):
        r = self.on_range(op)
        if r is None:
            return None
        return (r, r.dma, bytes(self.m.letters(r.start, r.end)))

    def after_pages(self, op, state):
        if state is None:
            return
        r, valid, before = state
        ctx = Ctx(op.words[2])
        if valid and not op.events:
            self.want(op, ERRNO_OK)
            return
        error = self.m.fault(r, not ctx.ro, ctx.own, before)
        if error == "EPERM?":
            error = "EPERM" if op.result[0] == "EPERM" else None
        if error is None and r.unmapped:
            error = "EFAULT"
        self.want(op, error or self.m.map_pages(r, ctx))

    def before_unmap(self, op):
        r = self.on_range(op)
        if r:
            r.drop_mapping()
            self.want(op, ERRNO_OK)

    def before_remove(self, op):
        r = self.on_range(op)
        if r:
            self.m.delete(r)
            self.want(op, ERRNO_OK)

    def after_gc(self, op, _state):
        queued = [r for r in self.m.ranges.values() if r.queued]
        for r in queued:
            self.m.delete(r)
        self.want(op, f"0 {len(queued)}" if self.m.live else "EBADFD 0")

    def before_evict(self, op):
        r = self.on_range(op)
        return (r, bytes(self.m.letters(r.start, r.end))) if r else None

    def after_evict(self, op, state):
        if state:
            self.want(op, self.m.fault(state[0], False, False, state[1]) or ERRNO_OK)

    def before_scan(self, op):
        r = self.on_range(op)
        if r:
            self.want(op, f"0 {self.m.scan(r, Ctx(op.words[2]).own)}")

    def before_migrate(self, op):
        r = self.on_range(op)
        self.m.next_owner += 1
        if r is None:
            return None
        return (r, bytes(self.m.letters(r.start, r.end)))

    def after_migrate(self, op, state):
        """All or nothing; where pages are busy or partly there already (EBUSY) is the host's to say."""
        if state is None or op.result[0] == "ENOSPC":
            return
        r, before = state
        vma, after = self.m.vma_at(r.start), self.m.letters(r.start, r.end)
        arrived = all(c in DEVICE for c in after)
        if vma is None:
            self.want(op, "ENOENT")
        elif r.end > vma[1]:
            self.want(op, "EINVAL")
        elif vma[3] != "anon":
            self.want(op, "EBUSY")
        elif op.result[0] == ERRNO_OK:
            if not arrived:
                self.differ(op, "pages after migrate", "all on the device", after.decode())
        elif op.result[0] != "EBUSY":
            self.want(op, "0 or EBUSY")
        elif arrived:
            # The kernel counts a hole of 2 MiB, or the huge zero page, as one page, and believes it failed.
            if set(before) - set(b".Z") or r.end - r.start < 2 << 20:
                self.differ(op, "result", "0", "EBUSY")
        elif [c in DEVICE for c in before] != [c in DEVICE for c in after]:
            self.differ(op, "pages after EBUSY", before.decode(), after.decode())

    def gpu(self, op, write):
        r = self.on_range(op)
        if r is None:
            return None
        at, size = int(op.words[1], 16), int(op.words[2], 16)
        if at + size > r.end:
            return "EINVAL"
        if not r.dma:
            return "EAGAIN"
        return "EPERM" if write and r.ro else None

    def before_gpuw(self, op):
        error = self.gpu(op, True)
        if self.m.live and self.m.range_at(int(op.words[1], 16)):
            self.want(op, error or ERRNO_OK)
        if op.result[0] == ERRNO_OK:
            self.contents.write(int(op.words[1], 16), int(op.words[2], 16), op.number << 20, lambda perms: True)

    def before_gpur(self, op):
        error = self.gpu(op, False)
        if error:
            self.want(op, error)
        values = self.contents.values(int(op.words[1], 16), int(op.words[2], 16), False)
        if op.result[0] == ERRNO_OK and values is not None:
            self.sums += 1
            self.want(op, f"0 sum={sum(values) & Contents.MASK:x}")

    def after_sum(self, op, _state):
        values = self.contents.values(int(op.words[1], 16), int(op.words[2], 16), True)
        if values is not None:
            self.sums += 1
            want = f"sum={self.contents.checksum(values):x}"
            if want != op.result[-1]:
                self.differ(op, "contents", want, op.result[-1])

    def after_mremap(self, op, _state):
        # Device pages that moved belong to the allocation they came with; which is not in the trace line by line.
        old, length, to = int(op.words[1], 16), int(op.words[2], 16), int(op.words[5], 16)
        if op.result[0] == ERRNO_OK and op.words[4] != "inplace":
            m = self.m
            for i in range(length // PAGE):
                b = (to - m.arena) // PAGE + i
                if m.pages[b] in DEVICE and self.moved[i]:
                    m.owner[b] = self.moved[i]

    def before_mremap(self, op):
        a, n = (int(op.words[1], 16) - self.m.arena) // PAGE, int(op.words[2], 16) // PAGE
        self.moved = self.m.owner[a:a + n]

    def after_race(self, op, _state):
        if op.result[0] != ERRNO_OK:
            self.differ(op, "result", ERRNO_OK, " ".join(op.result))

    def after_sumsame(self, op, _state):
        self.after_sum(op, None)
        if op.result[0] != ERRNO_OK:
            self.differ(op, "contents", "unchanged", " ".join(op.result))


def main(paths):
    ops = differences = sums = 0
    for path in paths:
        c = Checker(path).run()
        ops += len(c.ops)
        differences += len(c.differences)
        sums += c.sums
        for d in c.differences[:10]:
            print(d)
        if len(c.differences) > 10:
            print(f"{path}: {len(c.differences) - 10} more")
    print(f"{sums} checksums of contents computed")
    print(f"{ops} operations, {len(paths)} traces, {differences} unexplained differences")
    return 1 if differences or not ops else 0


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        sys.exit(main(sys.argv[1:]))
    except Bad as e:
        sys.exit(f"check.py: {e}")
