"""Expected results of the ops, computed slowly in numpy. Those of decode are in `cases`."""

import itertools

import numpy as np

TILE, OVERHEAD = 64, 2  # tokens of a tile; what a sequence costs besides its tiles, in tiles


def expected_append(k_cache, new_kv, slots):
    pages, page = k_cache.shape[:2]
    k_cache = k_cache.copy()
    for token, slot in zip(new_kv, slots, strict=True):
        if 0 <= slot < pages * page:
            k_cache[slot // page, slot % page] = token
    return k_cache


def expected_merge(outs, lses):
    """In float64, one query and head at a time."""
    n, b, s_q, h_q, d_v = outs.shape
    out, lse = np.zeros((b, s_q, h_q, d_v)), np.full((b, h_q, s_q), np.inf)
    for i, s, h in np.ndindex(b, s_q, h_q):
        parts = [k for k in range(n) if not np.isinf(lses[k, i, h, s])]
        if not parts:
            continue
        part_lses = lses[parts, i, h, s].astype(np.float64)
        largest = part_lses.max()
        weights = np.exp(part_lses - largest)
        out[i, s, h] = weights @ outs[parts, i, s, h].astype(np.float64) / weights.sum()
        lse[i, h, s] = largest + np.log(weights.sum())
    return out, lse


def slow_schedule(lengths, num_parts, rows):
    """The schedule in Python integers, one sequence and one part after the other."""
    b = len(lengths)
    tiles = [min(-(-max(n, 0) // TILE), 2**30 // b - OVERHEAD) for n in lengths]
    starts = np.concatenate([[0], np.cumsum([t + OVERHEAD for t in tiles])]).tolist()
    smallest = next(t for t in range(1, 9) if t == 8 or 4096 * t * t >= starts[-1] * (rows + 16))
    payload = max(-(-starts[-1] // num_parts), smallest)
    group, parts = -(-b // num_parts), max(1, num_parts // b)
    edges = [min(p * group, b) for p in range(num_parts + 1)]
    largest = max(starts[y] - starts[x] for x, y in itertools.pairwise(edges))
    if parts > 1:
        largest = max(-(-t // parts) for t in tiles)
    if largest <= payload + payload // 16:
        if parts == 1:
            return [(i, 0) for i in edges], [i // group for i in range(b)], list(range(b + 1))
        return aligned_schedule(tiles, parts, num_parts, smallest)
    bounds = []
    for p in range(num_parts + 1):
        cut = p * payload
        if p == num_parts or cut >= starts[-1]:
            bounds.append((b, 0))
            continue
        i = next(i for i in range(b) if starts[i] <= cut < starts[i + 1])
        bounds.append((i, max(0, cut - starts[i] - OVERHEAD)))
    first_part, num_splits = [], [0]
    for i in range(b):
        first = min(starts[i] + OVERHEAD, starts[i + 1] - 1) // payload
        last = (starts[i + 1] - 1) // payload
        first_part.append(first)
        num_splits.append(num_splits[-1] + last - first + 1)
    return bounds, first_part, num_splits


def aligned_schedule(tiles, parts, num_parts, smallest):
    """Every sequence has `parts` parts of equally many tiles; a short one leaves some empty.

    If there are two parts, the first one has one more tile.
    """
    bounds, num_splits = [], [0]
    for i, count in enumerate(tiles):
        step = max(smallest, -(-count // parts)) + (1 if parts == 2 else 0)
        begins = list(range(0, max(count, 1), step))
        bounds += [(i, tile) for tile in begins] + [(i + 1, 0)] * (parts - len(begins))
        num_splits.append(num_splits[-1] + len(begins))
    bounds += [(len(tiles), 0)] * (num_parts + 1 - len(bounds))
    return bounds, [i * parts for i in range(len(tiles))], num_splits


def slow_fixed_schedule(lengths, size, max_seqlen):
    """The schedule of splits of a fixed size in Python integers, in tokens."""
    parts, bounds, num_splits = -(-max_seqlen // size), [], [0]
    for i, length in enumerate(lengths):
        begins = range(0, max(length, 1), size)[:parts]
        bounds += [(i, token // TILE) for token in begins] + [(i + 1, 0)] * (parts - len(begins))
        num_splits.append(num_splits[-1] + len(begins))
    return [*bounds, (len(lengths), 0)], [i * parts for i in range(len(lengths))], num_splits
