"""Generates text with a model of the DeepSeek family.

    python -m examples.models.generate --model FOLDER --prompt "Why is the sky blue?"
    python -m examples.models.generate --random-weights deepseek-v2-lite --batch 32
    python -m examples.models.generate --model FOLDER --prompt "..." --prompt "..." --slots 1

FOLDER is from Hugging Face and has config.json, tokenizer.json and *.safetensors. A prompt is used
as it is: if the model expects a chat template, write it into the prompt. With random weights there
is no tokenizer, so prompts are random tokens, and tokens are printed. The first answer is printed
while it is generated, the others at the end. All sequences run at the same time, in a loop on the
device. With --slots N, only N of them run at a time, in continuous batches.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from .config import PRESETS, ModelConfig
from .decoding import Decoder
from .parallel import Layout
from .weights import load_weights, random_weights

BURST = 8  # steps in one call; then the new tokens are printed


def count(text):
    """The type of arguments that must be at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def parse_args(argv):
    parser = argparse.ArgumentParser(
        prog="python -m examples.models.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", type=Path)
    model.add_argument("--random-weights", metavar="NAME", help=", ".join(PRESETS))
    add("--layers", type=count, help="number of layers with random weights (default all)")
    add("--prompt", action="append", help="may be given several times")
    add("--prompt-tokens", type=count, default=64, help="length of random prompts (default 64)")
    add("--batch", type=count, help="number of sequences; repeats the prompts (default one each)")
    add("--slots", type=count, help="sequences at a time, with continuous batching (default all)")
    add("--max-tokens", type=count, default=128, help="length of each answer (default 128)")
    add("--temperature", type=float, default=0.0, help="0 (default): the most likely token")
    add("--top-p", type=float, default=1.0)
    add("--seed", type=int, default=0)
    add("--parallel", choices=("dp", "tp"), help="split sequences or heads over all devices")
    add("--chunk", type=count, default=128, help="tokens of a prompt read at a time (default 128)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16, on a CPU float32")
    add("--implementation", choices=("auto", "cuda", "xla"), default="auto")
    args = parser.parse_args(argv)
    if args.model and not args.prompt:
        parser.error("--model needs a --prompt")
    if args.random_weights and args.prompt:
        parser.error("--random-weights has no tokenizer for --prompt")
    if args.batch and args.batch < len(args.prompt or []):
        parser.error(f"--batch {args.batch} is less than the {len(args.prompt)} prompts")
    if args.slots and args.parallel == "dp":
        parser.error("--slots needs one pool of pages; --parallel dp has one on each device")
    # XLA's CPU backend lacks some of the bfloat16 matmuls.
    args.dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    return args


class Text:
    """A folder's tokenizer."""

    def __init__(self, folder, config):
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        if not path.exists():
            raise SystemExit(f"there is no {path}; the tokenizers library reads only this file")
        self._tokenizer, self._bos = Tokenizer.from_file(str(path)), config.bos

    def encode(self, text):
        tokens = self._tokenizer.encode(text).ids
        begun = self._bos is None or tokens[:1] == [self._bos]
        return tokens if begun else [self._bos, *tokens]

    def decode(self, tokens):
        return self._tokenizer.decode(tokens)


class Numbers:
    """Prints tokens as numbers, where there is no tokenizer."""

    def decode(self, tokens):
        return "".join(f"{token} " for token in tokens)


def load(args):
    """(decoder, tokenizer, prompts) for the arguments of the command."""
    layout = Layout.over(args.parallel)
    dtype = jnp.dtype(args.dtype)
    if args.model:
        config = ModelConfig.from_hf(args.model)
        text = Text(args.model, config)
        prompts = [text.encode(prompt) for prompt in args.prompt]
    else:
        config = ModelConfig.named(args.random_weights, layers=args.layers)
        text = Numbers()
        rng = np.random.default_rng(args.seed)
        prompts = rng.integers(0, config.vocab, (args.batch or 1, args.prompt_tokens)).tolist()
    batch = args.batch or len(prompts)
    prompts = [prompts[i % len(prompts)] for i in range(batch)]
    layout.check(config, batch)  # before the weights, which may take a while
    if args.model:
        params = load_weights(args.model, config, dtype, layout.place)
    else:
        params = random_weights(config, jax.random.key(args.seed), dtype, layout.place)
    decoder = Decoder(
        params,
        config,
        layout=layout,
        temperature=args.temperature,
        top_p=args.top_p,
        chunk=args.chunk,
        implementation=args.implementation,
    )
    return decoder, text, prompts


