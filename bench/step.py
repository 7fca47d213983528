"""The training step: ours against a plain PyTorch loop that differentiates twice with autograd, and against the floor
of exact FoRDE, which is 2 x the faster of our own and the plain deep-ensemble step.

    python bench/step.py [--device cuda] [--rounds 9] [--cases mlp,cnn-digits] [--providers plain-de,de,forde]
                         [--precision bf16] [--parts] [--collect FILE] [--out FOLDER]

Providers take turns in one process. `lazy` is the mean over four steps with repulsion_every=4; `compiled-de` is the
plain deep-ensemble step through torch.compile (a plain FoRDE step cannot be compiled: it differentiates twice);
`de-auto` is `de` with strategy="auto". Ours keep what memory they free (`forde_fast.heap`), plain ones give blocks of
32 MB and more back, as they do by default.
`de-graph` and `graph` are `de` and `forde` as CUDA graphs, `streams-graph` and its like have members on several
streams in them. The memory is what one step needs beyond what is held
before it. On a GPU, `of_peak` is the speed of 3 forward passes a sample, or 6 with repulsion, as a share of a large
matrix product's.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import sys
import time

import torch
from timing import RESULTS, append, interleaved, quantiles, ratio
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import forde_fast as ff
from forde_fast import heap, models, reference
from forde_fast import step as core
from forde_fast.precision import products_in
from forde_fast.strategies import Graphs
from forde_fast.timing import seconds

CASES = {  # model, width, members, batch, input
    "mlp": ("mlp", 128, 10, 128, (1, 28, 28)),
    "mlp-5": ("mlp", 128, 5, 128, (1, 28, 28)),
    "cnn": ("cnn", 16, 5, 128, (1, 28, 28)),
    "cnn-10": ("cnn", 16, 10, 128, (1, 28, 28)),
    "cnn-digits": ("cnn", 16, 10, 128, (1, 8, 8)),
    **{f"mlp-{m}": ("mlp", 128, m, 128, (1, 28, 28)) for m in (1, 4)},
    **{f"cnn-{m}": ("cnn", 16, m, 128, (1, 28, 28)) for m in (1, 4)},
    **{f"cnn-digits-{m}": ("cnn", 16, m, 128, (1, 8, 8)) for m in (1, 4)},
    "resnet18-16": ("resnet18", 16, 2, 128, (3, 32, 32)),
    "resnet18-64": ("resnet18", 64, 2, 32, (3, 32, 32)),
    "resnet18-64-10": ("resnet18", 64, 10, 128, (3, 32, 32)),
    "resnet18-64-1": ("resnet18", 64, 1, 128, (3, 32, 32)),
}
SHORT = {"cpu": "mlp,cnn,cnn-digits,resnet18-16", "cuda": "mlp,resnet18-64-10"}  # a default run: 3 minutes, 1 minute
GRAPHS = ("de-graph", "graph", "de-streams-graph", "streams-graph", "lazy-graph")  # of a default run on a GPU
LAZY = ("lazy", "lazy-graph")
DE = (
    "plain-de",
    "de",
    "de-auto",
    "de-graph",
    "de-streams-graph",
)  # the fastest of them is what others are held against
PROVIDERS = ("plain-de", "de", "plain-forde", "forde", "stacked", "auto", "lazy")
OPTIONAL = ("compiled-de", "de-auto", "plain-layers", "one-at-a-time", "streams", *GRAPHS)


def plain_step(members, optimizer, x, y, repulsive):
    """The published objective in plain PyTorch: one graph through all members, differentiated twice."""
    x = x.detach().requires_grad_(repulsive)
    outputs = [member(x) for member in members]
    loss = sum(F.cross_entropy(o, y) for o in outputs)
    if repulsive and len(members) > 1:
        scores = [o.gather(1, y[:, None]).sum() for o in outputs]
        gradients = torch.stack([torch.autograd.grad(s, x, create_graph=True)[0].flatten(1) for s in scores])
        s = reference.normalise(gradients, 1e-24)
        d = reference.squared_distances(s, s.detach())
        loss = loss + reference.value(d, reference.bandwidth_of(d.detach()))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def steps(build, members, x, y, names, precision):
    """name -> a call that does one step (lazy: four), each on an ensemble of its own; and the trainers."""

    def plain():
        modules = [m.train() for m in ff.Ensemble(build, members).to(x.device).members]
        return modules, torch.optim.SGD([p for m in modules for p in m.parameters()], 0.01, 0.9, 0, 5e-4, True)

    def by_itself(call):
        def run():
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bf16"), heap.large_given_back():
                call()

        return run

    options = {
        "de": {"method": "de"},
        "de-auto": {"method": "de", "strategy": "auto"},
        "forde": {},
        "stacked": {"strategy": "stacked"},
        "streams": {"strategy": "streams"},
        "auto": {"strategy": "auto"},
        "lazy": {"repulsion_every": 4},
        "one-at-a-time": {"members_at_a_time": 1},
        "plain-layers": {"accelerate": False},
        "de-graph": {"method": "de"},
        "graph": {},
        "de-streams-graph": {"method": "de", "strategy": "streams"},
        "streams-graph": {"strategy": "streams"},
        "lazy-graph": {"repulsion_every": 4},
    }
    calls, trainers = {}, {}
    for name in names:
        if name == "compiled-de":
            own = plain()
            calls[name] = by_itself(torch.compile(lambda own=own: plain_step(*own, x, y, False)))
        elif name.startswith("plain-") and name != "plain-layers":
            own, repels = plain(), name == "plain-forde"
            calls[name] = by_itself(lambda own=own, repels=repels: plain_step(*own, x, y, repels))
        else:
            own = ff.Ensemble(build, members).to(x.device)
            options[name] |= {"precision": precision, "cuda_graph": name in GRAPHS}
            trainers[name] = trainer = ff.Trainer(own, lr=0.01, **options[name])
            count = 4 if name in LAZY else 1
            calls[name] = lambda trainer=trainer, count=count: [trainer.step(x, y) for _ in range(count)]
            recorded = x.is_cuda and name in GRAPHS
            for _ in range(21 * count if recorded else 0):  # until every kind of step is recorded
                trainer.step(x, y)
    return calls, trainers


@torch.no_grad()
def forward_flop(model, x) -> int:
    """Of the products of one forward pass, per sample."""
    with FlopCounterMode(display=False) as counter:
        model(x[:2])
    return counter.get_total_flops() // 2


@functools.cache
def peak_flop(precision: str) -> float:
    """FLOP per second of a large matrix product on the GPU: the best of some."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    with products_in("tf32" if precision == "tf32" else "ieee"):
        return 2 * 8192**3 / min(seconds(lambda: a @ a, "cuda") for _ in range(9))


