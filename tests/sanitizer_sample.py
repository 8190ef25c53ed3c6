"""Runs small calls of every op, all kernels among them, for compute-sanitizer: `make sanitize`."""

import argparse

import ops


def run_row(row, implementation, garbage, samples):
    """Runs the row's small example, checked, and samples; with garbage the samples alone."""
    if not garbage:
        row.check(row.run(*row.arrays(), implementation=implementation), row.example())
    for sample in samples:
        sample(implementation=implementation, garbage=garbage)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default="cuda")
    parser.add_argument("--garbage", action="store_true", help="schedules of garbage, alone")
    options = parser.parse_args()
    for row in ops.ROWS:
        if row.targets:
            run_row(row, options.implementation, options.garbage, row.samples)
    print("all kernels ran")
