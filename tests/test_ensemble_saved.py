"""Ensembles taken away: exported, saved, and members that come from files."""

import pytest
import torch
from ensemble_cases import are_views, make, net
from torch import nn

import forde_fast as ff


def test_an_exported_ensemble_is_the_same_module(tmp_path):
    ensemble = make(3)
    ff.Trainer(ensemble).step(torch.randn(4, 6), torch.arange(4) % 3)
    ensemble.eval()
    samples = torch.export.Dim("samples", min=1, max=1024)
    program = torch.export.export(ensemble, (torch.randn(4, 6),), dynamic_shapes=({0: samples},))
    torch.export.save(program, tmp_path / "ensemble.pt2")
    again, x = torch.export.load(tmp_path / "ensemble.pt2").module(), torch.randn(9, 6)
    assert torch.allclose(again(x), ensemble(x))


def test_saved_files_are_read_by_plain_pytorch(tmp_path):
    from safetensors.torch import load_file

    ensemble, x = make(3), torch.randn(9, 6)
    ff.Trainer(ensemble).step(x, torch.arange(9) % 3)
    ff.save_ensemble(tmp_path / "all.safetensors", ensemble)
    ff.save_member(tmp_path / "one.safetensors", ensemble, 2)
    plain = net()
    plain.load_state_dict(load_file(tmp_path / "one.safetensors"))
    assert torch.allclose(plain.eval()(x), ensemble.eval().member(2)(x), atol=1e-6)  # trained in other layers
    plain = nn.Module()
    plain.members = nn.ModuleList(net() for _ in range(3))
    plain.load_state_dict(load_file(tmp_path / "all.safetensors"))
    again = make(3)
    ff.load_ensemble(tmp_path / "all.safetensors", again)
    for module in (again, plain):
        assert torch.allclose(torch.stack([m(x) for m in module.eval().members]), ensemble(x), atol=1e-6)
    assert are_views(again)
    with pytest.raises(IndexError, match=r"^index: expected a member from 0 to 2, got 3$"):
        ff.save_member(tmp_path / "x", ensemble, 3)
    with pytest.raises(IndexError, match=r"^index: expected a member from 0 to 2, got 'a'$"):
        ensemble.member("a")


def test_pretrained_members_keep_what_they_learnt(tmp_path):
    from safetensors.torch import load_file

    ff.save_member(tmp_path / "one.safetensors", make(2), 1)

    def pretrained():
        module = net()
        module.load_state_dict(load_file(tmp_path / "one.safetensors"))
        module[-1].reset_parameters()  # a new head, from the ensemble's seed
        return module

    ensemble = ff.Ensemble(pretrained, 3, seed=5)
    first = [module[0].weight for module in ensemble.members]
    assert all(torch.equal(weight, load_file(tmp_path / "one.safetensors")["0.weight"]) for weight in first)
    assert not torch.equal(ensemble.member(0)[-1].weight, ensemble.member(1)[-1].weight)
