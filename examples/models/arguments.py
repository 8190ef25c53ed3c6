"""The arguments of generate.py. None of them is taken and then ignored."""

import argparse
import math
import sys
from pathlib import Path

from .config import PRESETS


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, without the list of all options."""

    def error(self, message):
        self.exit(2, f"error: {message} (--help lists the options)\n")


def parse_args(argv, description=None):
    parser = Parser(
        prog="python -m examples.models.generate",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", type=Path)
    model.add_argument("--random-weights", metavar="NAME", help=", ".join(PRESETS))
    add("--layers", type=count, help="number of layers with random weights (default all)")

    def add_prompts(option, metavar, read, says):
        add(option, dest="prompts", metavar=metavar, type=read, action="extend", help=says)

    add_prompts("--prompt", "TEXT", lambda text: [text], "this and the next three may be repeated")
    add_prompts("--prompt-file", "FILE", whole_file, "the file is one prompt; - is standard input")
    add_prompts("--prompt-lines", "FILE", lines, "each line of the file is a prompt")
    add_prompts(
        "--prompt-ids", "IDS", token_ids, "tokens, as in 1,20,3; then tokens are printed too"
    )
    add("--chat", action="store_true", help="put prompts into the tokenizer's chat template")
    add("--prompt-tokens", type=count, help="length of random prompts (default 64)")
    add("--batch", type=count, help="number of sequences; repeats the prompts (default one each)")
    add("--slots", type=count, help="sequences at a time, with continuous batching (default all)")
    add("--max-tokens", type=count, default=128, help="length of each answer (default 128)")
    add("--temperature", type=temperature, default=0.0, help="0 (default): the most likely token")
    add("--top-p", type=share, help="draw from the most likely tokens with this sum (default 1)")
    add("--seed", type=seed, help="of random weights, random prompts and drawn tokens (default 0)")
    add("--parallel", choices=("dp", "tp"), help="split sequences or heads over all devices")
    add("--chunk", type=count, default=128, help="tokens of a prompt read at a time (default 128)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    add("--implementation", choices=("auto", "cuda", "xla"), default="auto")
    add("--debug", action="store_true", help="show where an error comes from")
    args = parser.parse_args(argv)
    args.prompts = args.prompts or []
    if mistake := next(mistakes(args), None):
        parser.error(mistake)
    args.prompt_tokens = args.prompt_tokens or 64
    args.top_p = 1.0 if args.top_p is None else args.top_p
    args.seed = args.seed or 0
    return args


def mistakes(args):
    """Says which options do not go together, or would have no effect."""
    text = [prompt for prompt in args.prompts if isinstance(prompt, str)]
    if args.model:
        if not args.prompts:
            yield "--model needs a --prompt, --prompt-file, --prompt-lines or --prompt-ids"
        if args.layers:
            yield "--layers is for --random-weights: a checkpoint has all of its layers"
        if args.seed is not None and args.temperature == 0:
            yield "--seed has no effect on a checkpoint at --temperature 0"
    elif text:
        yield "--random-weights has no tokenizer for text: give --prompt-ids"
    if text and len(text) < len(args.prompts):
        yield "--prompt-ids cannot be mixed with text: tokens are answered by tokens"
    if args.chat and not text:
        yield "--chat needs prompts that are text"
    if args.prompt_tokens and (args.prompts or args.model):
        yield "--prompt-tokens is for the random prompts of --random-weights"
    if args.batch and args.batch < len(args.prompts):
        yield f"--batch {args.batch} is less than the {len(args.prompts)} prompts"
    if args.slots and args.parallel == "dp":
        yield "--slots needs one pool of pages; --parallel dp has one on each device"
    if args.top_p is not None and args.temperature == 0:
        yield "--top-p needs a --temperature above 0"


# -------------------- Types of arguments


def count(text):
    return _integer(text, 1, 2**31 - 1)  # as positions; more would only fill the host's memory


def seed(text):
    return _integer(text, 0, 2**32 - 1)


def _integer(text, smallest, largest=None):
    number = int(text)
    if number < smallest:
        raise argparse.ArgumentTypeError(f"must be at least {smallest}, got {number}")
    if largest is not None and number > largest:
        raise argparse.ArgumentTypeError(f"must be at most {largest}, got {number}")
    return number


def temperature(text):
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return number


def share(text):
    if not 0 <= (number := float(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return number


def token_ids(text):
    """A list of one prompt."""
    ids = tuple(_integer(word, 0) for word in text.replace(",", " ").split())
    if not ids:
        raise argparse.ArgumentTypeError("needs at least one token")
    return [ids]


def whole_file(path):
    """A list of one prompt, without the line end that editors put after the last line."""
    return [_read(path).removesuffix("\n")]


def lines(path):
    """A list of prompts."""
    return [line for line in _read(path).split("\n") if line.strip()]


def _read(path):
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        text = data.decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error}") from error
    if not text.strip():
        raise argparse.ArgumentTypeError(f"there is no text in {path}")
    return text
