"""The Triton kernel against the dense definition in float64, on the CPU under Triton's interpreter.

Triton chooses the interpreter when it is imported, and whatever imports it first decides for the whole process. So
outside of it this file is two tests: one compiles the kernel (for a GPU that need not be there), the other runs the
rest in a process of its own. To run one of these: ``TRITON_INTERPRET=1 python -m pytest tests/test_rows_triton.py -k
name``.
"""

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_the_target import TMKL, linear, linear_target_masked_kl, rows_torch, target_masked_kl
from mask_the_target.head import LogitTransform
from mask_the_target.rows_torch import Rows
from options import ALL_OPTIONS, name

triton = pytest.importorskip("triton")

from mask_the_target import rows_triton  # noqa: E402

_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

TRANSFORMS = [LogitTransform(), LogitTransform(0.3), LogitTransform(1.0, 4.0), LogitTransform(0.5, 3.0)]
SOME_OPTIONS = [
    TMKL(weight=0.7, exclude_base_above=0.15),
    TMKL(weight=0.7, mask_target=False),
    TMKL(weight=0.7, divergence="jsd", temperature=2.5, position_weight="non_target_mass"),
    TMKL(weight=0.7, divergence="reverse", renormalize=False),
]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
def test_outside_it_compiles_for_an_h100(
    options: TMKL, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The interpreter takes Python that the compiler refuses."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = rows_triton._row_kernel
    constants = {
        "DIVERGENCE": options.divergence,
        "MASKED": options.mask_target,
        "RENORMALIZED": options.renormalize,
        "BY_MASS": options.position_weight == "non_target_mass",
        "TEMPERED": options.temperature != 1,
        "CAPPED": dtype == "bf16",
        "BASE_CAPPED": False,
        "GRADIENT": True,
        "FULL_KL": True,
        "STATISTICS": True,
        "BLOCK": 1024,
    }
    types = {"labels": "*i64", "excluded_out": "*i1", "is_top1_out": "*i1", "vocabulary": "i32"}
    types |= dict.fromkeys(("x_a", "x_b", "gradient"), f"*{dtype}")
    types |= {argument: "*fp32" for argument in kernel.arg_names if argument.endswith("_out") and argument not in types}
    types |= {argument: "i64" for argument in kernel.arg_names if argument.startswith("stride_")}
    signature = {a: "constexpr" if a in constants else types.get(a, "fp32") for a in kernel.arg_names}
    places = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    source = triton.compiler.ASTSource(kernel, signature, places)
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert compiled.asm["cubin"]


def test_outside_it_the_rest_passes_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert int(run.stdout.rsplit(" passed", 1)[0].split()[-1]) > 100  # that they ran, and were not skipped


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rows_triton, "_LARGEST_BLOCK", 32)
    with np.errstate(all="ignore"):  # the interpreter is numpy: inf - inf in a branch that is not taken would warn
        yield


