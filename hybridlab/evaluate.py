"""python -m hybridlab.evaluate run=PATH

  run=PATH          a run folder, or one checkpoint in it
  data=NAME         held-out part of other data, a file in configs/data; its options as data.OPTION=VALUE
  seq_len=N         length of the rows, longer or shorter than those it was trained on
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
from hybridlab.generation.command import Refused, command, count, load, names, read_options

KINDS: dict[str, Any] = {"run": str, "data": str, "seq_len": count, "rows": count, "batch_size": count}
KINDS |= {"device": str, "cache": Path, "trust": names}


def evaluate_run(args: Sequence[str]) -> None:
    """Prepare the data, score them, print."""
    overrides = [arg for arg in args if arg.startswith("data.")]
    options = dict(read_options([arg for arg in args if arg not in overrides], KINDS))
    if overrides and "data" not in options:
        raise Refused(f"{overrides[0]}: goes with data=NAME; without it the run's own data are used as they are")
    if own := [arg for arg in overrides if arg.startswith(("data.tokenizer=", "data.vocab_size="))]:
        raise Refused(f"{own[0]}: text is always tokenized as the run was")
    from hybridlab.checkpoint import TOKENIZER, find, load_config
    from hybridlab.config import build, compose
    from hybridlab.evaluation.score import evaluate

    folder = find(options["run"])
    model, tokenizer = load(str(folder), options.get("device"), options.get("trust", ()))
    given, trusted = "data" in options, options.get("trust", ())
    without_model = ["model={}", "~optim"]  # what the presets would set
    source = compose([f"data={options.get('data')}", *overrides, *without_model])["data"] if given else None
    source = source or load_config(folder)["data"]
    if given and tokenizer is not None:
        source |= {"tokenizer": str(folder / TOKENIZER), "vocab_size": tokenizer.vocab_size}
    if "seq_len" in options:
        source["valid_seq_len"] = options["seq_len"]
    corpus = build(source, "data", None if given else trusted).prepare(options.get("cache", Path(".cache/hybridlab")))
    tokenizers = [t and t.fingerprint for t in (tokenizer, corpus.tokenizer)]
    if tokenizers[0] != tokenizers[1] or corpus.vocab_size > model.vocab_size:
        raise Refused("the run's tokens are not those of the data; with data=NAME text is tokenized anew")
    found = evaluate(model, corpus, rows=options.get("rows"), batch_size=options.get("batch_size", 8))
    print(json.dumps({"run": str(folder), "data": corpus.fingerprint, **found}))


if __name__ == "__main__":
    sys.exit(command(evaluate_run, __doc__, sys.argv[1:], ConfigError))
