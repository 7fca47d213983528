"""Times the published FoRDE training step (github.com/AaltoPML/FoRDE, JAX and Haiku) and ours in turn.

    python bench/official_jax.py --checkout PATH [--members 2 --batch 16 --width 64 --rounds 3]
                                 [--precision tf32,bf16] [--out FOLDER]

PATH is a checkout of that repository; none of its code is kept here. Its training program runs as it is, up to its
last timed step: this script stands in for sacred (its settings), for its data sets (random images, so that no
torchvision is needed), and puts a clock around `jax.pmap`. Ours takes its turn between two of its steps. It needs
jax, dm-haiku and optax. Rows go to FOLDER/step.csv. A network of width 64 is the published one; else its layers'
channels are scaled. Without eigenvectors (`data_pca_path`), both compare in the identity's lengthscale.

On a GPU, JAX's products of float32 are in tf32, and our steps are CUDA graphs, in every `--precision` (two).
On a CPU the initialisation and the step compile for minutes; JAX_COMPILATION_CACHE_DIR keeps that for the next call.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import sys
import tempfile
import time
import types
from pathlib import Path

import torch
from timing import RESULTS, append, quantiles, ratio

import forde_fast as ff
from forde_fast import models

FILES = ("train_forde.py", "optimizers.py", "checkpointer.py", "models/resnet.py")
WARM_UP = 2  # steps, the first of which compiles


class EnoughSteps(Exception):
    pass


class Experiment:
    """What of sacred's Experiment the training program uses: settings, filled into functions by their names."""

    def __init__(self, name: str):
        self.observers, self.settings, self.main = [], {}, None

    def config(self, function):
        def see(frame, event, _):
            if event == "return" and frame.f_code is function.__code__:
                self.settings.update(frame.f_locals)

        sys.setprofile(see)  # settings are the function's local variables
        try:
            function()
        finally:
            sys.setprofile(None)

    def capture(self, function):
        names = list(inspect.signature(function).parameters)

        def call(*values, **given):
            missing = [name for name in names[len(values) :] if name not in given]
            return function(*values, **given, **{name: self.settings[name] for name in missing})

        return call

    def automain(self, function):
        self.main = self.capture(function)


class Batches:
    """Its training set: random images in PyTorch's layout; between two steps, `aside` is called."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor, steps: int, aside):
        self.batch, self.steps, self.aside, self.dataset = (x, y), steps, aside, range(len(x))

    def __len__(self) -> int:
        return self.steps

    def __iter__(self):
        for _ in range(self.steps):
            yield self.batch
            self.aside()
        raise EnoughSteps  # it goes on to evaluate itself


def clocked(pmap, times: list[float]):
    """jax.pmap, whose functions note how long each call takes until its results are there."""
    import jax

    def clocked_pmap(function, **options):
        parallel = pmap(function, **options)

        def call(*arguments):
            jax.block_until_ready(arguments)
            start = time.perf_counter()
            results = jax.block_until_ready(parallel(*arguments))
            times.append(time.perf_counter() - start)
            return results

        return call

    return clocked_pmap


def device_put_on_one(jax) -> None:
    """Newer versions of jax lack the two functions that lay arrays on devices; on one device, they add an axis."""
    first = jax.local_devices()[0]

    def sharded(parts, devices):
        return jax.device_put(jax.numpy.stack(parts), first)

    def replicated(tree, devices):
        return jax.tree_util.tree_map(lambda array: jax.device_put(array[None], first), tree)

    for name, function in (("device_put_sharded", sharded), ("device_put_replicated", replicated)):
        if not hasattr(jax, name):
            setattr(jax, name, function)


def stand_in(name: str, **contents) -> None:
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(contents)


def official_step(checkout: Path, members: int, width: int, x, y, rounds: int, aside) -> list[float]:
    """Seconds of each step of the checkout's own training program, those of the warm-up too."""
    import jax

    stand_in("sacred", Experiment=Experiment)
    stand_in("sacred.observers", FileStorageObserver=lambda folder: None, RunObserver=object)
    loaders = Batches(x, y, WARM_UP + rounds, aside), Batches(x, y, 0, aside)  # training, test
    stand_in("datasets", get_data_loader=lambda *_, **__: loaders, get_corrupt_data_loader=None)
    sys.path.insert(0, str(checkout))
    device_put_on_one(jax)
    program = importlib.import_module("train_forde")
    residual = program.models.ResNet
    sizes = dict(residual.CONFIGS[18], channels_per_group=tuple(width * 2**i for i in range(4)))

    def chosen(num_classes, **options):
        return residual(num_classes=num_classes, initial_conv_config={"output_channels": width}, **sizes, **options)

    program.models.Chosen = chosen
    times, pmap = [], jax.pmap
    with tempfile.TemporaryDirectory() as folder:  # its log
        program.ex.settings |= {"model_name": "Chosen", "num_classes": 10, "input_size": (32, 32, 3),
                                "n_members": members, "batch_size": len(x), "validation": False, "init_lr": 0.01,
                                "_run": types.SimpleNamespace(_id=folder), "_log": program.logging.getLogger("jax")
                                }  # fmt: skip
        jax.pmap = clocked(pmap, times)
        try:
            program.ex.main()
        except EnoughSteps:
            pass
        finally:
            jax.pmap = pmap
            program.logging.shutdown()
    return times


