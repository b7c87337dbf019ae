#!/usr/bin/env python3
# SPDX-License-Identifier: MIT OR Apache-2.0
"""The kernel's and usvm's times of one boot, side by side.

    bench.py KERNEL.json USVM.json [OUT.json]

Prints a table (Markdown): medians as multiples of the kernel's own memcpy of 2 MiB, which both programs measured in every
round; the best sample in brackets. OUT.json gets both. The figures are of an emulated CPU: only ratios mean anything.
"""
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


def rows(path):
    with open(path, encoding="utf-8") as f:
        document = json.load(f)
    return document, {r["name"]: r for r in document["results"]}


def cell(row):
    return f"{row['ratio']:.3g} ({row['ratio_best']:.3g})"


def main():
    kernel, k = rows(sys.argv[1])
    usvm, u = rows(sys.argv[2])
    base = [r["memcpy_2m"] for r in (k, u)]
    print(f"Kernel {kernel['kernel']}, usvm {usvm['usvm']} with {usvm['options']}; the kernel's memcpy of 2 MiB took "
          f"{base[0]['median']:.0f} µs beside the kernel's rows and {base[1]['median']:.0f} µs beside usvm's (medians, "
          f"n = {base[0]['n']} and {base[1]['n']}).\n")
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
    if len(sys.argv) > 3:
        with open(sys.argv[3], "w", encoding="utf-8") as f:
            json.dump({"kernel": kernel, "usvm": usvm, "behind": behind}, f, indent=1)


main()