def generate(decoder, prompts, max_tokens, *, seed=0, show=lambda answer: True):
    """Returns the answers as lists of tokens, and (seconds to read, seconds to answer).

    After each burst, `show` gets the first answer so far. If it returns False, generation ends.
    """
    longest = [len(prompt) + max_tokens + BURST for prompt in prompts]
    state = decoder.start(len(prompts), longest, seed=seed)
    began = time.perf_counter()
    state = jax.block_until_ready(decoder.prefill(state, prompts))
    read = time.perf_counter()
    answers = [[] for _ in prompts]
    for start in range(0, max_tokens, BURST):
        tokens, state = decoder.decode(state, BURST)
        for answer, row in zip(answers, np.asarray(tokens)[:, : max_tokens - start], strict=True):
            answer.extend(int(token) for token in row if token >= 0)
        if not show(answers[0]) or np.all(state.done):
            break
    return answers, (read - began, time.perf_counter() - read)


def serve(batcher, prompts, max_tokens, *, seed=0, show=lambda answer: None):
    """The same with continuous batching. Returns the answers and the seconds in all.

    The seed of each answer is `seed` plus its number.
    """
    began = time.perf_counter()
    requests = [
        batcher.submit(prompt, max_tokens, seed=(seed + i) % 2**32)
        for i, prompt in enumerate(prompts)
    ]
    while batcher.busy:
        if requests[0] in batcher.step():
            show(requests[0].generated)
    return [request.generated for request in requests], time.perf_counter() - began


def streamer(text):
    """A `show` that prints the new part of the first answer, in whole characters."""
    printed = ""

    def show(answer):
        nonlocal printed
        now = text.decode(answer)
        if not now.endswith("\N{REPLACEMENT CHARACTER}"):  # else it ends inside a character
            print(now[len(printed) :], end="", flush=True)
            printed = now
        return True

    return show


def run_all_at_once(decoder, prompts, args, show):
    """(answers, a line about the speed)."""
    # One burst that is not timed or shown: it compiles, and loads kernels and libraries.
    generate(decoder, prompts, args.max_tokens, show=lambda answer: False)
    answers, (reading, answering) = generate(
        decoder, prompts, args.max_tokens, seed=args.seed, show=show
    )
    generated, steps = sum(map(len, answers)), max(map(len, answers))
    return answers, (
        f"read {sum(map(len, prompts)) / reading:.0f} tokens/s, "
        f"generated {generated / answering:.1f} tokens/s, {answering / steps * 1e3:.2f} ms a step"
    )


def run_in_slots(decoder, prompts, args, show):
    """The same with args.slots sequences at a time."""
    longest = max(map(len, prompts)) + args.max_tokens
    batcher = decoder.batcher(args.slots, longest)
    serve(batcher, [(2 * prompts[0])[:2]], min(2, args.max_tokens))  # compiles both shapes
    answers, seconds = serve(batcher, prompts, args.max_tokens, seed=args.seed, show=show)
    generated = sum(map(len, answers))
    return answers, f"{args.slots} at a time, generated {generated / seconds:.1f} tokens/s"


def main(argv=None):
    args = parse_args(argv)
    decoder, text, prompts = load(args)
    run = run_in_slots if args.slots else run_all_at_once
    answers, said = run(decoder, prompts, args, streamer(text))
    print()
    for prompt, answer in list(zip(args.prompt or [], answers, strict=False))[1:]:
        print(f"\n--- {prompt}\n{text.decode(answer)}")
    print(
        f"\n{len(prompts)} sequences on {decoder.layout.size} x {jax.devices()[0].device_kind}: "
        f"{said}",
        file=sys.stderr,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
