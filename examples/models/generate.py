"""Generates text with a model that has multi-head latent attention.

    python -m examples.models.generate --model FOLDER --prompt "Why is the sky blue?" --chat
    python -m examples.models.generate --model FOLDER --prompt-lines FILE --slots 8
    python -m examples.models.generate --random-weights deepseek-v2-lite --batch 32

FOLDER is from Hugging Face and has config.json, *.safetensors and the files of a tokenizer. A
prompt is used as it is; with --chat it is put into the tokenizer's chat template. With random
weights there is no tokenizer, so prompts are random tokens or --prompt-ids, and tokens are printed.
The first answer is printed while it is generated, the others at the end. All sequences run at the
same time, in a loop on the device. With --slots N, only N of them run at a time, in continuous
batches. What is wrong is said in one line on standard error: exit status 2 for arguments, else 1.
"""

import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from .arguments import parse_args
from .config import ModelConfig
from .decoding import Decoder
from .parallel import Layout
from .request import check_tokens
from .text import Numbers, Stream, Text
from .weights import load_weights, random_weights

BURST = 8  # steps in one call; then the new tokens are printed


def choose_dtype(args):
    """The dtype of weights and cache. Refuses what only a GPU can do, before weights are read."""
    if jax.default_backend() != "cpu":
        return jnp.dtype(args.dtype or "bfloat16")
    if args.implementation == "cuda":
        raise ValueError("--implementation cuda: there is no GPU; use auto or xla")
    if args.dtype == "bfloat16":
        raise ValueError("--dtype bfloat16: XLA lacks some of its products on a CPU; use float32")
    return jnp.dtype("float32")


def read_prompts(args, config):
    """(tokenizer, prompts as lists of tokens, one for each sequence)."""
    text = Text(args.model) if any(isinstance(p, str) for p in args.prompts) else Numbers()
    if args.prompts:
        encode = text.chat if args.chat else getattr(text, "encode", list)
        prompts = [encode(prompt) for prompt in args.prompts]
    else:
        rng = np.random.default_rng(args.seed)
        shape = args.batch or 1, args.prompt_tokens
        prompts = rng.integers(0, config.vocab, shape).tolist()
    prompts = [check_tokens(f"prompt {i}", p, config.vocab) for i, p in enumerate(prompts)]
    longest = max(map(len, prompts)) + args.max_tokens
    if config.max_positions and longest > config.max_positions:
        print(
            f"warning: a sequence may get {longest} tokens, but the model was made for at most "
            f"{config.max_positions} (max_position_embeddings)",
            file=sys.stderr,
        )
    return text, [prompts[i % len(prompts)] for i in range(args.batch or len(prompts))]


def load(args):
    """(decoder, tokenizer, prompts) for the arguments of the command."""
    layout, dtype = Layout.over(args.parallel), choose_dtype(args)
    if args.model:
        config = ModelConfig.from_hf(args.model)
    else:
        config = ModelConfig.named(args.random_weights, layers=args.layers)
    text, prompts = read_prompts(args, config)
    batch = len(prompts)
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


class Printer:
    """Prints an answer while it grows, in whole characters."""

    def __init__(self, text):
        self._stream, self._printed = Stream(text), 0

    def show(self, answer):
        print(self._stream.add(answer[self._printed :]), end="", flush=True)
        self._printed = len(answer)
        return True

    def end(self):
        print(self._stream.end(), flush=True)


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


def run(args):
    decoder, text, prompts = load(args)
    printer = Printer(text)
    run = run_in_slots if args.slots else run_all_at_once
    answers, said = run(decoder, prompts, args, printer.show)
    printer.end()
    # Without a temperature, sequences with the same prompt have the same answer.
    shown = len(prompts) if args.prompts and args.temperature else len(args.prompts)
    for i in range(1, shown):
        prompt = args.prompts[i % len(args.prompts)]
        prompt = prompt if isinstance(prompt, str) else ",".join(map(str, prompt))
        print(f"\n--- {prompt}\n{text.decode(answers[i])}")
    print(
        f"\n{len(prompts)} sequences on {decoder.layout.size} x {jax.devices()[0].device_kind}: "
        f"{said}",
        file=sys.stderr,
    )


def main(argv=None):
    args = parse_args(argv, __doc__)
    try:
        run(args)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; Python would complain once more at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"error: {in_one_line(error)}", file=sys.stderr)
        return 1
    return 0


def in_one_line(error):
    """What an error says. Only a ValueError may take more lines: it may list tensors."""
    if isinstance(error, ValueError | OSError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"there is no module {error.name}; pip install '.[examples]' installs what is needed"
    first = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first} (--debug shows where)"


if __name__ == "__main__":
    sys.exit(main())
