"""What only a GPU can show of the Triton backend: nothing waits for the device, and all of it fits a CUDA graph."""

import pytest
import torch
from forde_fast.kernels import repulsion, tiles

import forde_fast as ff
from forde_fast.testing import make_pca

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.fixture(params=["identity", "pca", "low rank"])
def scale(request):
    return {"identity": None, "pca": make_pca(300), "low rank": make_pca(300, 20, 0.01)}[request.param]


@pytest.fixture(params=["median", 0.3, ff.Median(over="sample")], ids=str)
def call(request, scale):
    def operation(particles):
        return ff.repulsion(particles, scale, bandwidth=request.param, backend="triton")

    operation(torch.randn(10, 8, 300, device="cuda"))  # compiles the kernels and copies the lengthscale
    return operation


def test_nothing_waits_for_the_device(call):
    particles = torch.randn(10, 8, 300, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        call(particles)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph(call):
    particles = torch.randn(10, 8, 300, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call(particles)
    for _ in range(2):
        particles.copy_(torch.randn_like(particles))
        graph.replay()
        for part, same in zip(result, call(particles), strict=True):
            torch.testing.assert_close(part, same, rtol=1e-3, atol=1e-5)


def test_cuda_graph_of_guessed_norms(monkeypatch):
    """Whether a guess was too bad is decided on the device, anew at every replay."""
    particles = torch.zeros(10, 1, 2_000_002, device="cuda")
    assert repulsion._passes_once(particles)

    def call():
        return repulsion.pair_distances(particles, None, None, True, 1e-24)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    generator = torch.Generator("cuda").manual_seed(0)
    base = torch.randn(particles.shape[1:], generator=generator, device="cuda")
    first = torch.arange(tiles.PIECES) * (particles.shape[2] - tiles.PIECE) // (tiles.PIECES - 1)
    sampled = (first[:, None] + torch.arange(tiles.PIECE)).flatten().cuda()
    misled = torch.linspace(1e-2, 1, 10, device="cuda")[:, None, None]
    for mislead in (False, True, False):
        particles.copy_(base + 1e-2 * torch.randn(particles.shape, generator=generator, device="cuda"))
        if mislead:
            particles[:, :, sampled] *= misled
        graph.replay()
        with monkeypatch.context() as patch:
            patch.setattr(tiles, "MANY_BYTES", 2**60)
            # alignments hold the rounding of the norms
            for got, want, atol in zip(results, call(), (0, 1e-6, 0), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=atol)
                assert not mislead or torch.equal(got, want)
