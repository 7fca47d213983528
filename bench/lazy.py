"""What cheaper repulsion saves and what it changes: scores on clean and corrupted images, and the time of a step.

    python bench/lazy.py train [--seeds 0,1,2,3,4] [--test-size 500] [--out FOLDER]    # rows of FOLDER/lazy.csv
    python bench/lazy.py time [--cases mlp,resnet18] [--rounds 9] [--out FOLDER]    # rows of FOLDER/lazy_step.csv
    python bench/lazy.py table [--out FOLDER] [--page FILE]    # both, between the two marks of FILE

The runs are those of `forde-fast train` with its defaults (fashion-mini, a perceptron, 5 members, 20 epochs, w = 20).
All settings of a seed begin with the same members and see the same batches, so that their differences to the exact
repulsion are taken seed by seed. The table takes the rows of the commit that ran last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import torch
from report import rewrite
from timing import RESULTS, append, interleaved, quantiles, ratio

import forde_fast as ff
from forde_fast import models
from forde_fast.config import TrainConfig
from forde_fast.data import corrupt
from forde_fast.evaluation import score, score_corrupted
from forde_fast.run import CORRUPTIONS, Run
from forde_fast.timing import read

PAGE = Path(__file__).parents[1] / "docs" / "cheaper_repulsion.md"
SETTINGS = {  # (every, share of the batch)
    "exact": (1, 1.0),
    "every 2nd step": (2, 1.0),
    "every 4th step": (4, 1.0),
    "half of the batch": (1, 0.5),
    "a quarter of the batch": (1, 0.25),
    "deep ensemble": None,
}
CASES = {  # model, width, members, batch, input
    "mlp": ("mlp", 128, 5, 128, (1, 28, 28)),
    "resnet18": ("resnet18", 16, 2, 64, (3, 32, 32)),  # with BatchNorm
}
GROUPS = {"clean": "clean", "cifar": "corrupted", "grey": "corrupted, grey preset"}
METRICS = ("accuracy", "nll", "ece")


def train(seeds: list[int], test_size: int, out: Path) -> None:
    made = None
    for seed in seeds:
        rows = []
        for name, setting in SETTINGS.items():
            config = TrainConfig(
                method="forde-pca" if setting else "de", seed=seed, test_size=test_size, device="cpu"
            )
            run = Run(config)
            if made is None:
                made = {preset: corrupted(run.test_images, run.test_labels, preset) for preset in ("cifar", "grey")}
            trainer, loader = run._trainer_and_loader()
            if setting:
                every, share = setting
                trainer.objective = replace(
                    trainer.objective, repulsion_every=every, repulsion_samples=round(share * loader.batch_size)
                )
            trainer.fit(loader, config.epochs)
            scores = {"clean": score(run.predict(run.test_images).mean(0), run.test_labels)}
            scores |= {preset: score_corrupted(run.predict, images) for preset, images in made.items()}
            row = {"setting": name, "seed": seed, "test_size": test_size}
            row |= {f"{group}_{metric}": scores[group][metric] for group in GROUPS for metric in METRICS}
            print(*(f"{value:.4f}" if isinstance(value, float) else value for value in row.values()), flush=True)
            rows.append(row)
        append("lazy", rows, out)


def corrupted(images, labels, preset: str) -> list[tuple]:
    """As `evaluate_corruptions` makes them for every run: here once."""
    levels = [(name, severity) for name in CORRUPTIONS for severity in range(1, 6)]
    return [(name, severity, corrupt(images, name, severity, preset=preset), labels) for name, severity in levels]


def measure(case: str, rounds: int, out: Path) -> None:
    model, width, members, batch, shape = CASES[case]
    x, y = torch.randn(batch, *shape), torch.randint(10, (batch,))
    calls = {}
    for name, setting in SETTINGS.items():
        ensemble = ff.Ensemble(lambda: models.make(model, 10, shape, width), members)
        every, share = setting or (1, 1.0)
        trainer = ff.Trainer(ensemble, "forde" if setting else "de", lr=0.01, repulsion_every=every,
                             repulsion_samples=round(share * batch))  # fmt: skip
        calls[name] = lambda trainer=trainer, every=every: [trainer.step(x, y) for _ in range(every)]
    times = interleaved(calls, rounds, "cpu")
    times = {name: [t / (SETTINGS[name] or (1,))[0] for t in own] for name, own in times.items()}
    rows = []
    for name, own in times.items():
        row = {"case": case, "setting": name, "ms": round(1e3 * quantiles(own)[1], 3)}
        row |= {"over_exact": round(ratio(own, times["exact"]), 3)}
        row |= {"over_de": round(ratio(own, times["deep ensemble"]), 3), "rounds": rounds}
        print(*row.values(), flush=True)
        rows.append(row)
    append("lazy_step", rows, out)


def table(out: Path) -> str:
    """Markdown: the time of a step, then each metric with its difference to exact and that difference's error."""
    steps, runs = (of_last_commit(read(out / f"{name}.csv")) for name in ("lazy_step", "lazy"))
    lines = [measured_on(steps), "", "| step of | " + " | ".join(SETTINGS) + " |", "|---|" + "---|" * len(SETTINGS)]
    for case, (model, width, members, batch, _) in CASES.items():
        own = {row["setting"]: row for row in steps if row["case"] == case}
        for base, key in (("exact", "over_exact"), ("deep ensemble", "over_de")):
            cells = [f"{float(own[name][key]):.2f}" if name in own else "—" for name in SETTINGS]
            sizes = f"{model}, width {width}, M = {members}, B = {batch}"
            lines.append(f"| {sizes}: time / {base} | " + " | ".join(cells) + " |")
    seeds = len({row["seed"] for row in runs})
    head = "| images | repulsion | accuracy | − exact | NLL | − exact | ECE | − exact |"
    lines += ["", f"{measured_on(runs)[:-1]}; {seeds} seeds, {runs[0]['test_size']} test images:", ""]
    lines += [head, "|---|---|" + "---|" * 6]
    ran = {row["setting"] for row in runs}
    for group, title in GROUPS.items():
        for name in (name for name in SETTINGS if name in ran):
            cells = []
            for metric in METRICS:
                column = f"{group}_{metric}"
                own, exact = (
                    {row["seed"]: float(row[column]) for row in runs if row["setting"] == which}
                    for which in (name, "exact")
                )
                cells += [f"{statistics.mean(own.values()):.4f}", paired([own[seed] - exact[seed] for seed in own])]
            lines.append(f"| {title} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def paired(differences: list[float]) -> str:
    """Mean ± standard error."""
    if not any(differences):
        return ""
    if len(differences) < 2:
        return f"{differences[0]:+.4f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{statistics.mean(differences):+.4f} ± {error:.4f}"


def of_last_commit(rows: list[dict]) -> list[dict]:
    return [row for row in rows if row["commit"] == rows[-1]["commit"]]


def measured_on(rows: list[dict]) -> str:
    last = rows[-1]
    return f"{last['cpu']}; torch {last['torch']}; commit {last['commit']}; {last['time'][:10]}:"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "time", "table"))
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--test-size", type=int, default=500)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV files")
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if given.what == "train":
        train([int(seed) for seed in given.seeds.split(",")], given.test_size, given.out)
    elif given.what == "time":
        for case in given.cases.split(","):
            measure(case, given.rounds, given.out)
    else:
        rewrite(given.page, table(given.out), "<!-- table by bench/lazy.py -->")
    return 0


if __name__ == "__main__":
    sys.exit(main())
