"""`forde-fast bench`: what is wrong gets no time, what has one says what it is compared with; rows, table, figure."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch

from forde_fast import benchmark, cli, timing
from forde_fast.benchmark import floors, providers
from forde_fast.benchmark.cases import SHAPES, TARGETS, Case, make_cases, make_lengthscale
from forde_fast.repulsion import available_backends, repulsion

FAST = "cpp" if available_backends()["cpp"] else "reference"


def bench_command(capsys, *arguments):
    status = cli.main(["bench", "--device", "cpu", "--rounds", "2", *map(str, arguments)])
    return status, capsys.readouterr().out


def load_report():
    path = Path(__file__).parents[1] / "bench" / "report.py"
    spec = importlib.util.spec_from_file_location("report", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_provider_has_a_time_or_a_reason(capsys):
    chosen = ["--shapes", "3x4x64", "--lengthscales", "identity,pca,rank5,cosine"]
    status, printed = bench_command(capsys, *chosen, "--providers", f"reference,{FAST},triton", "--json")
    rows = json.loads(printed)
    assert status == 0
    assert {row["lengthscale"] for row in rows} == {"identity", "pca", "rank5", "cosine"}
    for row in rows:
        if row["provider"] == "triton":
            assert row["left_out"]
            assert "ms" not in row
        else:
            assert 0 < row["ms_20"] <= row["ms"] <= row["ms_80"]
            assert min(row["floor_ms"], row["ratio"], row["bytes"], row["flop"], row["reference_over_this"]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", ["identity", "pca", "rank20"])
def test_the_check_finds_what_is_wrong(dtype, kind):
    particles = torch.randn(5, 4, 300).to(dtype)
    scale = make_lengthscale(Case((5, 4, 300), kind))
    right = repulsion(particles, scale)
    assert providers.check(right, particles, scale) == []
    for what in ("value", "bandwidth", "distances", "gradient"):
        wrong = getattr(right, what).clone()
        wrong.view(-1)[-1] += wrong.abs().max()
        assert what in " ".join(providers.check(right._replace(**{what: wrong}), particles, scale))
        wrong.view(-1)[-1] = math.nan
        assert what in " ".join(providers.check(right._replace(**{what: wrong}), particles, scale))


def test_what_is_wrong_gets_no_time(capsys, monkeypatch):
    def wrong(*arguments, **options):
        return repulsion(*arguments, **options)._replace(value=torch.tensor(1.0))

    monkeypatch.setattr(providers, "repulsion", wrong)
    monkeypatch.setattr(providers, "available_backends", lambda: {"cpp": True})
    monkeypatch.setattr(providers, "unusable", lambda name, case: "")
    if FAST != "cpp":
        pytest.skip("waits for the cpp backend")
    status, printed = bench_command(
        capsys, "--shapes", "3x4x64", "--lengthscales", "pca", "--providers", "cpp,reference"
    )
    assert status == 1
    assert "cpp       WRONG, not timed: value off by" in printed
    assert printed.count(" x floor") == 1


def test_a_backend_that_fails_is_wrong_and_one_that_refuses_is_left_out(monkeypatch):
    def fail(name, *_):
        raise RuntimeError("backend: not that" if name == "triton" else "no such thing\nat all")

    monkeypatch.setattr(benchmark, "make_provider", fail)
    monkeypatch.setattr(benchmark, "unusable", lambda name, case: "")
    (rows,) = benchmark.bench("3x4x64", "identity", "compiled,cpp,triton", device="cpu")
    assert rows[0]["left_out"] == "RuntimeError: no such thing"
    assert rows[1]["wrong"] == ["RuntimeError: no such thing"]
    assert rows[2]["left_out"] == "RuntimeError: backend: not that"


def test_plain_pytorch_differentiated_by_func_passes_the_check(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # the compiler itself takes its time
    particles, scale = torch.randn(4, 3, 64), make_lengthscale(Case((4, 3, 64), "rank16"))
    assert providers.check(providers.make_provider("compiled", particles, scale)(), particles, scale) == []


def test_what_does_not_fit_is_left_out(monkeypatch):
    monkeypatch.setattr(providers, "available", lambda device: 1000)
    monkeypatch.setattr(benchmark, "available", lambda device: 1000)
    rows = [row for case in benchmark.bench("3x4x64", "identity,pca", "reference", device="cpu") for row in case]
    assert "it holds [M, M, B, D] four times" in rows[0]["left_out"]
    assert "the basis would take" in rows[1]["left_out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "mnist"], "shapes: expected MxBxD with M > 1, or one of digits, "),
        (["--shapes", "1x2x3"], "shapes: "),
        (["--lengthscales", "sine"], "lengthscales: expected identity, pca, rankK or cosine, got 'sine'"),
        (["--shapes", "2x2x10", "--lengthscales", "cosine"], "lengthscales: expected cosine only with D of 64, 784"),
        (["--shapes", "2x2x10", "--lengthscales", "rank6"], "lengthscales: expected a rank from 1 to D / 2 = 5"),
        (["--providers", "numpy"], "providers: expected one of reference, compiled, cpp"),
        (["--rounds", "0"], "rounds: expected a whole number >= 1"),
        (["--precision", "tf32"], "precision: expected ieee on a CPU"),
    ],
)
def test_a_selection_that_is_none(capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        cli.main(["bench", "--device", "cpu", *arguments])
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize(
    ("name", "kind", "megabytes", "gigaflop"),
    [("cifar", "pca", 69, 24), ("cifar", "rank256", 53, 4), ("tinyimagenet", "pca", 730, 387),
     ("tinyimagenet", "rank256", 214, 16), ("imagenet", "rank256", 4933, 395), ("cifar", "identity", 31, 0),
     ("weights", "identity", 1341, 0)],
)  # fmt: skip
def test_bytes_and_flop(name, kind, megabytes, gigaflop):
    moved, products, pairs = floors.count(Case(SHAPES[name], kind, "cuda"))
    assert round(moved / 1e6) == megabytes
    assert round(products / 1e9) == gigaflop
    assert pairs == 45 * 8 * math.prod(SHAPES[name][1:])


def test_targets_are_cases_of_the_defaults():
    for device, kind, shape in TARGETS:
        names = [name for name in SHAPES if SHAPES[name] == shape]
        if device == "cpu":
            assert Case(shape, kind) in make_cases(benchmark.DEFAULT_SHAPES, None, "cpu", "float32", "ieee")
        else:
            assert names


def test_slow_calls_sit_rounds_out(monkeypatch):
    monkeypatch.setattr(timing, "seconds", lambda call, *_: call())
    times = timing.interleaved({"slow": lambda: 2.0, "fast": lambda: 0.5}, 8, "cpu", budget=3.0)
    assert times["fast"] == [0.5] * 7 + [pytest.approx(math.nan, nan_ok=True)]
    assert [t == t for t in times["slow"]] == [True] * 5 + [False] * 3
    assert timing.quantiles(times["slow"]) == (2.0, 2.0, 2.0)
    assert timing.ratio(times["slow"], times["fast"]) == 4.0


def test_rows_on_a_gpu(monkeypatch):
    """The path of a GPU with the device's own part replaced: capture, floors counted, both cache states."""
    rates = {"copy": 1e12, "ieee": 1e13, "tf32": 1e14, "bfloat16": 1e15}
    monkeypatch.setattr(floors, "peaks", lambda: rates)
    monkeypatch.setattr(benchmark, "interleaved", lambda calls, rounds, *_: {name: [2e-3] * rounds for name in calls})

    def capture(call):
        if call is None:
            raise RuntimeError("cannot be captured")
        return call

    monkeypatch.setattr(benchmark, "captured", capture)
    case = Case(SHAPES["cifar"], "pca", "cuda", precision="tf32")
    rows = benchmark._time(case, {"reference": None, "triton": lambda: 0}, None, None, 3, ("cold", "warm"))
    assert [(row["provider"], row["cache"], row["launch"]) for row in rows] == [
        ("reference", "cold", "eager"), ("triton", "cold", "graph"),
        ("reference", "warm", "eager"), ("triton", "warm", "graph"),
    ]  # fmt: skip
    products = 2 * 1280 * 3072**2 / 1e14
    assert rows[1]["floor"] == "products"
    assert rows[1]["floor_ms"] == pytest.approx(1e3 * products, rel=1e-3)
    assert rows[1]["ratio"] == pytest.approx(2e-3 / products, abs=1e-3)
    assert rows[1]["target"] == "1.5 x floor, reference / 5"
    assert rows[1]["met"] == "no: 1.5 x floor, reference / 5"
    assert "target" not in rows[3]
    assert "products in tf32" in benchmark.as_text(rows)


