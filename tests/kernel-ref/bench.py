#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's and usvm's times of one boot, side by side.

    bench.py FOLDER [OUT.json]

FOLDER has kernel-N.json and usvm-N.json of turn N. Prints a table (Markdown): what each round took by the kernel's own memcpy
of 2 MiB in that round, the median of a turn, the median of all turns; the best sample in brackets. OUT.json gets everything.
The figures are of an emulated CPU: only ratios mean anything.
"""
import glob
import json
import sys

# Rows in which memory moves: here usvm has to be ahead.
MOVING = ("to_device", "cpu_fault_return", "clean_return", "ping_pong", "evict", "devevict")
WORDS = {
    "find_new": "find a range: a new one",
    "find_existing": "find a range: one that exists",
    "get_pages_untouched": "device access without migration: untouched memory",
    "get_pages_touched": "device access without migration: touched memory",
    "get_pages_valid": "device access without migration: still mapped",
    "to_device_2m": "migrate to the device and map",
    "cpu_fault_return_2m": "CPU fault until it is back",
    "clean_return_2m": "the same, the device only read it",
    "ping_pong_64": "ping-pong of 64 ranges, each",
    "evict_64": "eviction of 64 ranges, each",
    "devevict_64": "eviction of 64 ranges by age, each",
}


def read(folder, who):
    """The documents of all turns, and for each name the row whose ratio is their median's."""
    documents = []
    for path in sorted(glob.glob(f"{folder}/{who}-*.json")):
        with open(path, encoding="utf-8") as f:
            documents.append(json.load(f))
    names = [r["name"] for r in documents[0]["results"]]
    rows = {}
    for name in names:
        turns = [next(r for r in d["results"] if r["name"] == name) for d in documents]
        turns.sort(key=lambda r: r["ratio"])
        rows[name] = dict(turns[(len(turns) - 1) // 2], ratio_best=min(r["ratio_best"] for r in turns))
    return documents, rows


def cell(row):
    return f"{row['ratio']:.3g} ({row['ratio_best']:.3g})"


def main():
    (kernels, k), (usvms, u) = (read(sys.argv[1], who) for who in ("kernel", "usvm"))
    kernel, usvm = kernels[0], usvms[0]
    base = [r["memcpy_2m"] for r in (k, u)]
    print(f"Kernel {kernel['kernel']}, usvm {usvm['usvm']} with {usvm['options']}; {len(kernels)} turns of each; the kernel's memcpy "
          f"of 2 MiB took {base[0]['median']:.0f} µs beside the kernel's rows and {base[1]['median']:.0f} µs beside usvm's "
          f"(medians of one turn, n = {base[0]['n']} and {base[1]['n']}).\n")
    print("| 2 MiB | pages | drm_gpusvm | usvm | usvm / drm_gpusvm |")
    print("|---|---|---|---|---|")
    behind = []
    for pages in ("4k", "huge"):
        for name, words in WORDS.items():
            a, b = (r[f"{name}_{pages}"] for r in (k, u))
            times = b["ratio"] / a["ratio"]
            print(f"| {words} | {pages} | {cell(a)} | {cell(b)} | {times:.2f} |")
            if name.startswith(MOVING) and times >= 1:
                behind.append(f"{name}_{pages} {times:.2f}")
    own = ", ".join(f"{n.removeprefix('copy_')} {r['ratio']:.2f}" for n, r in u.items() if n.startswith(("copy_", "memcpy_user")))
    print(f"\nWays to copy 2 MiB, as multiples of that memcpy: {own}.")
    print("usvm is behind where memory moves: " + ", ".join(behind) if behind else "usvm is ahead in every row where memory moves.")
    if len(sys.argv) > 2:
        with open(sys.argv[2], "w", encoding="utf-8") as f:
            json.dump({"kernel": kernels, "usvm": usvms, "behind": behind}, f, indent=1)


main()
