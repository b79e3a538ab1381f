"""What stands before a run and what stands after it: the table of layers, the report and its picture."""

import json
import resource
from pathlib import Path
from types import SimpleNamespace

import torch

from hybridlab.generation.decode import complete
from hybridlab.generation.sampling import Sampler
from hybridlab.training.session import write


def table(model, length: int) -> str:
    """One line per layer, then the totals, for rows of `length` tokens."""
    head = ("layer", "block", "mixer", "ffn", "parameters", "FLOPs/token", "state bytes")
    rows = [(r.place, r.block, r.mixer, r.ffn, r.params, r.flops, r.state_bytes) for r in model.table(length)]
    text = [head] + [(str(a), b, c, d, f"{e:,}", f"{f:,.0f}", f"{g:,}") for a, b, c, d, e, f, g in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(head))]
    lines = []
    for row in text:
        cells = zip(row, widths, (str.rjust, *[str.ljust] * 3, *[str.rjust] * 3), strict=True)
        lines.append("  ".join(pad(cell, width) for cell, width, pad in cells))
    total, active = model.n_params()
    lines.append(
        f"{total:,} parameters, {active:,} active; {model.flops(length) / length:,.0f} forward FLOPs per token; "
        f"{model.state_bytes(length):,} bytes of state per sequence of {length} (bf16)"
    )
    return "\n".join(lines)


def facts(run: SimpleNamespace) -> str:
    """What the run reads, and how it computes."""
    shown = {
        k: f"{v:,}" if isinstance(v, int) else f"{v:.4f}" if isinstance(v, float) else v
        for k, v in run.corpus.facts.items()
    }
    data, numerics = run.parts.data, ", ".join(f"{k} {v}" for k, v in run.info["numerics"].items())
    train, valid = (f"{run.corpus.n_rows(split):,}" for split in ("train", "valid"))
    rows = (
        f"{train} rows of {data.seq_len} tokens to train on, {valid} held out; {run.end:,} steps of {data.batch_size}"
    )
    machine = f"{run.kind}, {torch.get_num_threads()} threads, {numerics}; " + (
        "a dry run" if run.config["dry_run"] else f"everything lands in {run.folder}"
    )
    return f"data: {'; '.join(f'{k} {v}' for k, v in shown.items())}\n{rows}\n{machine}"


def finish(run: SimpleNamespace, module) -> None:
    """Samples, report.md with its curve, and the same summary on the terminal."""
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    tested = [line for line in lines if "valid_loss" in line]
    _curve(lines, tested, run.folder / "curve.png")
    prompts, settings, tokenizer = list(run.parts.trainer.sample_prompts), run.parts.trainer, run.corpus.tokenizer
    samples = ""
    if prompts and tokenizer is not None:
        sampler = Sampler(seed=run.config["seed"])
        made = complete(module.model.eval(), tokenizer, prompts, settings.sample_tokens, sampler)
        samples = "\n\n".join(prompt + text for prompt, text in zip(prompts, made, strict=True))
    write(run.folder / "samples.txt", samples + "\n")
    result = {k: v for k, v in tested[-1].items() if k.startswith("valid_")}
    learned = ", ".join(f"{k[6:].replace('_', ' ')} {v:.4f}" for k, v in result.items())
    beside = ", ".join(f"{k} {v:.4f}" for k, v in run.corpus.facts.items() if isinstance(v, float))
    seconds = sum(line["time/seconds"] + line.get("time/validation", 0) for line in lines)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    summary = (
        f"{run.info['name']}: {module.step} steps, {lines[-1]['tokens']:,} tokens in {seconds / 60:.1f} min, peak "
        f"memory {memory:.2f} GiB, {module.guard.skipped} steps skipped\nheld out: {learned}"
        + f" (beside it: {beside})"
        * bool(beside)
    )
    blocks = {
        "Model": table(module.model, run.parts.data.seq_len), "Data": facts(run), "Samples": samples,
        "Machine": json.dumps(run.info["environment"], indent=1),
    }  # fmt: skip
    body = "\n\n".join(f"## {name}\n\n```\n{text}\n```" for name, text in blocks.items())
    rest = "Beside this file: checkpoints, config.yaml, metrics.jsonl (one line per step), run.json, samples.txt."
    write(run.folder / "report.md", f"# {run.info['name']}\n\n{summary}\n\n![loss](curve.png)\n\n{body}\n\n{rest}\n")
    write(run.folder / "run.json", json.dumps(run.info | {"status": "complete", "result": result}, indent=1))
    print(f"{summary}\nreport: {run.folder / 'report.md'}; checkpoints: {run.folder / 'checkpoints'}")


def _curve(lines: list[dict], tested: list[dict], path: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).add_subplot(
        xlabel="tokens", ylabel="nats per token"
    )
    for found, key, style in ((lines, "loss", "-"), (tested, "valid_loss", "o-")):
        axes.plot([line["tokens"] for line in found], [line[key] for line in found], style, linewidth=0.8, label=key)
    axes.legend()
    figure.savefig(path, dpi=120)