def main() -> int:
    given = arguments()
    import jax

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    x, y = torch.randn(given.batch, 3, 32, 32), torch.randint(10, (given.batch,))
    ours = x.to(device), y.to(device)
    trainers = {name: make_trainer(given, name, device, ours) for name in given.precision.split(",")}
    own = {name: [] for name in trainers}

    def step() -> None:
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.step(*ours)
            if device == "cuda":
                torch.cuda.synchronize()
            own[name].append(time.perf_counter() - start)

    official = official_step(given.checkout, given.members, given.width, x, y, given.rounds, step)[WARM_UP:]
    rows = []
    for name, seconds in {"": official, **{name: times[WARM_UP:] for name, times in own.items()}}.items():
        low, ms, high = (round(1e3 * t, 3) for t in quantiles(seconds))
        rows.append({"provider": "forde" if name else "official jax", "model": "resnet18", "width": given.width,
                     "M": given.members, "B": given.batch, "D": x[0].numel(), "precision": name or default(device),
                     "ms_20": low, "ms": ms, "ms_80": high, "official_over": round(ratio(official, seconds), 3),
                     "jax": jax.__version__})  # fmt: skip
        print(
            "{provider:13} {precision:5} {ms:10.1f} ms   official JAX / this {official_over:7.2f}   jax {jax}".format(
                **rows[-1]
            )
        )
    print(append("step", rows, given.out))
    return 0


def default(device: str) -> str:
    return "tf32" if device == "cuda" else "full"


def make_trainer(given, precision: str, device: str, batch) -> ff.Trainer:
    ensemble = ff.Ensemble(lambda: models.make("resnet18", 10, (3, 32, 32), given.width), given.members).to(device)
    trainer = ff.Trainer(ensemble, lr=0.01, precision=precision)
    for _ in range(21 if device == "cuda" else 0):  # until every kind of step is recorded
        trainer.step(*batch)
    return trainer


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True, help="the folder of the published repository")
    for name, default in (("members", 2), ("batch", 16), ("width", 64), ("rounds", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", help="of our steps; default: tf32,bf16 on a GPU, else full")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the CSV file")
    given = parser.parse_args()
    lacking = [name for name in FILES if not (given.checkout / name).is_file()]
    if lacking:
        parser.error(f"checkout: expected one of AaltoPML/FoRDE, got {given.checkout}, without {', '.join(lacking)}")
    lacking = [name for name in ("jax", "haiku", "optax") if importlib.util.find_spec(name) is None]
    if lacking:
        parser.error(f"expected jax, dm-haiku and optax installed, got none of the name {', '.join(lacking)}")
    given.precision = given.precision or ("tf32,bf16" if torch.cuda.is_available() else "full")
    return given


if __name__ == "__main__":
    sys.exit(main())
