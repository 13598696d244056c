"""The fused form against the dense definition, and what it must never make."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mask_the_target import TMKL, linear, linear_target_masked_kl, target_masked_kl
from mask_the_target.head import Head, LogitTransform
from options import ALL_OPTIONS, name

TRANSFORMS = [LogitTransform(), LogitTransform(0.3), LogitTransform(1.0, 4.0), LogitTransform(0.5, 3.0)]


def _transformed(logits: torch.Tensor, transform: LogitTransform) -> torch.Tensor:
    """Written out of place and apart from LogitTransform's own code."""
    logits = logits * transform.scale
    return logits if transform.softcap is None else transform.softcap * torch.tanh(logits / transform.softcap)


def _inputs(n: int, d: int, v: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, d, generator=g, dtype=torch.float64)
    labels = torch.randint(0, v, (n,), generator=g)
    labels[torch.rand(n, generator=g) < 0.3] = -100
    return {
        "hidden": hidden.to(dtype).requires_grad_(),
        "base_hidden": (hidden + 0.5 * torch.randn(n, d, generator=g, dtype=torch.float64)).to(dtype),
        "head_weight": torch.randn(v, d, generator=g, dtype=torch.float64).to(dtype),
        "head_bias": torch.randn(v, generator=g, dtype=torch.float64).to(dtype),
        "labels": labels,
    }


