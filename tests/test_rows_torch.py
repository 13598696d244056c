"""One block of rows: compiled and eager against the dense definition in float64, and rows without a target."""

import warnings
from dataclasses import fields

import pytest
import torch
import torch._inductor.config

from mask_the_target import TMKL, rows_torch, target_masked_kl
from mask_the_target.head import LogitTransform
from mask_the_target.rows_torch import Rows, compute_rows

TRANSFORM = LogitTransform(0.7, 9.0)
COMPILED = [
    TMKL(weight=0.3, exclude_base_above=0.9),
    TMKL(mask_target=False),
    TMKL(divergence="jsd", temperature=2.0, position_weight="non_target_mass"),
    TMKL(divergence="reverse", renormalize=False),
]


@pytest.fixture
def compile_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_torch, "_COMPILE_FROM", 0)
    monkeypatch.setattr(rows_torch, "_no_compiler", False)


def _logits(n: int, v: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z_a = 4 * torch.randn(n, v, generator=g)
    z_b = z_a + torch.randn(n, v, generator=g)
    labels = torch.randint(0, v, (n,), generator=g)
    z_a[0, labels[0]], z_b[0, labels[0]] = 60.0, 55.0  # a certain target
    z_a[1, (labels[1] + 1) % v] = z_b[1, (labels[1] + 1) % v] = -torch.inf  # an impossible token
    return z_a, z_b, labels


def _expected(z_a: torch.Tensor, z_b: torch.Tensor, labels: torch.Tensor, options: TMKL) -> tuple[torch.Tensor, ...]:
    """Loss and gradient of each row: the definition in float64, each row a batch of its own."""
    losses, gradients = [], []
    for a, b, y in zip(z_a.double(), z_b.double(), labels, strict=True):
        a = a[None].requires_grad_()
        if y < 0:
            log_p, log_q = b[None].log_softmax(1), a.log_softmax(1)
            seen = b[None] > -torch.inf
            loss = (log_p.exp()[seen] * (log_p[seen] - log_q[seen])).sum()
        else:
            loss = target_masked_kl(a, b[None], y[None], options).loss
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, a)[0])
    return torch.stack(losses), torch.cat(gradients)