def _logits(n: int, v: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    x_a = 2 * torch.randn(n, v, generator=g)
    x_b = x_a + torch.randn(n, v, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    x_b[-1, labels[-1]] += 8.0  # a row that exclude_base_above leaves out
    return x_a, x_b, labels


def _transformed(x: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    x = x * transform.scale
    return x if transform.softcap is None else transform.softcap * torch.tanh(x / transform.softcap)


def _full_kl(z_a: torch.Tensor, z_b: torch.Tensor) -> torch.Tensor:
    log_p, log_q = z_b.log_softmax(-1), z_a.log_softmax(-1)
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _expected(
    x_a: torch.Tensor,
    x_b: torch.Tensor,
    labels: torch.Tensor,
    options: TMKL,
    transform: LogitTransform = LogitTransform(),
    base_transform: LogitTransform = LogitTransform(),
) -> tuple[Rows, torch.Tensor]:
    """The definition in float64, each row a batch of its own, and its gradient."""
    gradients, columns = [], []
    for x, b, y in zip(x_a.double(), x_b.double(), labels, strict=True):
        x = x.clone().requires_grad_()
        z_a, z_b = _transformed(x, transform), _transformed(b, base_transform)
        full = _full_kl(z_a, z_b)
        log_q = z_a.log_softmax(0)
        entropy = -torch.where(log_q.exp() > 0, log_q.exp() * log_q, 0).sum()
        if y < 0:
            loss = kl = full
            ce, excluded, is_top1 = torch.zeros_like(loss), torch.tensor(False), torch.tensor(False)
        else:
            result = target_masked_kl(z_a[None], z_b[None], y[None], options)
            loss, ce, kl, excluded = result.loss, result.ce, result.kl, result.excluded > 0
            is_top1 = z_a[y] == z_a.max()
        seen = x.detach() > -math.inf
        gradients.append(torch.where(seen, torch.autograd.grad(loss, x)[0], 0.0))
        columns.append([c.detach() for c in (loss, ce, kl, excluded, full, entropy, is_top1)])
    return Rows(*(torch.stack(column) for column in zip(*columns, strict=True))), torch.stack(gradients)


def _check(
    x_a: torch.Tensor,
    x_b: torch.Tensor,
    labels: torch.Tensor,
    options: TMKL,
    transform: LogitTransform = LogitTransform(),
    base_transform: LogitTransform = LogitTransform(),
    gradient: torch.Tensor | None = None,
    tolerance: float = 1e-5,
    floor: float = 1e-6,
) -> None:
    """``floor``: absolute, of a sum whose terms cancel to less than 0.1 nats."""
    expected, slope = _expected(x_a, x_b, labels, options, transform, base_transform)
    gradient = torch.full_like(x_a, math.nan, dtype=torch.float32) if gradient is None else gradient
    rows = rows_triton.compute_rows(
        x_a,
        x_b,
        labels,
        options,
        transform=transform,
        base_transform=base_transform,
        gradient=gradient,
        full_kl=True,
        token_statistics=True,
    )
    for field in ("loss", "ce", "kl", "full_kl", "entropy"):
        own, reference = getattr(rows, field), getattr(expected, field)
        assert own.dtype == torch.float32
        assert torch.allclose(own.double(), reference, rtol=1e-5, atol=floor), (field, own, reference)
    for field in ("excluded", "is_top1"):
        assert torch.equal(getattr(rows, field), getattr(expected, field)), field
    error = (gradient.double() - slope).norm(dim=1)
    assert (error <= tolerance * slope.norm(dim=1) + floor).all(), (gradient, slope)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_rows_equal_the_definition(options: TMKL) -> None:
    x_a, x_b, labels = _logits(3, 40)
    labels[1] = -1
    _check(x_a, x_b, labels, options)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
@pytest.mark.parametrize("base_transform", TRANSFORMS[::3], ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_transforms(options: TMKL, transform: LogitTransform, base_transform: LogitTransform) -> None:
    x_a, x_b, labels = _logits(3, 40)
    labels[1] = -7
    x_a[2, 3] = 40.0  # the soft cap is reached
    _check(x_a, x_b, labels, options, transform, base_transform)


@pytest.mark.parametrize("v", [2, 31, 32, 33, 300])
def test_vocabularies_that_do_and_do_not_fill_the_blocks(v: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x_a, x_b, labels = _logits(3, v)
    labels[1] = -1
    _check(x_a, x_b, labels, TMKL())
    monkeypatch.setattr(rows_triton, "_LARGEST_BLOCK", 8192)
    _check(x_a, x_b, labels, TMKL())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
def test_half_precision_inputs_cost_nothing_but_their_own_rounding(options: TMKL, dtype: torch.dtype) -> None:
    x_a, x_b, labels = _logits(3, 40)
    x_a, x_b = x_a.to(dtype), x_b.to(dtype)
    labels[0] = -1
    _check(x_a, x_b, labels, options)
    _check(x_a, x_b, labels, options, gradient=torch.empty_like(x_a), tolerance=torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
def test_the_gradient_may_replace_the_logits(options: TMKL, dtype: torch.dtype) -> None:
    x_a, x_b, labels = _logits(3, 70)
    x_a, x_b = x_a.to(dtype), x_b.to(dtype)
    labels[0] = -1
    apart, in_place = torch.empty_like(x_a), x_a.clone()
    rows = rows_triton.compute_rows(x_a, x_b, labels, options, gradient=apart, transform=LogitTransform(0.5, 5.0))
    same = rows_triton.compute_rows(
        in_place, x_b, labels, options, gradient=in_place, transform=LogitTransform(0.5, 5.0)
    )
    assert torch.equal(in_place, apart)
    assert torch.equal(same.loss, rows.loss)
    assert rows.full_kl is None
    assert rows.entropy is None
    assert rows.is_top1 is None


def test_rows_may_lie_apart_and_nothing_between_them_is_written() -> None:
    x_a, x_b, labels = _logits(3, 40)
    wide_a, wide_b, wide_gradient = torch.zeros(3, 55), torch.zeros(3, 47), torch.full((3, 61), 5.0)
    wide_a[:, 2:42], wide_b[:, :40] = x_a, x_b
    every_second = torch.zeros(6, dtype=torch.int64)
    every_second[::2] = labels
    gradient = wide_gradient[:, 7:47]
    _check(wide_a[:, 2:42], wide_b[:, :40], every_second[::2], TMKL(), gradient=gradient)
    assert (wide_gradient[:, :7] == 5).all()
    assert (wide_gradient[:, 47:] == 5).all()
    with pytest.raises(ValueError, match=r"x_b has strides \(1, 3\): the vocabulary must be its contiguous dimension"):
        rows_triton.compute_rows(x_a, x_b.t().contiguous().t(), labels, TMKL())


def test_no_rows() -> None:
    empty = torch.empty(0, 40)
    rows = rows_triton.compute_rows(
        empty, empty, torch.empty(0, dtype=torch.int64), TMKL(), gradient=empty, full_kl=True, token_statistics=True
    )
    assert all(len(column) == 0 for column in vars(rows).values())
    assert rows.excluded.dtype == torch.bool


def test_a_label_past_the_vocabulary_is_nan_and_reads_nothing() -> None:
    x_a, x_b, labels = _logits(3, 40)
    labels[1] = 40
    gradient = torch.empty_like(x_a)
    rows = rows_triton.compute_rows(x_a, x_b, labels, TMKL(), gradient=gradient)
    assert rows.loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


def test_float64_is_computed_in_float64() -> None:
    x_a, x_b, labels = _logits(3, 40)
    gradient = torch.empty_like(x_a, dtype=torch.float64)
    rows = rows_triton.compute_rows(x_a.double(), x_b.double(), labels, TMKL(), gradient=gradient)
    expected, slope = _expected(x_a, x_b, labels, TMKL())
    assert torch.allclose(rows.loss, expected.loss, rtol=1e-12)
    assert torch.allclose(gradient, slope, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
def test_impossible_tokens_are_as_in_the_definition(options: TMKL) -> None:
    x_a, x_b, labels = _logits(4, 40)
    for row in range(4):
        x_a[row, (labels[row] + 1) % 40] = x_b[row, (labels[row] + 1) % 40] = -math.inf
    x_b[1, (labels[1] + 2) % 40] = -math.inf if options.divergence == "forward" else x_b[1, (labels[1] + 2) % 40]
    labels[2] = -1
    _check(x_a, x_b, labels, options)


@pytest.mark.parametrize("options", ALL_OPTIONS[::2], ids=name)
def test_no_token_left_but_the_target(options: TMKL) -> None:
    x_a, x_b, labels = _logits(3, 40)
    everywhere = torch.arange(40) != labels[0]
    x_b[0, everywhere] = -math.inf  # the base's
    x_a[1, torch.arange(40) != labels[1]] = x_b[1, torch.arange(40) != labels[1]] = -math.inf  # both models'
    if options.divergence == "reverse" and not options.mask_target:
        x_b[0] = x_a[0]  # KL(adapted, base) would be infinite
    _check(x_a, x_b, labels, options)


def test_a_token_that_only_the_base_allows_costs_infinitely_much_and_has_a_finite_gradient() -> None:
    x_a, x_b, labels = _logits(2, 40)
    x_a[0, (labels[0] + 1) % 40] = -math.inf
    x_a[1, torch.arange(40) != labels[1]] = -math.inf
    gradient = torch.empty_like(x_a)
    rows = rows_triton.compute_rows(x_a, x_b, labels, TMKL(), gradient=gradient, full_kl=True)
    assert rows.kl.tolist() == [math.inf, math.inf]
    assert rows.full_kl.tolist() == [math.inf, math.inf]
    assert gradient.isfinite().all()


@pytest.mark.parametrize("options", [TMKL(), TMKL(mask_target=False), SOME_OPTIONS[2]], ids=name)
def test_small_numbers_keep_their_digits(options: TMKL) -> None:
    """CE and non-target mass of a certain target, and the KL of two models that hardly differ, at large logits."""
    x_a, _, labels = _logits(2, 40)
    x_b = x_a.clone()
    for row in range(2):
        x_a[row, labels[row]] = x_b[row, labels[row]] = 30.0
    x_a[:, ::2] += 0.01
    x_a, x_b = x_a + 100, x_b + 100
    expected, slope = _expected(x_a, x_b, labels, options)
    gradient = torch.empty_like(x_a)
    rows = rows_triton.compute_rows(x_a, x_b, labels, options, gradient=gradient)
    # log(1 + x) of what the non-targets have against the target: a log-softmax, in float64 too, is 1e-16 off, which is
    # 1e-5 of it.
    target = x_a.double().gather(1, labels[:, None]).squeeze(1)
    others = x_a.double().scatter(1, labels[:, None], -torch.inf).logsumexp(1)
    ce = torch.log1p((others - target).exp())
    assert (ce < 1e-9).all()
    assert torch.allclose(rows.ce.double(), ce, rtol=5e-6, atol=0)
    if options == TMKL():
        assert (expected.kl < 1e-4).all()
        assert torch.allclose(rows.kl.double(), expected.kl, rtol=0, atol=3e-7)
    if not options.mask_target or options.position_weight != "uniform":
        assert (expected.kl < 1e-10).all()
        assert torch.allclose(rows.kl.double(), expected.kl, rtol=0, atol=1e-15)
    error = (gradient.double() - slope).norm(dim=1)
    assert (error <= (3e-7 if options == TMKL() else 1e-4 * slope.norm(dim=1))).all()


_LOGIT = st.one_of(st.floats(-30, 30, width=32), st.sampled_from([-1e4, -88.5, 0.0, 88.5, 300.0]))


@settings(max_examples=30, deadline=None)
@given(data=st.data(), v=st.sampled_from([2, 3, 35]), options=st.sampled_from([TMKL(), *SOME_OPTIONS]))
def test_edge_rows(data: st.DataObject, v: int, options: TMKL) -> None:
    """Large and equal logits, and tokens that are impossible in both models (in one only: see the tests above)."""
    row = st.lists(_LOGIT, min_size=v, max_size=v)
    x_a, x_b = torch.tensor([data.draw(row), data.draw(row)])[:, None]
    y = data.draw(st.integers(-1, v - 1))
    possible = torch.tensor(data.draw(st.lists(st.booleans(), min_size=v, max_size=v).filter(any)))
    possible[y] = True
    x_a, x_b = x_a.where(possible, -math.inf), x_b.where(possible, -math.inf)
    # The KL is a sum of differences of logits: where one model's lie 276 above the other's, float32 rounds it to 3e-5.
    apart = (x_a - x_b)[:, possible].abs().max().item()
    _check(x_a, x_b, torch.tensor([y]), options, floor=1e-5 + torch.finfo(torch.float32).eps * apart)


@pytest.mark.parametrize("options", SOME_OPTIONS, ids=name)
def test_the_linear_form_computes_with_it(options: TMKL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "row_kernel", lambda device: rows_triton.compute_rows)
    monkeypatch.setattr(rows_torch, "compute_rows", None)  # so that nothing else can have computed it
    g = torch.Generator().manual_seed(0)
    hidden, base_hidden = torch.randn(5, 6, generator=g), torch.randn(5, 6, generator=g)
    weight, labels = torch.randn(40, 6, generator=g), torch.tensor([3, -100, 0, 39, 7])
    hidden.requires_grad_()
    result = linear_target_masked_kl(hidden, base_hidden, weight, labels, options, chunk_tokens=3)
    dense = target_masked_kl((hidden @ weight.t()).double(), (base_hidden @ weight.t()).double(), labels, options)
    assert float(result.loss.detach()) == pytest.approx(float(dense.loss.detach()), rel=1e-5)
    own, expected = (torch.autograd.grad(r.loss, hidden)[0] for r in (result, dense))
    assert float((own - expected).norm() / expected.norm()) <= 1e-5


# See above: each kind of process keeps its own tests.
for _name in [n for n in globals() if n.startswith("test_") and n.startswith("test_outside_it") == _INTERPRETED]:
    del globals()[_name]
