"""Numbers that the CUDA code has too, under names of its own; a test compares both."""

TILE_TOKENS = 64
"""Tokens of a key tile. The schedule counts in tiles, whatever the page size."""

ROW_TILE = 64
"""Query rows of one KV head that a thread block handles together."""

SEQUENCE_OVERHEAD = 2
"""What a sequence costs besides its own tiles, in tiles: its prologue and epilogue."""

JOIN_COST = 4096
JOIN_ROWS = 16
"""These two set the minimum size of a part. Smaller parts end sooner, but leave more partial
results to put together: W units of work in parts of t tiles make W / t partial results, and each
costs time in proportion to its query rows plus JOIN_ROWS. Measured: the best t solves
JOIN_COST * t**2 = W * (rows + JOIN_ROWS)."""

MAX_JOIN_WORK, MAX_JOIN_ROWS = 2**17, 2**13
"""W and rows + JOIN_ROWS are clipped to these, so that int32 holds their product."""

MAX_MIN_PART = 8
"""The minimum size of a part never exceeds this, in tiles. Then the number of parts decides."""

ALIGNED_TOLERANCE = 16
"""Parts are aligned to the sequences if the largest is at most a 16th above an equal share."""

JOINED_SPLITS = 2
"""Sequences with at most this many splits are joined inside the decode kernel: the thread block of
the first split adds the second one's result. Others go to the combine kernel."""

TOTAL_COST_LIMIT = 2**30
"""The sum of all costs stays below this, so that int32 holds every sum."""

MAX_BATCH = 2**24
"""The most sequences of a schedule that a kernel makes."""

MAX_LIST = (2**31 - 1) // 4
"""The most entries of a token list in the kernel, so that int32 holds sums of two lengths."""

SPLITS_PER_PART = 2
"""Partial results of a part: only its first and last sequence may be shared with other parts."""

SCALES_PER_ROW = 4
"""A row of a partial result is stored in fp16, with a scale for each quarter of it."""

FLAGS_PER_ROW_TILE = 16
"""64-bit flags of a row tile in scratch memory: one for each warp that writes, rounded up to a
cache line."""
