"""The command line: forde-fast train | compare | reproduce | report | experiment | evaluate | predict | ..."""

from __future__ import annotations

import functools
import json
import os
import shlex
import signal
import sys
from collections.abc import Iterable
from pathlib import Path

from forde_fast import benchmark, distributed, plots, printing
from forde_fast.config import FIELDS, MOVABLE, TrainConfig, read, resumed
from forde_fast.data import load, read_unlabelled, write_corrupted
from forde_fast.data.corruptions import CORRUPTIONS, PRESETS
from forde_fast.data.datasets import DATASETS
from forde_fast.doctor import examine, read_log
from forde_fast.experiments import commands
from forde_fast.files import make_folder
from forde_fast.info import info
from forde_fast.methods import NAMES
from forde_fast.parsing import Parser, rank
from forde_fast.run import FILES, Run, open_run
from forde_fast.signals import Interrupted
from forde_fast.trained import load_run
from forde_fast.validation import NotFinite, expect, names_in, one_of, whole
from forde_fast.verify import HEAD, cells, verify
from forde_fast.watching import watched

SPLIT = ("train", "compare")  # over several processes
COMPARED = ("de", "forde-identity", "forde-pca", "forde-tuned")


def main(arguments: list[str] | None = None) -> int:
    try:
        try:
            return _called(arguments)
        finally:
            print(end="", flush=True)
    except BrokenPipeError:  # what reads the output has read enough; Python would flush the rest at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def _called(arguments: list[str] | None) -> int:
    parser = Parser(prog="forde-fast", description="First-order repulsive deep ensembles.")
    parser.add_argument("--version", action="version", version=f"forde-fast {printing.version()}")
    subparsers = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    for name, add in COMMANDS.items():
        command = subparsers.add_parser(name, help=add.__doc__, description=add.__doc__)
        command.set_defaults(call=add(command), parser=command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        options.parser.refuse(unknown)
    if distributed.launched() and options.command not in SPLIT:
        options.parser.error(f"{options.command}: expected one process, got {distributed.ranks()}")
    try:
        status = options.call(options)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    distributed.part()
    return status


def _train(command):
    """Train one ensemble and keep it in a folder."""
    _add_config(command, skip=())

    def call(options) -> int:
        run = options.parser.checked(lambda: _prepared(options, Run(_config(options, _settings(options)))))
        metrics = _train_run(options, run, f"forde-fast train --resume --out {shlex.quote(str(run.folder))}")
        return _show(options, {run.config.method: metrics}, f"Run and figures: {run.folder}")

    return call


def _compare(command):
    """Train several methods on the same data from the same seed, and set them side by side."""
    _add_config(command, skip=("method",))
    command.add_argument("--methods", metavar="NAME,...", help=f"default: {','.join(COMPARED)}")

    def call(options) -> int:
        def prepare():
            settings = _settings(options)
            folder = Path(settings.get("out", FIELDS["out"].default))
            _expect_run(options, settings, folder.glob("*/config.toml"), folder)
            held = [name for name in NAMES if (folder / name / "config.toml").is_file()]
            names = names_in(options.methods) if options.methods else (options.resume and held) or COMPARED
            expect(len(set(names)) == len(names), "methods", "each method once", options.methods)
            if options.resume and held:  # the others are trained as these
                settings = resumed(settings, folder / held[0])
            else:
                other = ", ".join(name for name in FILES if (folder / name).exists())
                expect(not other, "out", "a folder without a run", f"{folder}, which holds {other}", FileExistsError)
            own = [_config(options, {**settings, "method": name, "out": str(folder / name)}) for name in names]
            loaded = functools.cache(load)  # once for all
            read = [loaded(c.data, c.data_dir, c.download, c.image_size) for c in own]
            runs = [Run(config, data) for config, data in zip(own, read, strict=True)]
            return folder, [_prepared(options, run) for run in runs]

        folder, runs = options.parser.checked(prepare)
        for run in runs:  # so that --resume knows of all
            run.begin()
        results = {run.config.method: _train_run(options, run, "the same command with --resume") for run in runs}
        if not rank():
            plots.training({run.config.method: run.log() for run in runs}, folder / "training.png")
        _show(options, results, f"Runs and figures: {folder}")
        if "de" in results and len(results) > 1 and not options.json and not rank():
            printing.against(results)
        return 0

    return call


def _evaluate(command):
    """Score a trained run on clean and corrupted test images."""
    command.add_argument("run", help="the run's folder")
    other = "in place of what the run was trained with"
    command.add_argument("--data-dir", help=f"the data set's folder, {other}")
    command.add_argument("--corrupted-dir", help=f"a folder or .tar such as CIFAR-10-C, {other}")
    command.add_argument("--corruptions", metavar="NAME,...", help=f"such as fog,snow, or all, or none, {other}")
    command.add_argument("--ood", metavar="NAME,...", help="sets of unknown images, such as svhn, digits, noise")
    command.add_argument("--ood-dir", help="where such a set lies that does not come with the package")
    command.add_argument("--device", help="such as cpu, cuda:1; default: as it was trained on, if that is here")
    command.add_argument("--json", action="store_true", help="print all of it as JSON")

    def call(options) -> int:
        names = ("data_dir", "corrupted_dir", "corruptions", "ood", "ood_dir", "device")
        given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
        run = options.parser.checked(lambda: open_run(options.run, **given))
        print(printing.loaded(run), file=sys.stderr)
        try:
            metrics = run.evaluate()
        except (OSError, ValueError) as error:  # a file that is read only when its turn comes
            options.parser.stop(str(error))
        return _show(options, {run.config.method: metrics}, f"{run.folder} is as it was: --json prints all scores")

    return call


def _predict(command):
    """Classify images by a trained run, with the ensemble's uncertainty; its training data are not needed."""
    command.add_argument("run", help="the run's folder")
    command.add_argument("images", nargs="+", type=Path, help="image files, folders of them, .npy arrays [N, ...]")
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1; auto: a GPU where there is one")
    command.add_argument("--json", action="store_true", help="all probabilities, as JSON; else lines of a .csv file")

    def call(options) -> int:
        def work():
            trained = load_run(options.run, options.device)
            return trained, *read_unlabelled(options.images, trained.trained_on.shape, trained.config.image_size)

        trained, names, images = options.parser.checked(work)
        printing.predictions(names, trained.predict(images), trained.trained_on.classes, options.json)
        return 0

    return call


def _corrupt(command):
    """Write corrupted copies of a data set's test images in CIFAR-10-C's layout."""
    command.add_argument("--data", default="fashion-mini", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    command.add_argument("--data-dir", help="where a set lies that does not come with the package")
    command.add_argument("--download", action="store_true", help="fetch it where it has a public address")
    command.add_settings("image_size")
    command.add_argument("--out", required=True, type=Path, help="the folder, such as Fashion-MNIST-C")
    command.add_argument("--names", metavar="NAME,...", help=f"default: all, {', '.join(CORRUPTIONS)}")
    command.add_argument("--preset", default="cifar", help=f"one of {', '.join(PRESETS)}; default: %(default)s")
    command.add_argument("--test-size", type=int, help="only the first so many images")
    command.add_argument("--seed", type=int, default=0)

    def call(options) -> int:
        def work():
            one_of(options.data, "data", DATASETS)
            data = load(options.data, options.data_dir, options.download, options.image_size)
            expect(not data.table, "data", "images", "a table of features")
            if options.test_size is not None:
                whole(options.test_size, "test_size")
                most = len(data.test_images)
                expect(options.test_size <= most, "test_size", f"<= {most}", options.test_size)
            images, labels = (part[: options.test_size].numpy() for part in (data.test_images, data.test_labels))
            names = names_in(options.names) if options.names else CORRUPTIONS
            write_corrupted(options.out, images, labels, names, options.preset, options.seed, print)
            print(f"{options.out / 'labels.npy'}\nread them with: --corrupted-dir {shlex.quote(str(options.out))}")

        options.parser.checked(work)
        return 0

    return call


def _doctor(command):
    """Read a run's log and say what went wrong and what to change; fails if something did."""
    command.add_argument("run", help="the run's folder, finished or not")
    command.add_argument("--json", action="store_true")

    def call(options) -> int:
        found = options.parser.checked(lambda: examine(read_log(options.run)))
        if options.json:
            print(json.dumps([finding._asdict() for finding in found], indent=1))
        for name, seen, advice in () if options.json else found:
            print(f"{name}\n    seen: {seen}\n    change: {advice}")
        if not found and not options.json:
            print("nothing found: no sign of a known fault in this run's log")
        return 1 if found else 0

    return call


def _verify(command):
    """Compare every usable backend with the float64 oracle; fails if one is out of its budget."""
    command.add_argument("--json", action="store_true")

    def call(options) -> int:
        rows = verify(functools.partial(watched, title="verify"))
        if options.json:
            print(json.dumps(rows, indent=1))
            return 0 if all(row["within"] for row in rows) else 1
        for backend in dict.fromkeys(row["backend"] for row in rows if row["usable"]):
            title = f"{backend}: largest relative error of the gradient by the members' distance, and of the value"
            printing.table(title, HEAD, [cells(row) for row in rows if row["backend"] == backend])
        print("sets: two clusters   pair: two members 0.01 and 0.0001 apart   twins: two or more members the same")
        print("limit: the share used of 2 x plain PyTorch's error in the same precision + 8 eps (4 x in float64)")
        for row in rows:
            if not row["usable"]:
                print(f"{row['backend']} cannot run here: {row['reason']}")
            for beyond in row.get("beyond", ()):
                print(f"{row['backend']} {row['precision']} {row['lengthscale']}: {beyond}")
        return 0 if all(row["within"] for row in rows) else 1

    return call


def _bench(command):
    """Time the operation beside its floor and beside plain PyTorch, each verified first; fails if one is wrong."""
    shapes = ", ".join((*benchmark.SHAPES, *benchmark.GROUPS))
    where = benchmark.default_device()
    command.add_argument("--shapes", default=benchmark.DEFAULT_SHAPES, help=f"{shapes}, MxBxD; default: %(default)s")
    command.add_argument("--lengthscales", help="identity, pca, rankK, cosine; default: those that suit D")
    command.add_argument("--providers", default=",".join(benchmark.PROVIDERS), help="default: %(default)s")
    command.add_argument("--rounds", type=int, default=25, help="at most; default: %(default)s")
    command.add_argument("--device", default=where, choices=("cpu", "cuda"))
    command.add_argument("--dtype", default="float32", choices=benchmark.DTYPES)
    command.add_argument("--precision", choices=("ieee", "tf32"), help="of products; default: tf32 on a GPU")
    state = command.add_mutually_exclusive_group()
    for cache in ("cold", "warm"):
        text = f"on a GPU only with {cache} level-2 cache; default: both"
        state.add_argument(f"--{cache}", dest="cache", action="store_const", const=cache, help=text)
    command.add_argument("--out", type=Path, help="append the rows to repulsion.csv in this folder")
    command.add_argument("--json", action="store_true")

    def call(options) -> int:
        names = ("shapes", "lengthscales", "providers", "rounds", "device", "dtype", "precision", "cache")
        selection = {name: getattr(options, name) for name in names}
        measured = options.parser.checked(lambda: benchmark.bench(**selection))
        if options.out is not None:
            options.parser.checked(lambda: make_folder(options.out))
        rows = []
        for case in measured:
            rows += case
            if not options.json:
                print(benchmark.as_text(case), flush=True)
            benchmark.keep(case, options.out)
        if options.json:
            print(json.dumps(rows, indent=1))
        return 1 if any("wrong" in row for row in rows) else 0

    return call


def _info(command):
    """Say what is installed and which backends are usable, or why not."""
    command.add_argument("--json", action="store_true")

    def call(options) -> int:
        facts = info()
        if options.json:
            print(json.dumps(facts, indent=1))
        else:
            for name, value in facts.items():
                print(f"{name:<18} {value}")
        return 0

    return call


COMMANDS = {
    "train": _train,
    "compare": _compare,
    "reproduce": commands.reproduce,
    "report": commands.report,
    "experiment": commands.experiment,
    "evaluate": _evaluate,
    "predict": _predict,
    "corrupt": _corrupt,
    "doctor": _doctor,
    "verify": _verify,
    "bench": _bench,
    "info": _info,
}


def _add_config(command, skip) -> None:
    command.add_argument("config", nargs="?", help="a TOML file with any of the settings below")
    command.add_argument("--json", action="store_true", help="print the metrics as JSON")
    command.add_argument("--resume", action="store_true", help="go on with the run in --out, with its settings")
    command.add_settings(*(name for name in FIELDS if name not in skip))


def _settings(options) -> dict:
    """The TOML file's settings, with the flags over them."""
    settings = read(options.config) if options.config else {}
    flags = {name: getattr(options, name, None) for name in FIELDS}
    return {**settings, **{name: value for name, value in flags.items() if value is not None}}


def _expect_run(options, settings: dict, configs: Iterable[Path], folder: Path) -> None:
    """--resume with a folder alone goes on with what is there: in another folder it would train the default data."""
    goes_on = options.resume and not settings.keys() - {*MOVABLE}
    there = not goes_on or any(path.is_file() for path in configs)
    expect(there, "out", "the folder of a run that was begun", folder, FileNotFoundError)


def _config(options, settings: dict):
    """The run's, checked; where the command is to resume it, with the settings that it was begun with."""
    folder = Path(settings.get("out", FIELDS["out"].default))
    _expect_run(options, settings, [folder / "config.toml"], folder)
    options.resume |= int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0  # torchrun --max-restarts
    if options.resume:
        settings = resumed(settings, folder)
    return TrainConfig(**settings)


def _prepared(options, run):
    run.prepare(options.resume)
    return run


def _train_run(options, run, again: str) -> dict:
    """Train with a line of progress; what stops it is one line that says how to go on."""
    say = functools.partial(print, file=sys.stderr) if rank() == 0 else lambda text: None
    if run.finished:
        say(f"{run.folder}: this run is finished, there is nothing to resume")
        return run.train(resume=True)
    for path in run.damaged:
        say(f"{path}: damaged, its checksum is another; renamed to {path.name}.damaged, the one before it is used")
    if run.state is not None:
        say(f"{run.folder}: going on after step {run.state['steps']}")
    elif options.resume:
        say(f"{run.folder}: nothing was kept yet, starting at the beginning")
    say(printing.loaded(run))
    if run.config.method != "de":
        weight, strength = run.config.repulsion_weight, run.strength
        say(f"{run.config.method}: w = {weight:g}, w N/B = {strength:.0f} (published on CIFAR: 1, 391)")
    try:
        return run.train(options.resume, progress=True)
    except Interrupted as stop:
        distributed.part()
        name = signal.Signals(stop.number).name
        options.parser.exit(128 + stop.number, f"interrupted by {name}, all is kept; go on with: {again}\n")
    except OSError as error:
        options.parser.stop(f"{error}; go on with: {again}")
    except NotFinite as error:
        options.parser.stop(f"{error}; see: forde-fast doctor {run.folder}")
    except ValueError as error:
        options.parser.stop(f"{error}; go on with: {again}")
    except MemoryError as error:
        options.parser.stop(f"out of memory: {error}; {again} takes another --members-at-a-time")
    except RuntimeError as error:
        if not distributed.lost(error):
            raise
        options.parser.exit(1, f"{options.parser.prog}: another process ended; go on with: {again}\n")


def _show(options, results: dict[str, dict], end: str) -> int:
    if rank():
        return 0
    if options.json:
        print(json.dumps(results, indent=1))
    else:
        printing.scores(results)
        print(end)
    return 0


if __name__ == "__main__":
    sys.exit(main())
