"""python -m hybridlab.evaluate run=PATH

  run=PATH          a run folder, or one checkpoint in it
  data=NAME         held-out part of other data, a file in configs/data; its options as data.OPTION=VALUE
  rows=N            only the first N rows
  batch_size=8 device=cuda cache=.cache/hybridlab trust=PACKAGE,PACKAGE

Prints one JSON object: loss in nats per token, accuracy, bits per byte, and what they were measured on.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hybridlab.config import ConfigError
from hybridlab.generation.command import command, count, load, read_options

KINDS: dict[str, Any] = {"data": str, "rows": count, "batch_size": count, "cache": Path}


def evaluate_run(args: Sequence[str]) -> None:
    """Prepare the data, score them, print."""
    overrides = [arg for arg in args if arg.startswith("data.")]
    options = dict(read_options([arg for arg in args if arg not in overrides], KINDS))
    if overrides and "data" not in options:
        raise ValueError(f"{overrides[0]}: goes with data=NAME; without it the run's own data are used as they are")
    if own := [arg for arg in overrides if arg.startswith(("data.tokenizer=", "data.vocab_size="))]:
        raise ValueError(f"{own[0]}: text is always tokenized as the run was")
    from hybridlab.checkpoint import TOKENIZER, find, load_config
    from hybridlab.config import build, compose
    from hybridlab.evaluation.score import evaluate

    folder = find(options["run"])
    model, tokenizer = load(options | {"run": folder})
    source, trusted = load_config(folder)["data"], options.get("trust", ())
    if "data" in options:
        trusted = None  # the user's own words; and without what the presets would set
        source = compose([f"data={options['data']}", *overrides, "model={}", "~optim"])["data"]
        if tokenizer is not None:
            source |= {"tokenizer": str(folder / TOKENIZER), "vocab_size": tokenizer.vocab_size}
    corpus = build(source, "data", trusted).prepare(options.get("cache", Path(".cache/hybridlab")))
    tokenizers = [t and t.fingerprint for t in (tokenizer, corpus.tokenizer)]
    if tokenizers[0] != tokenizers[1] or corpus.vocab_size > model.vocab_size:
        raise ValueError("the run's tokens are not those of the data; with data=NAME text is tokenized anew")
    found = evaluate(model, corpus, rows=options.get("rows"), batch_size=options.get("batch_size"))
    print(json.dumps({"run": str(folder), "data": corpus.fingerprint, **found}))


if __name__ == "__main__":
    sys.exit(command(evaluate_run, __doc__, sys.argv[1:], ConfigError))