def _dense(x: dict[str, torch.Tensor], options: TMKL, transform: LogitTransform, **kwargs: Any) -> Any:
    logits = _transformed(x["hidden"] @ x["head_weight"].t() + x["head_bias"], transform)
    base = _transformed(x["base_hidden"] @ x["head_weight"].t() + x["head_bias"], transform).detach()
    return target_masked_kl(logits, base, x["labels"], options, **kwargs)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_equals_the_dense_definition(options: TMKL, transform: LogitTransform) -> None:
    x = _inputs(19, 6, 13)
    for key in ("head_weight", "head_bias"):
        x[key].requires_grad_()
    wanted = [x["hidden"], x["head_weight"], x["head_bias"]]
    expected = _dense(x, options, transform, num_items=23)
    result = linear_target_masked_kl(**x, options=options, logit_transform=transform, num_items=23, chunk_tokens=4)
    for field in ("loss", "ce", "kl"):
        assert float(getattr(result, field)) == pytest.approx(float(getattr(expected, field)), rel=1e-10, abs=1e-14)
    assert int(result.excluded) == int(expected.excluded)
    assert int(result.supervised) == int(expected.supervised)
    for a, b in zip(torch.autograd.grad(result.loss, wanted), torch.autograd.grad(expected.loss, wanted), strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-10


@settings(deadline=None, max_examples=60)
@given(
    n=st.integers(0, 9),
    v=st.integers(2, 17),
    chunk=st.one_of(st.none(), st.integers(1, 11)),
    options=st.sampled_from(ALL_OPTIONS),
    seed=st.integers(0, 999),
    digits=st.floats(-20, 8),
    strided=st.booleans(),
    hidden_tokens=st.booleans(),
)
def test_edge_rows_equal_the_dense_definition(
    n: int, v: int, chunk: int | None, options: TMKL, seed: int, digits: float, strided: bool, hidden_tokens: bool
) -> None:
    """Any size, chunk and stride; certain targets; vocabulary entries at -inf through the bias."""
    x = _inputs(n, 3, v, seed)
    bias = x["head_bias"]
    bias[0] += digits  # one token from impossible to certain, in both models
    if hidden_tokens and v > 4:
        bias[v // 2] = -math.inf
        x["labels"][x["labels"] == v // 2] = 0
    if strided:
        x["base_hidden"] = x["base_hidden"].repeat(1, 2)[:, 1:4]
        x["head_weight"] = x["head_weight"].t().contiguous().t()
    result = linear_target_masked_kl(**x, options=options, chunk_tokens=chunk)
    expected = _dense(x, options, LogitTransform())
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-10, abs=1e-13)
    (a,), (b,) = (torch.autograd.grad(r.loss, x["hidden"]) for r in (result, expected))
    assert torch.allclose(a, b, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_float32_and_bfloat16_inputs_against_float64_on_the_same_numbers(options: TMKL) -> None:
    for dtype, tolerance, gradient_tolerance in ((torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-5, 6e-3)):
        x = _inputs(33, 16, 101, seed=1, dtype=dtype)
        exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in x.items()}
        exact["hidden"].requires_grad_()
        result = linear_target_masked_kl(**x, options=options, chunk_tokens=8)
        expected = _dense(exact, options, LogitTransform())
        assert result.loss.dtype == torch.float32
        # bfloat16's logits and statistics are float32, so its values are as exact; its gradient is rounded to bfloat16.
        assert float(result.loss) == pytest.approx(float(expected.loss), rel=tolerance)
        assert float(result.kl) == pytest.approx(float(expected.kl), rel=3 * tolerance, abs=1e-6)
        result.loss.backward()
        expected.loss.backward()
        assert x["hidden"].grad.dtype == dtype
        error = (x["hidden"].grad.double() - exact["hidden"].grad).norm() / exact["hidden"].grad.norm()
        assert float(error) <= gradient_tolerance


def test_token_weights_weight_each_rows_ce_and_kl() -> None:
    x = _inputs(19, 6, 13)
    weights = torch.rand(19, dtype=torch.float64)
    expected = _dense(x, TMKL(), LogitTransform(), token_weights=weights, num_items=7)
    by_hand = torch.zeros((), dtype=torch.float64)
    for row in range(19):
        if x["labels"][row] != -100:
            one = {k: v[row : row + 1] if k in ("hidden", "base_hidden", "labels") else v for k, v in x.items()}
            by_hand += (weights[row] * _dense(one, TMKL(), LogitTransform()).loss / 7).detach()
    result = linear_target_masked_kl(**x, token_weights=weights, num_items=7, chunk_tokens=4)
    assert float(expected.loss.detach()) == pytest.approx(float(by_hand), rel=1e-12)
    assert float(result.loss.detach()) == pytest.approx(float(by_hand), rel=1e-12)
    assert float(result.kl) == pytest.approx(float(expected.kl), rel=1e-12)
    (a,), (b,) = (torch.autograd.grad(r.loss, x["hidden"]) for r in (result, expected))
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-14)
    x["head_weight"].requires_grad_()
    with pytest.raises(ValueError, match="weighted one by one, which needs a frozen head"):
        linear_target_masked_kl(**x, token_weights=weights).loss.backward()


def test_torch_compile_traces_through_without_a_graph_break() -> None:
    x = _inputs(19, 6, 13, dtype=torch.float32)

    def loss(**inputs: torch.Tensor) -> torch.Tensor:
        return linear_target_masked_kl(**(inputs | {"hidden": inputs["hidden"] * 2})).loss

    expected = loss(**x)
    (gradient,) = torch.autograd.grad(expected, x["hidden"])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(**x)
    assert torch.allclose(compiled, expected, rtol=1e-6)
    assert torch.allclose(torch.autograd.grad(compiled, x["hidden"])[0], gradient, rtol=1e-5, atol=1e-7)


def test_the_operator_keeps_its_contract() -> None:
    """Schema, fake tensors and autograd registration, by PyTorch's own checks."""
    x = _inputs(5, 4, 11, dtype=torch.float32)
    arguments = [x["hidden"], x["head_weight"], x["head_bias"], x["base_hidden"], None, None, x["labels"]]
    numbers = [1.0, None, 1.0, None, 0.7, "forward", True, True, "uniform", 1.0, None, 2, False, 0, 0, None]
    library.opcheck(linear._linear_rows, (*arguments, *numbers, True, True, True, True, False, False))


def test_rounded_logits_put_a_floor_under_a_small_kl() -> None:
    """Why the logits of bfloat16 inputs are float32: both are offered, and this is the difference."""
    g = torch.Generator().manual_seed(0)
    rows = 512  # of 64, the mean is 0.1% off by float32's rounding alone
    hidden = torch.randn(rows, 32, generator=g).bfloat16()
    x = {
        "hidden": hidden,
        "base_hidden": (hidden + 0.004 * torch.randn(rows, 32, generator=g)).bfloat16(),
        "head_weight": torch.randn(2000, 32, generator=g).bfloat16(),
        "labels": torch.randint(0, 2000, (rows,), generator=g),
    }
    exact = float(linear_target_masked_kl(**{k: v.double() if k != "labels" else v for k, v in x.items()}).kl)
    assert float(linear_target_masked_kl(**x).kl) == pytest.approx(exact, rel=1e-3)
    rounded = float(linear_target_masked_kl(**x, logits_dtype=torch.bfloat16).kl)
    assert rounded > 1.5 * exact
    with pytest.raises(ValueError, match=r"logits_dtype=torch.float16 doesn't go with hidden states in torch.bfloat16"):
        linear_target_masked_kl(**x, logits_dtype=torch.float16)


def test_autocast_does_not_round_the_logits() -> None:
    x = _inputs(9, 16, 101, dtype=torch.float32)
    expected = linear_target_masked_kl(**x).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear_target_masked_kl(**x).loss, expected)


