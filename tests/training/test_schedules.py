import pytest

from hybridlab.training.schedules import Cosine, WarmupStableDecay
from hybridlab.training.settings import LoggerSettings, TrainerSettings

SCHEDULES = [
    WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.3),
    WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.3, final=0.1),
    Cosine(warmup_ratio=0.1, final=0.1),
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("total", [1, 7, 1000])
def test_schedules_rise_once_then_never_again(schedule, total):
    factors = [schedule.factor(step, total) for step in range(total)]
    top = factors.index(max(factors))
    assert all(0 < f <= 1 for f in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1]) and factors[top:] == sorted(factors[top:], reverse=True)


def test_warmup_stable_decay_has_three_phases():
    schedule = WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.2)
    assert [schedule.factor(step, 100) for step in (0, 9, 50, 80)] == pytest.approx([0.1, 1, 1, 1])
    assert schedule.factor(90, 100) == pytest.approx(0.5) and schedule.factor(99, 100) == pytest.approx(0.05)


def test_cosine_ends_at_its_final_value():
    schedule = Cosine(warmup_ratio=0.0, final=0.2)
    assert schedule.factor(50, 100) == pytest.approx(0.6) and schedule.factor(100, 100) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: WarmupStableDecay(warmup_ratio=0.8, decay_ratio=0.3), "warmup_ratio + decay_ratio=1.1"),
        (lambda: Cosine(final=2), "final=2"),
        (lambda: TrainerSettings(micro_batch_size=0), "micro_batch_size=0"),
        (lambda: TrainerSettings(precision="fp8"), "precision='fp8'"),
        (lambda: LoggerSettings(kind="mlflow"), "kind='mlflow'"),
    ],
)
def test_settings_out_of_range_are_refused_with_their_value(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert words in str(error.value)
