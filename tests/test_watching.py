"""What a long piece of work shows of itself."""

import pytest
import torch
from trainer_cases import net

import forde_fast as ff
from forde_fast import watching


@pytest.mark.parametrize(("seconds", "lines"), [(-1, [1, 2, 3, 4, 5]), (1e9, [5])])
def test_lines_for_a_file_of_output(seconds, lines, monkeypatch, capsys):
    monkeypatch.setattr(watching, "PRINT_EVERY", seconds)
    assert list(watching.watched("abcde", "sets", 5)) == list("abcde")
    assert capsys.readouterr().err.splitlines() == [f"sets: {line} of 5" for line in lines]


def test_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    with watching.Bar("training", 4, done=2) as bar:
        bar.advance("loss 0.5")
        bar.advance()
    shown = capsys.readouterr().err
    assert "training" in shown
    assert "loss 0.5" in shown
    assert "of 4" not in shown


def test_the_last_line_of_progress_is_the_last_step(capsys):
    trainer = ff.Trainer(ff.Ensemble(net, 2))
    logs = []
    with watching.Progress(trainer, 3) as progress:
        trainer.fit([(torch.randn(6, 3, 2, 2), torch.randint(4, (6,)))] * 3, 1,
                    on_step=lambda epoch, log: (logs.append(log), progress(epoch, log)))  # fmt: skip
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("training: 3 of 3 ")
    assert last.endswith(f" members x images/s, loss {float(logs[-1].cross_entropy) / 2:.3f}")
