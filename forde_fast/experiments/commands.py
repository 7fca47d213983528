"""The subcommands reproduce, report and experiment."""

from __future__ import annotations

import functools
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from forde_fast.devices import find_device
from forde_fast.experiments import registry
from forde_fast.experiments import report as page
from forde_fast.experiments.lab import SETTINGS, Lab
from forde_fast.experiments.reproduce import Reproduction
from forde_fast.experiments.summary import as_markdown
from forde_fast.experiments.tables import TABLES
from forde_fast.files import write
from forde_fast.signals import Interrupted
from forde_fast.validation import names_in, one_of


def reproduce(command):
    """Tune and train every method of a table over seeds, score and compare them; called again, it goes on."""
    command.add_argument("table", help=f"one of {', '.join(TABLES)}")
    command.add_argument("--methods", metavar="NAME,...", help="de and others; default: the table's")
    command.add_argument("--seeds", type=int, help="default: the table's")
    command.add_settings("members", "epochs", "train_size", "test_size", default="the table's")
    command.add_argument("--data-dir", help="the data set's folder")
    command.add_argument("--corrupted-dir", help="CIFAR-10-C's files, or others like them; default: copies made here")
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1; auto: a GPU where there is one")
    command.add_argument("--out", help="default: runs/TABLE")
    command.add_argument("--json", action="store_true", help="print the scores of all runs as JSON")

    def call(options) -> int:
        say = functools.partial(print, file=sys.stderr, flush=True)

        def prepare():
            table = TABLES[one_of(options.table, "table", TABLES)]
            names = ("seeds", "members", "epochs", "train_size", "test_size")
            given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
            if options.methods:
                chosen = names_in(options.methods)
                given |= {"methods": chosen, "published": tuple(n for n in table.published if n in chosen)}
            folder = Path(options.out or f"runs/{options.table}")
            data = options.data_dir, options.device
            return Reproduction(replace(table, **given), folder, *data, say, options.corrupted_dir)

        work = options.parser.checked(prepare)
        try:
            rows = work.run()
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            text = f"interrupted by {name}, all is kept; the same command goes on\n"
            options.parser.exit(128 + stop.number, text)
        except (OSError, ValueError, MemoryError) as error:  # a full disk, numbers no longer finite, ...
            options.parser.stop(f"{error}; all is kept; the same command goes on")
        text = as_markdown(rows, options.table)
        write(work.folder / "table.md", text.encode())
        print(json.dumps(rows, indent=1) if options.json else text)
        say(f"{work.done} runs done, {work.skipped} were there; {work.folder}/table.md")
        return 0

    return call


def report(command):
    """One page for finished runs: tables, figures; HTML in one file, Markdown and PNGs."""
    command.add_argument("runs", nargs="+", help="folders of runs, or that hold runs")
    command.add_argument("--out", help="default: report in the first of them")
    command.add_argument("--data-dir", help="the data set's folder, if it is another than in training")

    def call(options) -> int:
        out = Path(options.out or Path(options.runs[0]) / "report")
        print(options.parser.checked(lambda: page.report(options.runs, out, options.data_dir)))
        return 0

    return call


def experiment(command):
    """One experiment of the paper, as a page with tables and figures."""
    command.add_argument("name", help=f"one of {', '.join(registry.EXPERIMENTS)}")
    command.add_argument("--setting", default="small", help="small, paper or paper-cifar10; default: %(default)s")
    names = ("data", "image_size", "model", "width", "members", "epochs", "repulsion_weight")
    command.add_settings(*names, default="the setting's")
    command.add_argument("--seeds", type=int, help="trainings of each kind; default: the setting's")
    command.add_argument("--data-dir", help="folder or file of a data set that does not come with the package")
    command.add_argument("--device", default="auto", help="such as cpu, cuda, cuda:1; auto: a GPU where there is one")
    command.add_argument("--out", help="default: runs/experiments/NAME")

    def call(options) -> int:
        def prepare():
            one_of(options.name, "name", registry.EXPERIMENTS)
            setting = SETTINGS[one_of(options.setting, "setting", SETTINGS)]
            given = {name: getattr(options, name) for name in (*names, "seeds") if getattr(options, name) is not None}
            out = Path(options.out or f"runs/experiments/{options.name}")
            say = functools.partial(print, file=sys.stderr, flush=True)
            return Lab(replace(setting, **given), out, options.data_dir, find_device(options.device), say)

        lab = options.parser.checked(prepare)
        try:
            text = registry.run(options.name, lab)
        except (OSError, ValueError, MemoryError) as error:
            options.parser.stop(str(error))
        print(text)
        return 0

    return call
