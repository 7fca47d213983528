"""The doctor: each fault is found in a run that really has it, and none in sound ones."""

import copy
import json

import pytest
import torch
from torch import nn

import forde_fast as ff
from forde_fast import cli
from forde_fast.doctor import examine, read_log
from forde_fast.watching import JSONLines

DIGITS = ff.data.load("digits")
NORMALISE = ff.data.Normalisation.fit(DIGITS.train_images)
IMAGES, LABELS = NORMALISE(DIGITS.train_images[:512]), DIGITS.train_labels[:512]
SCALE = ff.PCA.fit(IMAGES)


pytestmark = pytest.mark.usefixtures("one_thread")


def network():
    return ff.models.mlp(10, (1, 8, 8), hidden=(32,))


def copies():
    """Members that are nearly one and the same, as fine-tuned from one pretrained network."""
    torch.manual_seed(0)
    first = network()
    modules = [copy.deepcopy(first) for _ in range(4)]
    with torch.no_grad():
        for module in modules:
            for p in module.parameters():
                p.add_(1e-3 * p.abs().mean() * torch.randn_like(p))
    return ff.Ensemble.from_modules(modules)


class Dying(nn.Module):
    """Half of the inputs activate nothing in the hidden layer, so that nothing reaches them."""

    def __init__(self):
        super().__init__()
        self.hidden, self.head = nn.Linear(64, 8), nn.Linear(8, 10)
        nn.init.constant_(self.hidden.bias, -1.5)

    def forward(self, x):
        return self.head(self.hidden(x.flatten(1)).relu())


def train(folder, ensemble=None, images=IMAGES, lengthscale=SCALE, bandwidth="median", batch=64, epochs=6, **options):
    """A real run's log, through its file."""
    ensemble = ensemble or ff.Ensemble(network, 4)
    method = ff.Method(ff.InputGradients(), bandwidth=bandwidth)
    trainer = ff.Trainer(ensemble, method, lengthscale, **{"repulsion_weight": 10.0, **options})
    with JSONLines(folder / "log.jsonl", trainer) as log:
        trainer.fit(ff.data.Loader(images, LABELS[: len(images)], batch), epochs, on_step=log)
    return read_log(folder)


def normalised_inside(layer):
    return ff.Ensemble(lambda: nn.Sequential(layer(), network()), 4)


class Constant(nn.Module):
    """The usual first layer that takes pixels from 0 to 255."""

    def forward(self, x):
        return (x / 255 - NORMALISE.mean[0]) / NORMALISE.std[0]


FAULTS = {
    "diverged": lambda d: train(d, lr=30.0, epochs=1),  # a step that is not finite would have stopped it
    "members collapse": lambda d: train(d, copies(), bandwidth=1e6, lr=0.01),
    "kernel values all alike": lambda d: train(d, bandwidth=1e4),
    "kernel values all but one zero": lambda d: train(d, bandwidth=1e-4),
    "medians unstable": lambda d: train(d, images=IMAGES[:128], batch=2, epochs=1, lr=0.01),
    "repulsion too weak": lambda d: train(d, repulsion_weight=1e-3),
    "repulsion dominates": lambda d: train(d, repulsion_weight=1e6, lr=0.01),
    "dead rows": lambda d: train(d, ff.Ensemble(Dying, 4), lr=0.01),
    "the network normalises its input inside": lambda d: train(d, normalised_inside(lambda: nn.InstanceNorm2d(1))),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_run_with_the_fault_is_told_so(name, tmp_path):
    found = {finding.name: finding for finding in examine(FAULTS[name](tmp_path))}
    assert name in found, list(found)
    assert found[name].seen
    assert found[name].advice


def test_a_basis_of_other_images_is_seen_too(tmp_path):
    log = train(tmp_path, normalised_inside(Constant), images=DIGITS.train_images[:512, None].float())
    (finding,) = examine(log)
    assert finding.name == "the network normalises its input inside"
    assert "of the variance that the lengthscale was fitted on" in finding.seen


SOUND = {
    "pca": {},
    "identity": {"lengthscale": None},
    "tuned": {"lengthscale": SCALE.blend(0.4)},
    "small batches": {"batch": 16, "epochs": 3, "lr": 0.02},
    "two members": {"ensemble": lambda: ff.Ensemble(network, 2)},
    "convolutions": {"ensemble": lambda: ff.Ensemble(lambda: ff.models.cnn(width=8), 3)},
    "adam": {"optimizer": lambda parameters: torch.optim.Adam(parameters, lr=1e-3)},
}


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_run_is_left_alone(name, tmp_path):
    options = dict(SOUND[name])
    if "ensemble" in options:
        options["ensemble"] = options["ensemble"]()
    assert examine(train(tmp_path, **options)) == []


def test_a_loss_that_was_0_from_the_start(tmp_path):
    log = [{**record, "cross_entropy": 0.0, "gradient_ratio": 0.0, "rows": 0} for record in train(tmp_path)]
    assert examine(log) == []


def test_a_deep_ensemble_has_nothing_to_examine(tmp_path):
    log = train(tmp_path, ff.Ensemble(network, 1))
    assert set(log[0]) == {"step", "epoch", "rows", "cross_entropy"}
    assert examine(log) == []


def test_the_command(tmp_path, capsys):
    train(tmp_path, bandwidth=1e4)
    assert cli.main(["doctor", str(tmp_path)]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "kernel values all alike"
    assert said[1].startswith("    seen: mean kernel between members ")
    assert said[2].startswith("    change: bandwidth 'median', or ")
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)[0]["name"] == "kernel values all alike"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "run: expected the folder of a run, with its log.jsonl"),
        ("", "log: expected at least one step, got none"),
        ("GIF89a\n{}\n", "line 1: expected a step of a run, got 'GIF89a'"),
        ('{"a": 1}\n', "line 1: expected a step of a run"),
    ],
)
def test_what_is_no_log_is_named(content, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "log.jsonl").write_text(content)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", str(tmp_path)])
    error = capsys.readouterr().err
    assert (stop.value.code, error.count("\n")) == (2, 1)
    assert message in error


def test_a_log_that_is_being_written_is_read_to_its_last_whole_line(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "cross_entropy": 1.0}\n{"step": 2, "cro')
    assert len(read_log(tmp_path)) == 1
