"""One optimizer step: accumulation, clipping, and what is done when something is not finite or does not fit."""

import copy
import re

import pytest
import torch

from hybridlab.training.guard import PATIENCE, Guard
from hybridlab.training.module import TrainingModule
from hybridlab.training.objectives.next_token import NextToken
from hybridlab.training.optimizers import AdamW, Muon
from hybridlab.training.schedules import WarmupStableDecay
from hybridlab.training.settings import TrainerSettings


def make(tiny, moe=False, optim=Muon, model=None, **settings):
    torch.manual_seed(0)
    flat = WarmupStableDecay(warmup_ratio=0, decay_ratio=0)
    module = TrainingModule(
        model or tiny.model(moe), optim(tokens=1, schedule=flat), NextToken(z_loss=1e-3), TrainerSettings(**settings),
        total_steps=10_000, bf16=False,
    )  # fmt: skip
    optimizer = module.configure_optimizers()
    module.optimizers = lambda use_pl_optimizer=True: optimizer
    return module, optimizer


def gradients(module, batch):
    found = {}
    module._move = lambda params, lr, scale: found.update(
        {n: p.grad.clone() for n, p in module.model.named_parameters()}
    )
    module.training_step(batch, 0)
    return found


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_of_unequal_token_counts_give_the_gradient_of_the_whole(tiny, moe, micro):
    batch = tiny.corpus.rows("train", torch.arange(7))
    counts = (batch.targets != -100).sum(1)
    assert counts.min() < counts.max()
    whole, split = make(tiny, moe)[0], make(tiny, moe, micro_batch_size=micro)[0]
    expected, found = gradients(whole, batch), gradients(split, batch)
    for name, g in expected.items():
        assert (found[name] - g).norm() <= 1e-6 * g.norm() + 1e-9, name
    assert split.record["loss"] == pytest.approx(whole.record["loss"], rel=1e-6)


def test_loss_parts_add_up_to_what_is_differentiated(tiny):
    model, batch = tiny.model(moe=True), tiny.corpus.rows("train", torch.arange(3))
    scored = (batch.targets != -100).sum()
    loss, parts, _ = NextToken(z_loss=0.1)(model, batch, scored)
    assert set(parts) == {"loss", "z_loss", "balance", "router_z"}
    assert float(sum(parts.values())) == pytest.approx(loss.item(), rel=1e-6)
    logits = model(batch.tokens, batch.packing).logits.log_softmax(-1)
    nats = [-logits[b, t, y] for b, row in enumerate(batch.targets.tolist()) for t, y in enumerate(row) if y != -100]
    assert float(parts["loss"]) == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)


def test_clipping_bounds_the_norm_and_reports_both(tiny):
    module, _ = make(tiny, clip_norm=0.01)
    norms = []
    move = module._move

    def watched(params, lr, scale):
        move(params, lr, scale)
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in params])))

    module._move = watched
    module.training_step(tiny.corpus.rows("train", torch.arange(4)), 0)
    assert norms[0] == pytest.approx(0.01, rel=1e-4) and module.record["grad_norm"] > 0.1
    assert module.record["grad_norm_clipped"] == 0.01


def poison_gradient(module):
    weight = module.model.layers["1"].ffn.experts.up
    weight.register_hook(lambda g: g.index_fill(0, torch.tensor(2), torch.inf))


def poison_parameter(name, index):
    def poison(module):
        with torch.no_grad():
            module.model.get_parameter(name)[index] = torch.nan

    return poison


def poison_loss(module):
    objective = module.objective
    module.objective = lambda *a: (lambda loss, parts, stats: (loss * torch.nan, parts, stats))(*objective(*a))


def poison_idle(module):
    module.model.idle = torch.nn.Parameter(torch.tensor([torch.nan]))  # as in an expert that no token chooses


POISONS = {
    "idle": (poison_idle, "parameter idle"),
    "loss": (poison_loss, "gradient of|the loss"),
    "gradient": (poison_gradient, r"gradient of layers\.1\.ffn\.experts\.up"),
    "parameter": (poison_parameter("layers.0.mixer.gate", 3), r"parameter layers\.0\.mixer\.gate"),
    "expert": (poison_parameter("layers.0.ffn.experts.down", 1), r"parameter layers\.0\.ffn\.experts\.down"),
}