class _Largest(TorchDispatchMode):
    """The largest tensor that any operation made, and every operand of a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[list[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.largest = max([self.largest, *(t.numel() for t in tree_leaves(out) if isinstance(t, torch.Tensor))])
        if "mm" in str(func) or "linear" in str(func):
            self.products.append([t.shape[0] for t in args if isinstance(t, torch.Tensor)])
        return out


def test_no_tensor_of_tokens_times_vocabulary_and_no_product_for_ignored_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_linear_rows", linear._linear_rows._init_fn)  # an operator's inside isn't dispatched
    n, d, v, chunk = 64, 8, 500, 10
    x = _inputs(n, d, v, dtype=torch.float32)
    supervised = int((x["labels"] != -100).sum())
    assert supervised < n
    with _Largest() as seen:
        linear_target_masked_kl(**x, chunk_tokens=chunk)
    assert seen.largest <= 2 * chunk * v  # a chunk's logits, adapted and base
    rows = [shapes[0] for shapes in seen.products]
    assert sum(rows) == 3 * supervised  # adapted logits, base logits, dX: nothing for ignored rows, no dW
    with _Largest() as dense:
        _dense(x, TMKL(), LogitTransform()).loss.backward()
    assert dense.largest == n * v  # the measure itself works


def test_frozen_head_gets_no_gradient_and_a_trainable_one_the_right_one() -> None:
    x = _inputs(11, 4, 7)
    linear_target_masked_kl(**x).loss.backward()
    assert x["head_weight"].grad is None
    x["head_weight"].requires_grad_()
    (a,) = torch.autograd.grad(linear_target_masked_kl(**x, chunk_tokens=3).loss * 2.5, x["head_weight"])
    (b,) = torch.autograd.grad(_dense(x, TMKL(), LogitTransform()).loss * 2.5, x["head_weight"])
    assert torch.allclose(a, b, rtol=1e-10)


def test_a_base_with_its_own_head() -> None:
    x = _inputs(15, 5, 12)
    g = torch.Generator().manual_seed(9)
    base_hidden = torch.randn(15, 3, generator=g, dtype=torch.float64)
    head = Head(torch.randn(12, 3, generator=g, dtype=torch.float64), None, LogitTransform(2.0, 5.0))
    base_logits = _transformed(base_hidden @ head.weight.t(), head.transform)
    logits = x["hidden"] @ x["head_weight"].t() + x["head_bias"]
    expected = target_masked_kl(logits, base_logits, x["labels"])
    x["base_hidden"] = base_hidden
    result = linear_target_masked_kl(**x, base_head=head, chunk_tokens=4)
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-12)


@pytest.mark.parametrize("labels", [[], [-100, -100]])
def test_without_supervised_rows_the_loss_is_a_differentiable_zero(labels: list[int]) -> None:
    hidden = torch.randn(len(labels), 3, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    result = linear_target_masked_kl(hidden, hidden.detach(), weight, torch.tensor(labels, dtype=torch.int64))
    result.loss.backward()
    assert float(result.loss) == 0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, "flatten batch and sequence first"),
        ({"base_hidden": torch.zeros(2, 4)}, "hidden [3, 4], base_hidden [2, 4] and labels [3]"),
        ({"head_weight": torch.zeros(7, 5)}, "head_weight [7, 5] must be [vocabulary, 4] to fit hidden [3, 4]"),
        ({"base_hidden": torch.zeros(3, 6)}, "to fit base_hidden [3, 6]"),
        ({"head_bias": torch.zeros(6)}, "the bias [6] must be [7]"),
        ({"labels": torch.tensor([0, 7, 1])}, "labels[1] = 7 lies outside the vocabulary of 7 tokens"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be at least 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    good = {
        "hidden": torch.zeros(3, 4),
        "base_hidden": torch.zeros(3, 4),
        "head_weight": torch.zeros(7, 4),
        "labels": torch.tensor([0, 1, 2]),
    }
    with pytest.raises(ValueError) as error:
        linear_target_masked_kl(**(good | changes))
    assert message in str(error.value)
