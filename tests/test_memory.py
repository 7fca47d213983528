"""The memory budget: what a step takes is within it, one member too many is not, and the result stays."""

import copy
import itertools

import pytest
import torch

import forde_fast as ff
from forde_fast import memory, models
from forde_fast.strategies import Strategy


def allocated(call) -> int:
    """The most bytes that torch's allocator had given out in a call beyond what it had before, by its profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return max(itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())))


def batch():
    return torch.randn(32, 1, 12, 12), torch.randint(10, (32,))


def trainer_with(ensemble, **options):
    return ff.Trainer(copy.deepcopy(ensemble), lr=0.01, **options)


@pytest.mark.parametrize("strategy", ["loop", "stacked"])
def test_a_step_stays_within_the_budget(strategy):
    ensemble, (x, y) = ff.Ensemble(lambda: models.cnn(10, 1, 8), 6), batch()
    free = trainer_with(ensemble, strategy=strategy)
    free.step(x, y)
    whole = allocated(lambda: free.step(x, y))
    for share in (0.5, 0.8):
        budget = int(share * whole)
        trainer = trainer_with(ensemble, strategy=strategy, memory_budget=budget)
        trainer.step(x, y)
        members = trainer._strategy.members_at_a_time
        assert 1 <= members < 6
        assert f"{members} members at a time" in trainer.strategy_report
        needed = allocated(lambda trainer=trainer: trainer.step(x, y))
        assert needed <= 1.1 * budget  # what kernels take within a call is not seen
        assert memory.peak(Strategy(strategy, members + 1), trainer.ensemble, trainer.objective, x, y) > budget
        torch.testing.assert_close(trainer.ensemble.flat, free.ensemble.flat, rtol=1e-3, atol=1e-5)


def test_a_budget_for_all_members_and_one_for_none():
    ensemble, (x, y) = ff.Ensemble(lambda: models.cnn(10, 1, 8), 3), batch()
    before, random = copy.deepcopy(ensemble.state_dict()), torch.get_rng_state()
    trainer, small = (trainer_with(ensemble, memory_budget=budget) for budget in (2**33, 1000))
    trainer.step(x, y)
    assert trainer._strategy.members_at_a_time == 3
    torch.set_rng_state(random)
    with pytest.raises(ValueError, match=r"^memory_budget: expected at least the [\d,]+ bytes .* got 1,000$"):
        small.step(x, y)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[name]) for name, t in small.ensemble.state_dict().items())


def test_what_lives_is_counted():
    with memory.Peak() as seen:
        kept = torch.zeros(1000)
        view = kept[:10]
        for _ in range(3):
            kept.add_(torch.ones(1000))
        other = view + 1
    assert seen.bytes == 8000
    assert seen.now == 4000 + other.nbytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory_budget": 0}, "memory_budget: expected a whole number >= 1, got 0"),
        ({"memory_budget": 10**9, "members_at_a_time": 2}, "memory_budget: expected None beside members_at_a_time"),
    ],
)
def test_bad_budgets_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        ff.Trainer(ff.Ensemble(lambda: models.mlp(4, (1, 2, 2)), 2), **options)
