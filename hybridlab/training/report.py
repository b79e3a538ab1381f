"""What stands before a run and what stands after it: the table of layers, the report and its picture."""

import json
import resource
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from hybridlab.generation.decode import complete
from hybridlab.generation.sampling import Sampler
from hybridlab.training.session import write


def table(model, length: int) -> str:
    """One line per layer, then the totals, for rows of `length` tokens."""
    rows: list[tuple[str, ...]] = [("layer", "block", "mixer", "ffn", "parameters", "FLOPs/token", "state bytes")]
    for place, *names, params, flops, state in model.table(length):
        rows.append((str(place), *names, f"{params:,}", f"{flops:,.0f}", f"{state:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides: list[Any] = [str.rjust, *[str.ljust] * 3, *[str.rjust] * 3]
    lines = ["  ".join(side(*cell) for side, *cell in zip(sides, row, widths, strict=True)) for row in rows]
    total, active = model.n_params()
    return "\n".join(lines) + (
        f"\n{total:,} parameters, {active:,} active; {model.flops(length) / length:,.0f} forward FLOPs per token; "
        f"{model.state_bytes(length):,} bytes of state per sequence of {length} (bf16)"
    )


def facts(run: SimpleNamespace) -> str:
    """What the run reads, and how it computes."""
    formats, data = {int: ",", float: ".4f"}, run.parts.data
    shown = "; ".join(f"{k} {v:{formats.get(type(v), '')}}" for k, v in run.corpus.facts.items())
    train, valid = (f"{run.corpus.n_rows(split):,}" for split in ("train", "valid"))
    numerics = ", ".join(f"{k} {v}" for k, v in run.info["numerics"].items())
    place = "a dry run" if run.config["dry_run"] else f"everything lands in {run.folder}"
    return (
        f"data: {shown}\n{train} rows of {data.seq_len} tokens to train on, {valid} held out; "
        f"{run.end:,} steps of {data.batch_size}\n{run.kind}, {torch.get_num_threads()} threads, {numerics}; {place}"
    )


def finish(run: SimpleNamespace, module) -> None:
    """Samples, report.md with its curve, and the same summary on the terminal."""
    folder, name = run.folder, run.config["name"]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    _curve(lines, folder / "curve.png")
    prompts, settings, tokenizer = list(run.parts.trainer.sample_prompts), run.parts.trainer, run.corpus.tokenizer
    samples = ""
    if prompts and tokenizer is not None:
        sampler = Sampler(seed=run.config["seed"])
        made = complete(module.model.eval(), tokenizer, prompts, settings.sample_tokens, sampler)
        samples = "\n\n".join(prompt + text for prompt, text in zip(prompts, made, strict=True))
    write(folder / "samples.txt", samples + "\n")
    result = {k: v for k, v in lines[-1].items() if k.startswith("valid_")}
    said = summary(run, module, lines, result)
    blocks = {
        "Model": table(module.model, run.parts.data.seq_len), "Data": facts(run), "Samples": samples,
        "Machine": json.dumps(run.info["environment"], indent=1),
    }  # fmt: skip
    body = "\n\n".join(f"## {title}\n\n```\n{text}\n```" for title, text in blocks.items())
    rest = "Beside this file: checkpoints, config.yaml, metrics.jsonl (one line per step), run.json, samples.txt."
    write(folder / "report.md", f"# {name}\n\n{said}\n\n![loss](curve.png)\n\n{body}\n\n{rest}\n")
    write(folder / "run.json", json.dumps(run.info | {"status": "complete", "result": result}, indent=1))
    print(f"{said}\nreport: {folder / 'report.md'}; checkpoints: {folder / 'checkpoints'}")


def summary(run: SimpleNamespace, module, lines: list[dict], result: dict[str, float]) -> str:
    """What was learned, beside general compressors where the data were measured with them, and what it took."""
    learned = ", ".join(f"{k[6:].replace('_', ' ')} {v:.4f}" for k, v in result.items())
    for name in ("gzip -9", "xz -9e"):
        if (bits := run.corpus.facts.get(name)) and "valid_bits_per_byte" in result:
            learned += f"; {name} {bits:.4f}, so {result['valid_bits_per_byte'] / bits:.3f} of it"
    seconds = sum(line.get("time/seconds", 0) + line.get("time/validation", 0) for line in lines)
    tokens = module.step * run.parts.data.batch_size * run.parts.data.seq_len
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return (
        f"{run.config['name']}: {module.step:,} steps ({module.guard.skipped} skipped), {tokens:,} tokens in "
        f"{seconds / 60:.1f} min, {tokens / seconds:,.0f} tokens/s; {(time.monotonic() - run.began) / 60:.1f} min with "
        f"preparation, samples and report; peak memory {memory:.2f} GiB\nheld out: {learned}"
    )


def _curve(lines: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="tokens", ylabel="nats per token")
    for key, style in (("loss", "-"), ("valid_loss", "o-")):
        found = [(line["tokens"], line[key]) for line in lines if "tokens" in line and key in line]
        axes.plot(*zip(*found, strict=True), style, linewidth=0.8, label=key)
    axes.legend()
    figure.savefig(path, dpi=120)
