"""`forde-fast bench` with its rows appended to bench/results/repulsion.csv: python bench/repulsion.py [--help]."""

import sys

from timing import RESULTS

from forde_fast import cli

if __name__ == "__main__":
    sys.exit(cli.main(["bench", "--out", str(RESULTS), *sys.argv[1:]]))
