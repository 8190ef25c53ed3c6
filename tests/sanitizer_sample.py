"""Runs the samples of every op, all kernels among them, for compute-sanitizer: `make sanitize`."""

import argparse

import ops

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--implementation", default="cuda")
    parser.add_argument("--garbage", action="store_true", help="schedules of garbage, alone")
    options = parser.parse_args()
    for row in ops.ROWS:
        for sample in row.samples:
            sample(implementation=options.implementation, garbage=options.garbage)
    print("all kernels ran")