def _check(z_a: torch.Tensor, z_b: torch.Tensor, labels: torch.Tensor, options: TMKL) -> None:
    gradient = torch.empty_like(z_a)
    rows = compute_rows(z_a, z_b, labels, options, gradient=gradient, full_kl=True, token_statistics=True)
    loss, expected = _expected(z_a, z_b, labels, options)
    assert torch.allclose(rows.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert float((gradient.double() - expected).norm() / expected.norm()) <= 1e-5
    log_p, log_q = z_b.double().log_softmax(1), z_a.double().log_softmax(1)
    p = log_p.exp()
    assert torch.allclose(
        rows.full_kl.double(), torch.where(p > 0, p * (log_p - log_q), 0).sum(1), rtol=1e-4, atol=1e-5
    )
    q = log_q.exp()
    assert torch.allclose(rows.entropy.double(), -torch.where(q > 0, q * log_q, 0).sum(1), rtol=1e-4, atol=1e-5)
    assert torch.equal(rows.is_top1, z_a.argmax(1) == labels)


@pytest.mark.parametrize("options", COMPILED, ids=str)
@pytest.mark.parametrize("contexts", [False, True])
def test_rows_equal_the_definition(options: TMKL, contexts: bool) -> None:
    z_a, z_b, labels = _logits(7, 90)
    if contexts:
        labels[2], labels[5] = -1, -100
    _check(z_a, z_b, labels, options)


@pytest.mark.skipif(torch.__version__.startswith("2.8."), reason="torch 2.8 can't compile it and takes eager PyTorch")
@pytest.mark.parametrize("options", [COMPILED[0], COMPILED[2]], ids=str)  # each is seconds of compilation
def test_compiled_rows_equal_the_definition(options: TMKL, compile_all: None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # no compiler here would be a failure, not a fallback
        z_a, z_b, labels = _logits(7, 90)
        labels[2], labels[5] = -1, -100
        _check(z_a, z_b, labels, options)
    assert rows_torch._compiled_for


@pytest.mark.parametrize("compile_from", [0, 2**40], ids=["compiled", "eager"])
def test_the_gradient_may_replace_the_logits(
    compile_from: int, compile_all: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    z_a, z_b, labels = _logits(7, 90)
    gradient, in_place = torch.empty_like(z_a), z_a.clone()
    asked = {"full_kl": True, "token_statistics": True}
    monkeypatch.setattr(rows_torch, "_COMPILE_FROM", 2**40)
    expected = compute_rows(z_a, z_b, labels, TMKL(), gradient=gradient, **asked)
    monkeypatch.setattr(rows_torch, "_COMPILE_FROM", compile_from)
    rows = compute_rows(in_place, z_b, labels, TMKL(), gradient=in_place, **asked)
    assert torch.allclose(in_place, gradient, rtol=1e-5, atol=1e-7)
    for field in fields(Rows):  # none is of what stands there afterwards
        found, right = (getattr(each, field.name).double() for each in (rows, expected))
        assert torch.allclose(found, right, rtol=1e-5, atol=1e-5), field.name


@pytest.mark.parametrize("options", COMPILED, ids=str)
def test_a_row_without_target_is_the_full_kl_whatever_the_options(options: TMKL) -> None:
    z_a, z_b, labels = _logits(7, 90)
    labels[2], labels[5] = -1, -100
    rows = compute_rows(z_a, z_b, labels, options, full_kl=True)
    assert torch.equal(rows.ce[[2, 5]], torch.zeros(2))
    assert torch.equal(rows.kl[[2, 5]], rows.loss[[2, 5]])
    assert torch.equal(rows.kl[[2, 5]], rows.full_kl[[2, 5]])
    assert not rows.excluded[[2, 5]].any()


def test_the_gradient_goes_through_the_transform_and_may_be_narrower() -> None:
    x_a, x_b, labels = _logits(7, 90)
    x_a[1], x_b[1] = x_a[2], x_b[2]  # a soft cap makes -inf finite
    x = x_a.double().requires_grad_()
    z_a = TRANSFORM.softcap * torch.tanh(0.7 * x / TRANSFORM.softcap)
    loss = target_masked_kl(z_a, x_b.double() * 2, labels, TMKL()).loss * 7
    expected = torch.autograd.grad(loss, x)[0]
    gradient = torch.empty_like(x_a, dtype=torch.bfloat16)
    rows = compute_rows(
        x_a, x_b, labels, TMKL(), transform=TRANSFORM, base_transform=LogitTransform(2.0), gradient=gradient
    )
    assert float(rows.loss.sum()) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert float((gradient.double() - expected).norm() / expected.norm()) <= 4e-3  # half a unit of bfloat16
    assert torch.equal(x_a, _logits(7, 90)[0].index_copy(0, torch.tensor([1]), x_a[2:3]))  # left as it was


def test_without_a_compiler_eager_answers_after_one_warning(monkeypatch: pytest.MonkeyPatch, compile_all: None) -> None:
    monkeypatch.setattr(rows_torch, "_compiled", None)
    monkeypatch.setattr(rows_torch, "_compiled_for", set())
    torch._dynamo.reset()
    z_a, z_b, labels = _logits(7, 90)
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        with pytest.warns(UserWarning, match="at about half its speed.*install g\\+\\+") as caught:
            rows = compute_rows(z_a, z_b, labels, TMKL())
        again = compute_rows(z_a, z_b, labels, TMKL())
    torch._dynamo.reset()
    assert len([w for w in caught if "half its speed" in str(w.message)]) == 1
    loss, _ = _expected(z_a, z_b, labels, TMKL())
    assert torch.allclose(rows.loss.double(), loss, rtol=1e-5, atol=1e-5)
    assert torch.equal(rows.loss, again.loss)
