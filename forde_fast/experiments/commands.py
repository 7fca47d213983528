"""The subcommands reproduce, report and experiment."""

from __future__ import annotations

import functools
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path


def reproduce(command):
    """Tune and train every method of a table over seeds, score and compare them; called again, it goes on."""
    from forde_fast.experiments.tables import TABLES

    command.add_argument("table", help=f"one of {', '.join(TABLES)}")
    command.add_argument("--methods", metavar="NAME,...", help="de and others; default: the table's")
    command.add_argument("--seeds", type=int, help="default: the table's")
    command.add_argument("--members", type=int)
    command.add_argument("--epochs", type=int)
    command.add_argument("--train-size", type=int)
    command.add_argument("--test-size", type=int)
    command.add_argument("--data-dir", help="the data set's folder")
    command.add_argument("--device", default="auto")
    command.add_argument("--out", help="default: runs/TABLE")
    command.add_argument("--json", action="store_true", help="print the scores of all runs as JSON")

    def call(options) -> int:
        from forde_fast import cli
        from forde_fast.experiments.reproduce import Reproduction
        from forde_fast.experiments.summary import as_markdown
        from forde_fast.files import write
        from forde_fast.signals import Interrupted
        from forde_fast.validation import one_of

        say = functools.partial(print, file=sys.stderr, flush=True)

        def prepare():
            table = TABLES[one_of(options.table, "table", TABLES)]
            names = ("seeds", "members", "epochs", "train_size", "test_size")
            given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
            if options.methods:
                chosen = tuple(options.methods.split(","))
                given |= {"methods": chosen, "published": tuple(n for n in table.published if n in chosen)}
            folder = Path(options.out or f"runs/{options.table}")
            return Reproduction(replace(table, **given), folder, options.data_dir, options.device, say)

        work = cli._before_work(options, prepare)
        try:
            rows = work.run()
        except Interrupted as stop:
            name = signal.Signals(stop.number).name
            text = f"interrupted by {name}, all is kept; the same command goes on\n"
            options.parser.exit(128 + stop.number, text)
        text = as_markdown(rows, options.table)
        write(work.folder / "table.md", text.encode())
        print(json.dumps(rows, indent=1) if options.json else text)
        say(f"{work.done} runs done, {work.skipped} were there; {work.folder}/table.md")
        return 0

    return call
