"""python -m hybridlab.generate run=PATH prompt=TEXT

run=PATH               a run folder, or one checkpoint in it
prompt=TEXT            taken as it stands after the first `=`; may be repeated
prompt_file=PATH       a file that is one prompt; may be repeated; -, or no prompt at all: standard input
tokens=200             new tokens at most; the end of a document comes earlier
temperature=0.8        0 takes the most probable token
top_k= top_p= min_p=   filters: the k best; those that reach p; those with this fraction of the best's probability
seed=0 device=cuda trust=PACKAGE,PACKAGE   packages beside hybridlab whose classes the run may be built from
"""

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from hybridlab.generation.command import command, count, load, read_options


def _file(value: str) -> bytes:
    return sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()


SAMPLING = {"temperature": float, "top_k": count, "top_p": float, "min_p": float, "seed": int}
KINDS: dict[str, Any] = {"prompt": os.fsencode, "prompt_file": _file, "tokens": count, **SAMPLING}


def generate_text(args: Sequence[str]) -> None:
    """Stream to standard output; figures go to standard error."""
    given = read_options(["prompt_file=-" if arg == "-" else arg for arg in args], KINDS)
    prompts, options = [value for key, value in given if key.startswith("prompt")], dict(given)
    if not prompts and sys.stdin.isatty():
        raise ValueError("no prompt: give prompt=TEXT, prompt_file=PATH, or text on standard input")
    prompts = prompts or [_file("-")]
    from hybridlab.generation.decode import generate
    from hybridlab.generation.sampling import Sampler

    sampler = Sampler(**{key: options[key] for key in SAMPLING if key in options})
    model, tokenizer = load(options)
    if tokenizer is None:
        raise ValueError(f"run={options['run']}: has no tokenizer; its tokens do not stand for text")
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens, lengths = options.get("tokens", 200), [len(row) for row in ids]
    made, times = [], [time.perf_counter()]
    for step in _shown(generate(model, ids, tokens, sampler, stop=tokenizer.bos), tokenizer, prompts):
        made.append(len(step))
        times.append(time.perf_counter())
    read, reading, writing = sum(lengths), times[1] - times[0], times[-1] - times[1]
    state = model.state_bytes(max(lengths) + tokens, model.embed.weight.dtype)
    said = f"{read} tokens read, {read / reading:,.0f} tokens/s; {sum(made)} written"
    said += f", {sum(made[1:]) / writing:,.0f} tokens/s; state {state:,} bytes for each of {len(ids)} sequences"
    print(said, file=sys.stderr)


def _shown(steps: Iterable[list], tokenizer: Any, prompts: Sequence[bytes]) -> Iterator[list]:
    """Steps of `generate`, printed: the first unfinished prompt as its text comes, each later one at its turn."""
    sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
    streams, turn = [tokenizer.stream() for _ in prompts], 0
    pending = [prompt.decode("utf-8", "replace") for prompt in prompts]
    if len(prompts) > 1:
        pending = [f"--- prompt {i} of {len(prompts)} ---\n{text}" for i, text in enumerate(pending, 1)]
    for step in chain(steps, [[]]):  # in the last one nothing runs any more
        for row, token in step:
            pending[row] += streams[row].push(token)
        while turn < len(prompts):
            print(pending[turn], end="", flush=True)
            pending[turn] = ""
            if turn in dict(step):
                break
            print(streams[turn].finish(), flush=True)
            turn += 1
        yield step


if __name__ == "__main__":
    sys.exit(command(generate_text, __doc__, sys.argv[1:]))
