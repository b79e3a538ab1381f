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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlab.generation.command import Refused, command, count, load, names, read_options


def _file(value: str) -> bytes:
    return sys.stdin.buffer.read() if value == "-" else Path(value).read_bytes()


SAMPLING = {"temperature": float, "top_k": count, "top_p": float, "min_p": float, "seed": int}
KINDS: dict[str, Any] = {"run": str, "prompt": os.fsencode, "prompt_file": _file, "tokens": count, **SAMPLING}
KINDS |= {"device": str, "trust": names}


def generate_text(args: Sequence[str]) -> None:
    """Stream to standard output; figures go to standard error."""
    given = read_options(["prompt_file=-" if arg == "-" else arg for arg in args], KINDS)
    prompts = [value for key, value in given if key.startswith("prompt")]
    if not prompts and sys.stdin.isatty():
        raise Refused("no prompt: give prompt=TEXT, prompt_file=PATH, or text on standard input")
    prompts = prompts or [sys.stdin.buffer.read()]
    options = dict(given)
    from hybridlab.generation.decode import generate
    from hybridlab.generation.sampling import Sampler

    sampler = Sampler(**{key: options[key] for key in SAMPLING if key in options})
    model, tokenizer = load(options["run"], options.get("device"), options.get("trust", ()))
    if tokenizer is None:
        raise Refused(f"run={options['run']}: has no tokenizer; its tokens do not stand for text")
    ids = [[tokenizer.bos, *tokenizer.encode(prompt)] for prompt in prompts]
    tokens, lengths = options.get("tokens", 200), [len(row) for row in ids]
    screen = _Screen(tokenizer, prompts)
    start, first, made = time.perf_counter(), 0.0, 0
    for step in generate(model, ids, tokens, sampler, stop=tokenizer.bos):
        first = first or time.perf_counter() - start
        made += len(step)
        screen.push(step)
    screen.push([])
    after = max(time.perf_counter() - start - first, 1e-9)
    state = model.state_bytes(max(lengths) + tokens, model.embed.weight.dtype)
    print(
        f"{sum(lengths)} tokens read, {sum(lengths) / first:,.0f} tokens/s; {made} tokens written, "
        f"{made / after:,.0f} tokens/s; state {state:,} bytes for each of {len(ids)} sequences",
        file=sys.stderr,
    )


class _Screen:
    """The first unfinished prompt is shown as its text comes; that of later ones waits for its turn."""

    def __init__(self, tokenizer: Any, prompts: Sequence[bytes]):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")  # type: ignore[union-attr]
        self.streams = [tokenizer.stream() for _ in prompts]
        self.pending = [prompt.decode("utf-8", "replace") for prompt in prompts]
        if len(prompts) > 1:
            self.pending = [f"--- prompt {i} of {len(prompts)} ---\n{text}" for i, text in enumerate(self.pending, 1)]
        self.turn = 0

    def push(self, step: Sequence[tuple[int, int]]) -> None:
        """(prompt, token) of every prompt that still runs; none when all have ended."""
        for row, token in step:
            self.pending[row] += self.streams[row].push(token)
        running = {row for row, _ in step}
        while self.turn < len(self.streams):
            print(self.pending[self.turn], end="", flush=True)
            self.pending[self.turn] = ""
            if self.turn in running:
                return
            print(self.streams[self.turn].finish(), flush=True)
            self.turn += 1


if __name__ == "__main__":
    sys.exit(command(generate_text, __doc__, sys.argv[1:]))
