"""What holds for every input: hypothesis draws shapes, dtypes, strides, options and degenerate particles.

HYPOTHESIS_PROFILE=thorough runs thousands of cases, the default a few hundred (profiles in conftest.py).
"""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import forde_fast as ff
from forde_fast import reference
from forde_fast.testing import LENGTHSCALES, budget, make_lengthscale

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
FAST = [name for name, usable in ff.available_backends().items() if usable and name != "reference"]
ON_CPU = [name for name in FAST if name == "cpp" or not torch.cuda.is_available()]
QUICK = [name for name in ON_CPU if name == "cpp"]  # Triton's interpreter takes a second a call

pytestmark = pytest.mark.skipif(not QUICK, reason="waits for the C++ backend")


def layout(dense, kind):
    """The same numbers, laid out otherwise."""
    members, groups, size = dense.shape
    if kind == "every other":
        wide = torch.full((members, groups, 2 * size), math.nan, dtype=dense.dtype)
        wide[..., ::2] = dense
        return wide[..., ::2]
    if kind == "permuted":
        return dense.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    if kind == "padded":
        wide = torch.full((members, groups + 1, size + 3), math.nan, dtype=dense.dtype)
        wide[:, 1:, 2 : 2 + size] = dense
        return wide[:, 1:, 2 : 2 + size]
    return dense


LAYOUTS = ("dense", "every other", "permuted", "padded")
SIZES = (1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 100, 255, 257, 300)
FAULTS = ("none", "none", "none", "zeros", "all alike", "twins", "dead row", "one hot", "near twins",
          "scaled twins")  # fmt: skip


