"""What paired runs say: medians, the pairs' ratios, and how sure their median is.

    pairs.py NAME PLAIN WITH FILE [--json FILE]     one line of the table for the program NAME
    pairs.py --head PLAIN WITH                      the lines above
    pairs.py --sum FILE...                          the geometric mean of what --json wrote

FILE has a line for each run: round, mode, wall seconds, processor seconds. The interval of a median is the one of the sign
test: of the n ratios in order, the k-th from either end, with k the largest for which a fair coin stays between with 95 %.
It assumes nothing about how times are distributed. "known" is its true probability: below 6 pairs it cannot be 95 %.
"""

import json, math, sys


def median(values):
    values = sorted(values)
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2


def part(values, p):
    values = sorted(values)
    at = p * (len(values) - 1)
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def interval(values, wanted=0.95):
    """(low, high, the probability that the true median lies between)"""
    values, n = sorted(values), len(values)
    best = None
    for k in range(n // 2 + 1):
        outside = 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n
        if best is None or 1 - outside >= wanted:
            best = (values[k], values[n - 1 - k], 1 - outside)
    return best


def read(file, plain, other):
    rounds = {}
    for line in open(file):
        number, mode, wall, cpu = line.split()
        rounds.setdefault(number, {})[mode] = (float(wall), float(cpu))
    # A pair of which one run failed is none.
    return [(r[plain], r[other]) for r in rounds.values() if plain in r and other in r]


def row(name, plain, other, file):
    pairs = read(file, plain, other)
    if not pairs:
        return None
    result = {"name": name, "plain": plain, "with": other, "n": len(pairs), "plain_s": median([a[0] for a, _ in pairs])}
    for index, what in enumerate(("wall", "cpu")):
        ratios = [b[index] / a[index] for a, b in pairs if a[index] > 0]
        low, high, known = interval(ratios)
        result[what] = {"ratio": median(ratios), "p10": part(ratios, 0.1), "p90": part(ratios, 0.9), "low": low, "high": high}
        result["known"] = known
    return result


def show(r):
    def of(x):
        return f"{x['ratio']:7.3f} {x['low']:7.3f} -{x['high']:6.3f} {x['p10']:7.3f} {x['p90']:6.3f}"

    return f"{r['name']:<24}{r['n']:>4} {r['plain_s']:>8.3f}s |{of(r['wall'])} |{of(r['cpu'])}"


def main(args):
    if args[0] == "--head":
        print(f"{args[2]} against {args[1]}: medians of the pairs' ratios, their 95 % interval, and p10 and p90 of the ratios")
        columns = f"{'ratio':>7} {'95 %':>15} {'p10':>7} {'p90':>6}"
        print(f"{'program':<24}{'n':>4} {args[1]:>9} |{columns} |{columns}")
        print(f"{'':<24}{'':>4} {'':>9} |{'wall time':^38} |{'user + sys':^38}")
    elif args[0] == "--sum":
        rows = [json.load(open(file)) for file in args[1:]]
        for what in ("wall", "cpu"):
            logs = [math.log(r[what]["ratio"]) for r in rows]
            print(f"{what}: geometric mean of {len(rows)} programs {math.exp(sum(logs) / len(logs)):.3f}")
    else:
        name, plain, other, file = args[:4]
        r = row(name, plain, other, file)
        if r is None:
            print(f"{name:<24}   no pair of runs ended well")
            return 1
        print(show(r), flush=True)
        if args[4:5] == ["--json"]:
            json.dump(r, open(args[5], "w"))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
