"""Times dense MLA decode, ours and FlashMLA's, and writes benchmarks/results/<card>.json.

    python benchmarks/decode.py                 all cases, some minutes
    python benchmarks/decode.py --quick         a dozen cases, under a minute
    python benchmarks/decode.py --profile       kernel by kernel, and whether calls overlap
    python benchmarks/decode.py --all           all cases, and what the next four options time
    python benchmarks/decode.py --layers        a jitted step of 61 layers
    python benchmarks/decode.py --variants      fp16, other page sizes
    python benchmarks/decode.py --fixed         splits of a fixed size
    python benchmarks/decode.py --growth        batch 1 to 4096, length 64 to 1M
    python benchmarks/decode.py --smoke         tiny shapes on the CPU: does the script run

README.md beside this file says how FlashMLA is found and what the rules of timing are.
"""

import argparse
import os
import pathlib
import sys


def parse_arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="results file (of a full run: "
                        "benchmarks/results/<card>.json)")  # fmt: skip
    parser.add_argument("--append", action="store_true", help="keep the file's other rows")
    parser.add_argument("--cases", default="", help="only cases whose name holds one of these, "
                        "comma-separated: h16-s1, 128x4096, 128x4096v")  # fmt: skip
    parser.add_argument("--dtype", choices=["bf16", "fp16"], default="bf16")
    parser.add_argument("--page-block-size", type=int, default=64)
    parser.add_argument("--quick", action="store_true", help="few cases, few repeats")
    parser.add_argument("--profile", action="store_true", help="profile one round of each case")
    parser.add_argument("--all", action="store_true", help="the cases and all of the sections")
    parser.add_argument("--layers", action="store_true", help="a step of 61 layers, alone")
    parser.add_argument("--variants", action="store_true", help="fp16 and page sizes, alone")
    parser.add_argument("--fixed", action="store_true", help="splits of a fixed size, alone")
    parser.add_argument("--growth", action="store_true", help="series of batch and length, alone")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, no GPU, no peer")
    parser.add_argument("--flashmla", help="path of _flashmla_C.abi3.so (or $FLASHMLA_SO)")
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--implementation", default=None, choices=["cuda", "xla"])
    parser.add_argument("--repeats", type=int, help="repeats of a timing (7; quick: 3)")
    parser.add_argument("--seconds", type=float, help="length of a repeat (0.005)")
    parser.add_argument(
        "--rest", type=float, default=0.05, help="pause before a repeat, in seconds"
    )
    parser.add_argument("--sustain", type=float, default=0.15, help="lasting load for the "
                        "compute-bound cases, in seconds; 0: none")  # fmt: skip
    parser.add_argument("--budget", type=float, default=540, help="stop after so many seconds")
    parser.add_argument("--commit", help="commit to record, where there is no .git")
    options = parser.parse_args(argv)
    if options.smoke:
        options.implementation = options.implementation or "xla"
        options.no_peer, options.sustain, options.rest = True, 0.01, 0.0
        os.environ["JAX_PLATFORMS"] = "cpu"
    alone = (options.layers, options.variants, options.fixed, options.growth)
    options.table = options.all or not any(alone)
    options.layers |= options.all
    options.variants |= options.all
    options.fixed |= options.all
    options.growth |= options.all
    brief = options.quick or options.smoke
    options.implementation = options.implementation or "cuda"
    options.repeats = options.repeats or (3 if brief else 7)
    options.seconds = options.seconds or 0.005
    options.full = not (brief or options.profile or options.cases)
    return options


def prepare_environment(options):
    """Settings that must stand before JAX starts: torch needs a share of the memory."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    if options.profile and not options.smoke:
        flag = "--xla_enable_command_buffers_during_profiling=true"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def main(argv=None):
    options = parse_arguments(argv)
    prepare_environment(options)
    import runner  # imports JAX, which reads the environment

    return runner.main(options)


if __name__ == "__main__":
    sys.exit(main())