def degrade(x, fault):
    """Degenerate particles of the named kind, in place."""
    if fault == "zeros":
        x.zero_()
    elif fault == "all alike":
        x[:] = x[:1].clone()
    elif fault == "twins":
        x[-1] = x[0]
    elif fault == "scaled twins":  # more than half of them
        for n in range(1, len(x) // 2 + 1):
            x[n] = 2 * x[n - 1]
    elif fault == "near twins":
        x[-1] = x[0] * (1 + 1e-3 * torch.linspace(-1, 1, x.shape[2], dtype=x.dtype))
    elif fault == "dead row":
        x[0, 0] = 0
    elif fault == "one hot":
        x[..., 1:] = 0
    return x


def numbers(draw, *shape):
    """Normal numbers of a seed: hypothesis chooses all that is structure."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**20))), dtype=F64)


@st.composite
def particles(draw, dtypes=(F32, F64, BF16), most=12, sizes=SIZES, scales=(1.0, 1e-12, 1e12)):
    """Particles [M, G, D]."""
    shape = draw(st.integers(1, most)), draw(st.integers(1, 9)), draw(st.sampled_from(sizes))
    x = numbers(draw, 1, *shape[1:]) + draw(st.sampled_from([1.0, 1e-1, 1e-2])) * numbers(draw, *shape)
    x = degrade(x, draw(st.sampled_from(FAULTS))) * draw(st.sampled_from(scales))
    return layout(x.to(draw(st.sampled_from(dtypes))), draw(st.sampled_from(LAYOUTS)))


def lengthscales(size):
    """Of every kind, blended or not."""
    blends = [(1.0, "arithmetic"), (0.4, "arithmetic"), (0.4, "harmonic"), (0.0, "arithmetic")]
    drawn = st.tuples(st.sampled_from(LENGTHSCALES), st.sampled_from(blends))
    return drawn.map(lambda kind_and_blend: make_lengthscale(kind_and_blend[0], size).blend(*kind_and_blend[1]))


RULES = st.one_of(
    st.just("median"),
    st.builds(
        ff.Median,
        over=st.sampled_from(["particle", "sample", "batch"]),
        owner=st.sampled_from(["second", "first"]),
        add_one=st.booleans(),
        squared=st.booleans(),
    ),
    st.sampled_from([1e-3, 0.3, 50.0]),
    st.just("tensor"),
)


@st.composite
def problems(draw, **options):
    """All that the operation takes: (particles, lengthscale, keyword arguments)."""
    x = draw(particles(**options))
    normalize = draw(st.booleans())
    if not normalize:
        x = x.clamp(-100, 100)  # their squares are weighed by up to 100
    keywords = {"normalize": normalize, "eps": draw(st.sampled_from([1e-24, 1e-12, 1e-3]))}
    if draw(st.booleans()):
        others = x.double().mean(0) + numbers(draw, draw(st.integers(1, 5)), *x.shape[1:])
        keywords["others"] = layout(others.to(x.dtype), draw(st.sampled_from(LAYOUTS)))
    rule = draw(RULES)
    if isinstance(rule, str) and rule == "tensor":
        rule = 0.1 + numbers(draw, len(keywords.get("others", x)), x.shape[1]).abs()
    return x, draw(lengthscales(x.shape[2])), keywords | {"bandwidth": rule}


def cast(keywords, dtype):
    return {name: value.to(dtype) if isinstance(value, torch.Tensor) else value for name, value in keywords.items()}


def natural_sizes(exact, x, scale, keywords):
    """What each part would be without cancellation: rounding errors are measured by it where the part vanishes."""
    x, others = x.double(), keywords.get("others", x).double()
    norm = (x.square().sum(-1) + keywords["eps"]).sqrt() if keywords["normalize"] else torch.ones_like(x[..., 0])
    if keywords["normalize"]:
        x, others = (reference.normalise(rows, keywords["eps"]) for rows in (x, others))
    pull = (
        scale.product((x[:, None] - others[None]).flatten(0, 2)).view(len(x), len(others), *x.shape[1:]).norm(dim=-1)
    )
    h = reference.bandwidth_of(exact.distances, keywords["bandwidth"])
    c = reference.weights(exact.distances, h) / h * (2 / x.shape[1])
    gradient = ((c * pull).sum(1) / norm).norm()
    return {"value": len(x) / x.shape[1], "gradient": gradient, "bandwidth": exact.bandwidth.norm(), "distances": 0}


def check(backend, x, scale, keywords):
    """Finite, of the right dtypes and shapes, and right.

    One draw's rounding errors are luck, so that the budget of `testing` alone does not judge it: besides, the
    result may be off by 32 eps of what it is made of, and by what 32 eps of every particle's norm, added to it (and
    that share of a given bandwidth), does to the exact result.
    """
    narrow = F64 if x.dtype == F64 else F32
    result = ff.repulsion(x, scale, backend=backend, **keywords)
    exact = reference.repulsion(x.double(), scale, **cast(keywords, F64))
    plain = reference.repulsion(x.to(narrow), scale, **cast(keywords, narrow))
    sizes = natural_sizes(exact, x, scale, keywords)
    moved, step, h = [], 32 * torch.finfo(narrow).eps, keywords["bandwidth"]
    wider = {} if isinstance(h, str | ff.Median) else {"bandwidth": h * (1 + step)}
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.nn.functional.normalize(torch.randn(x.shape, generator=generator, dtype=F64), dim=-1)
        near = x.double() + step * noise * x.double().norm(dim=-1, keepdim=True)
        moved.append(reference.repulsion(near, scale, **cast(keywords | wider, F64)))
    for index, name in enumerate(result._fields):
        got, wanted = result[index], exact[index]
        assert torch.isfinite(got).all(), name
        assert got.shape == wanted.shape, name
        assert got.dtype == (x.dtype if name == "gradient" else narrow), name
        size = max(float(wanted.norm()), float(sizes[name]), 1e-300)
        off, plainly, *by_steps = (
            float((part[index].double() - wanted).norm()) / size for part in (result, plain, *moved)
        )
        allowed = budget(plainly, x.dtype, name == "gradient", wide=True) + step + max(by_steps)
        assert off <= allowed, f"{name}: off by {off:.1e}, plain {plainly:.1e}, allowed {allowed:.1e}"
    return result


@given(problems())
def test_any_problem_is_right(problem):
    check("cpp", *problem)


@settings(max_examples=settings.default.max_examples // 20)  # a second a call
@given(problems(most=4, sizes=(1, 7, 40)))
@pytest.mark.skipif("triton" not in ON_CPU, reason="needs TRITON_INTERPRET=1")
def test_any_small_problem_is_right_in_triton(problem):
    check("triton", *problem)


@given(particles(), st.sampled_from(LENGTHSCALES))
def test_alike_particles_do_not_repel(x, kind):
    alike = x[:1].expand(len(x), -1, -1)
    for rows in (alike, alike.contiguous()):
        result = ff.repulsion(rows, make_lengthscale(kind, x.shape[2]), backend="cpp")
        assert (result.gradient == 0).all()
        assert (result.distances == 0).all()
        value = len(x) * math.log(len(x)) / x.shape[1]  # every kernel value is 1
        assert float(result.value) == pytest.approx(value, rel=1e-6)


EXACT = {"dtypes": (F64,), "scales": (1.0,)}


def same(got, wanted, scale=1.0):
    """Equal but for rounding in float64 that near particles magnify."""
    return float((got - wanted).norm()) <= 1e-7 * max(float(wanted.norm()), scale)


@given(particles(**EXACT), st.sampled_from(LENGTHSCALES), st.randoms(use_true_random=False))
def test_symmetries(x, kind, random):
    """Members and samples have no order, gradients no length, and R has no direction along them."""
    scale = make_lengthscale(kind, x.shape[2])
    assume(len(x) > 1)
    result = ff.repulsion(x, scale, backend="cpp")
    assume(float(result.bandwidth.min()) > 1e-9)  # else 1 / h magnifies the rounding
    alive = x.norm(dim=-1, keepdim=True) > 0
    members, samples = ([*range(size)] for size in x.shape[:2])
    random.shuffle(members)
    random.shuffle(samples)
    permuted = ff.repulsion(x[members][:, samples], scale, backend="cpp")
    assert same(permuted.value, result.value)
    assert same(permuted.gradient * alive[members][:, samples], (result.gradient * alive)[members][:, samples])
    factor = random.choice([1e-3, 0.5, 7.0, 1e6])
    scaled = ff.repulsion(factor * x, scale, backend="cpp")
    assert same(scaled.value, result.value)
    assert same(factor * scaled.gradient * alive, result.gradient * alive)
    along = (result.gradient * x).sum(-1)
    assert (along.abs() <= 1e-9 * (result.gradient.norm(dim=-1) * x.norm(dim=-1)).clamp_min(1)).all()


@given(particles(**EXACT, sizes=(2, 7, 16, 33, 100)), st.sampled_from(["identity", "pca", "pca low rank"]))
def test_rotating_data_and_lengthscale_together_changes_nothing(x, kind):
    scale, size = make_lengthscale(kind, x.shape[2]), x.shape[2]
    turn = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=F64))[0]
    turned = ff.PCA(turn.T @ scale.eigenvectors, scale.eigenvalues, scale.tail) if kind != "identity" else scale
    result, rotated = ff.repulsion(x, scale, backend="cpp"), ff.repulsion(x @ turn, turned, backend="cpp")
    assume(float(result.bandwidth.min()) > 1e-9)
    alive = x.norm(dim=-1, keepdim=True) > 0
    assert same(rotated.value, result.value)
    assert same(rotated.gradient * alive, result.gradient @ turn * alive)


def with_a_bad_number(x, bad, position):
    x = x.clone(memory_format=torch.contiguous_format)
    x.view(-1)[position % x.numel()] = bad
    return x


BAD = {
    "NaN or infinity": lambda x, n: {"particles": with_a_bad_number(x, [math.nan, math.inf, -math.inf][n % 3], n)},
    "NaN in others": lambda x, n: {"others": with_a_bad_number(x, math.nan, n)},
    "dimensions": lambda x, n: {"particles": [x[0], x[None], x[0, 0], x[..., :0], x[:0]][n % 5]},
    "dtype": lambda x, n: {"particles": x.to([torch.int64, torch.float16, torch.bool, torch.complex64][n % 4])},
    "no tensor": lambda x, n: {"particles": [x.tolist(), None, 1.0, x.float().numpy()][n % 4]},
    "D of the lengthscale": lambda x, n: {"lengthscale": make_lengthscale("pca", x.shape[2] + 1 + n % 9)},
    "others": lambda x, n: {
        "others": [x[:, :, :0], x[0], torch.cat([x, x], 2), torch.cat([x, x], 1), x.half()][n % 5]
    },
    "eps": lambda x, n: {"eps": [0.0, -1.0, math.nan, math.inf, "small", None][n % 6]},
    "bandwidth": lambda x, n: {
        "bandwidth": [0.0, -1.0, math.nan, "mean", None, -torch.ones(1), torch.ones(len(x) + 1, x.shape[1] + 1)][
            n % 7
        ]
    },
    "backend": lambda x, n: {"backend": ["cuda:0", None, 3, "CPP"][n % 4]},
}


@given(particles(scales=(1.0,)), st.sampled_from(sorted(BAD)), st.integers(0, 10**6))
@pytest.mark.parametrize("backend", ["reference", *QUICK])
def test_bad_input_is_one_line_that_names_it(backend, x, fault, n):
    arguments = {"particles": x, "backend": backend} | BAD[fault](x, n)
    with pytest.raises((TypeError, ValueError), match=r"^\w+: expected [^\n]+, got [^\n]*$"):
        ff.repulsion(**arguments)