def test_rows_are_added_and_none_is_lost(tmp_path):
    first = timing.append("rows", [{"a": "1", "b": "x,y"}], tmp_path)
    before = timing.read(first)
    timing.append("rows", [{"a": "2", "c": "new"}], tmp_path)
    older, newer = timing.read(first)
    assert older == before[0] | {"c": ""}
    assert (newer["a"], newer["b"], newer["c"]) == ("2", "", "new")
    assert newer["torch"] == torch.__version__


def test_table_and_figure(tmp_path, capsys):
    bench_command(capsys, "--shapes", "3x4x64", "--providers", FAST, "--out", tmp_path)
    report, readme = load_report(), tmp_path / "README.md"
    (row, *_) = timing.read(tmp_path / "repulsion.csv")
    M, B, D = map(str, SHAPES["cifar"])
    for name, ms in (("cpp", "3.14159"), ("cpp", "2.71828"), ("reference", "1234.5")):
        sized = row | {"provider": name, "M": M, "B": B, "D": D, "ms": ms, "ratio": "1.567", "target": "2 x floor"}
        timing.append("repulsion", [sized | {"cpu": "one, 2 threads", "floor_ms": "1.5", "floor": "clone"}], tmp_path)
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(["--results", str(tmp_path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| 10 × 128 × 3,072 | identity | 1,234 | — | 2.72 | 1.50 (clone) | 1.57 | 2 |" in text
    assert "one, 2 threads; torch " in text
    assert (tmp_path / "repulsion_cpu.png").read_bytes()[:4] == b"\x89PNG"
    readme.write_text("no marks")
    with pytest.raises(ValueError, match="readme: expected one block"):
        report.main(["--results", str(tmp_path), "--readme", str(readme)])
    assert readme.read_text() == "no marks"