@pytest.mark.parametrize("optim", [AdamW, Muon])
@pytest.mark.parametrize("kind", POISONS)
def test_a_step_that_is_not_finite_is_not_taken_and_five_in_a_row_end_the_run(tiny, kind, optim):
    module, optimizer = make(tiny, moe=True, optim=optim)
    batches = [tiny.corpus.rows("train", torch.arange(i, i + 4)) for i in range(12)]
    for batch in batches[:3]:
        module.training_step(batch, 0)
    poison, named = POISONS[kind]
    poison(module)
    before = copy.deepcopy((module.model.state_dict(), optimizer.state_dict()["state"]))
    for i, batch in enumerate(batches[3 : 2 + PATIENCE], 1):
        module.training_step(batch, 0)
        assert module.guard.skipped == i and "non-finite" in module.events[-1]
    assert not module.failure and not module.stopping
    module.training_step(batches[8], 0)
    assert module.stopping and re.search(named, module.failure)
    after = module.model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    assert all(len(series) == 3 for series in module.guard.recent)


def test_outputs_are_searched_before_gradients(tiny):
    model = tiny.model()
    model.layers["1"].mixer.register_forward_hook(lambda m, i, out: out / 0)
    module, _ = make(tiny, model=model)
    for _ in range(PATIENCE):
        module.training_step(tiny.corpus.rows("train", torch.arange(4)), 0)
    assert "output of module layers.1.mixer" in module.failure


def test_one_bad_step_does_not_poison_the_judgement_of_the_next(tiny):
    module, _ = make(tiny)
    batch = tiny.corpus.rows("train", torch.arange(4))
    objective = module.objective
    poison_loss(module)
    module.training_step(batch, 0)
    module.objective = objective
    module.training_step(batch, 0)
    assert module.guard.skipped == 1 and module.guard.bad == 0


def healthy(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(2, n, generator=g)
    losses = 2 + 3 * torch.exp(-torch.arange(n) / 300) + 0.05 * noise[0]
    return zip(losses.tolist(), (0.3 * torch.exp(0.3 * noise[1])).tolist(), strict=True)


def test_a_spike_of_twenty_deviations_is_skipped_and_a_clean_run_is_not():
    guard = Guard(6.0)
    verdicts = [guard.judge(*pair) for pair in healthy(2000)]
    assert verdicts.count("spike") < 10
    losses, norms = guard.recent
    mean, spread = sum(losses) / len(losses), torch.tensor(losses).std().item()
    assert guard.judge(mean + 20 * spread, norms[-1]) == "spike"
    assert guard.judge(mean, norms[-1]) == "ok"


def test_a_new_level_is_accepted_after_five_spikes():
    guard = Guard(6.0)
    for pair in healthy(200):
        guard.judge(*pair)
    assert [guard.judge(50.0, 0.3) for _ in range(7)] == ["spike"] * 5 + ["ok"] * 2


def test_the_guard_survives_a_checkpoint():
    one, two = Guard(6.0), Guard(6.0)
    for pair in healthy(100):
        one.judge(*pair)
    two.load_state_dict(one.state_dict())
    assert [one.judge(*p) for p in healthy(100, 1)] == [two.judge(*p) for p in healthy(100, 1)]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory")])
def test_out_of_memory_halves_the_micro_batch_and_changes_nothing_else(tiny, error):
    batch = tiny.corpus.rows("train", torch.arange(6))
    expected = gradients(make(tiny)[0], batch)
    module, _ = make(tiny)
    objective = module.objective

    def small_memory(model, micro, *rest):
        if len(micro.tokens) > 2:
            raise error
        return objective(model, micro, *rest)

    module.objective = small_memory
    found = gradients(module, batch)
    assert module.micro == 1 and [e.split(", ")[1] for e in module.events] == [
        "micro_batch_size 6 -> 3",
        "micro_batch_size 3 -> 1",
    ]
    for name, g in expected.items():
        assert (found[name] - g).norm() <= 1e-6 * g.norm() + 1e-9, name


def test_other_errors_are_not_swallowed(tiny):
    module, _ = make(tiny)

    def broken(*_):
        raise RuntimeError("something else")

    module.objective = broken
    with pytest.raises(RuntimeError, match="something else"):
        module.training_step(tiny.corpus.rows("train", torch.arange(4)), 0)