def peak_megabytes(call, device: str) -> float:
    """What one call needs beyond what is held before it."""
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = itertools.accumulate(e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(held, default=0) / 2**20


def parts(trainer, x, y, rounds: int) -> dict[str, float]:
    """Milliseconds of a FoRDE step's parts: forward, input gradient, repulsion with the log, second-order pass,
    optimiser; the fastest of some rounds."""
    ensemble, objective, found = trainer.ensemble, trainer.objective, {}

    def clock() -> float:
        if x.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def lap(name: str, begin: float) -> float:
        end = clock()
        found[name] = min(found.get(name, float("inf")), 1e3 * (end - begin))
        return end

    for _ in range(rounds):
        graphs = Graphs(
            ensemble, ensemble.flat, None, x, y, objective.loss, trainer._strategy, objective.method.space
        )
        at = clock()
        outputs = [member(x) for member in ensemble.members]
        at = lap("forward_ms", at)
        del outputs
        at = clock()
        _, particles = graphs.forward()
        at = lap("particles_ms", at)
        particles, result, cotangents, dead = core._repel(particles, objective, len(x))
        core._diagnose(particles, result, dead, objective.method)
        at = lap("repulsion_ms", at)
        g, _ = graphs.pull_back(cotangents.__getitem__)
        at = lap("pull_back_ms", at)
        with torch.no_grad():
            core.descend_(ensemble.flat, trainer.velocity, g, trainer.sgd)
        lap("optimizer_ms", at)
    return {name: round(ms, 3) for name, ms in found.items()}


def collected(path, key: str, times: dict[str, list[float]]) -> dict[str, list[float]]:
    """The seconds of earlier runs and of this one, which are kept in a JSON file."""
    earlier = json.loads(path.read_text()) if path.exists() else {}
    own = earlier.setdefault(key, {name: [] for name in times})
    for name, seconds_of in times.items():
        own[name] += seconds_of
    path.write_text(json.dumps(earlier))
    return own


def measure(case: str, names, given) -> list[dict]:
    model, width, members, batch, shape = CASES[case]
    x, y = torch.randn(batch, *shape, device=given.device), torch.randint(10, (batch,), device=given.device)
    names = [name for name in names if model != "resnet18" or name not in ("stacked", "auto")]  # all graphs at once
    calls, trainers = steps(lambda: models.make(model, 10, shape, width), members, x, y, names, given.precision)
    flop = forward_flop(models.make(model, 10, shape, width).to(given.device), x)
    times = interleaved(calls, given.rounds, given.device)
    if given.collect:
        times = collected(given.collect, f"{case}, {given.device}, {given.precision}: {', '.join(names)}", times)
    for name in LAZY:
        times[name] = [t / 4 for t in times.get(name, [])]
    times = {name: own for name, own in times.items() if own}
    de = [name for name in DE if name in times]
    floor = [2 * min(pair) for pair in zip(*(times[name] for name in de), strict=True)]
    rows = []
    for name in times:
        low, ms, high = (round(1e3 * t, 3) for t in quantiles(times[name]))
        row = {"provider": name, "model": model, "width": width, "M": members, "B": batch, "D": x[0].numel(),
               "precision": given.precision, "rounds": len(times[name]),
               "ms_20": low, "ms": ms, "ms_80": high}  # fmt: skip
        if name in GRAPHS and given.device == "cuda":  # memory that stays the graphs'
            row["peak_mb"] = math.nan
        else:
            row["peak_mb"] = round(peak_megabytes(calls[name], given.device), 1)
        if given.device == "cuda":
            plain = members == 1 or name in (*DE, "compiled-de")
            passes = 3 if plain else 3.75 if name in LAZY else 6
            row["of_peak"] = round(passes * flop * members * batch / row["ms"] * 1e3 / peak_flop(given.precision), 3)
        if floor:
            row["over_floor"] = round(ratio(times[name], floor), 3)
            row["over_de"] = round(2 * row["over_floor"], 3)
        if "plain-forde" in times:
            row["plain_forde_over"] = round(ratio(times["plain-forde"], times[name]), 3)
        if name in trainers:
            row["strategy"] = trainers[name].strategy_report
        if given.parts and name in ("forde", "stacked") and members > 1:
            row |= parts(trainers[name], x, y, min(given.rounds, 5))
        rows.append(row)
    return rows


def main() -> int:
    given = arguments()
    names = given.providers.split(",")
    for case in given.cases.split(","):
        rows = measure(case, names, given)
        for row in rows:
            print(f"{row['provider']:13} {case:15} M {row['M']:3} B {row['B']:4} {row['ms']:10.2f} ms "
                  f"{row['peak_mb']:8.0f} MB {row.get('over_de', float('nan')):6.2f} x a deep-ensemble step  "
                  f"plain FoRDE / this {row.get('plain_forde_over', float('nan')):5.2f}  "
                  f"{100 * row.get('of_peak', float('nan')):3.0f} % of peak  {row.get('strategy', '')}",
                  flush=True)  # fmt: skip
        print(append("step", rows, given.out))  # case by case: what is cut off leaves the others
    return 0


def arguments():
    import argparse
    from pathlib import Path

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}")
    parser.add_argument("--providers", help=f"default: {','.join(PROVIDERS)}, on a GPU {GRAPHS} too; also {OPTIONAL}")
    parser.add_argument("--precision", default=None, help="full, tf32 or bf16; default: bf16 on CUDA, else full")
    parser.add_argument("--collect", type=Path, metavar="FILE", help="go on with the rounds of earlier runs in it")
    parser.add_argument("--parts", action="store_true", help="the breakdown of a step")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV file")
    given = parser.parse_args()
    given.providers = given.providers or ",".join(PROVIDERS + (GRAPHS if given.device == "cuda" else ()))
    given.cases = given.cases or SHORT[given.device]
    given.precision = given.precision or ("bf16" if given.device == "cuda" else "full")
    for chosen, valid in ((given.cases, CASES), (given.providers, (*PROVIDERS, *OPTIONAL))):
        odd = [name for name in chosen.split(",") if name not in valid]
        if odd:
            parser.error(f"expected of {', '.join(valid)}, got {', '.join(odd)}")
    return given


if __name__ == "__main__":
    sys.exit(main())
