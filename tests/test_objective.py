"""The definition against finite differences, a loop over plain probabilities, and DKD's own NCKD."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mask_the_target import TMKL, target_masked_kl
from options import ALL_OPTIONS, name

N, V = 6, 9


def _rows(seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(N, V, generator=generator, dtype=dtype) * 2
    base = logits + torch.randn(N, V, generator=generator, dtype=dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2] = -100
    return logits, base, labels


def _by_hand(logits: torch.Tensor, base: torch.Tensor, labels: torch.Tensor, o: TMKL) -> tuple[float, float, int]:
    """ce, kl and excluded from probabilities, one token at a time: the paper's formulas, no code of ours."""
    ce = kl = 0.0
    excluded = count = 0
    for row, label in enumerate(labels.tolist()):
        if label == -100:
            continue
        count += 1
        z_a, z_b = logits[row].tolist(), base[row].tolist()
        soft = lambda z, t: [math.exp(v / t) / sum(math.exp(w / t) for w in z) for v in z]  # noqa: E731
        ce -= math.log(soft(z_a, 1.0)[label])
        target_mass = soft(z_b, 1.0)[label]
        if o.exclude_base_above is not None and target_mass > o.exclude_base_above:
            excluded += 1
            continue
        p_a, p_b = soft(z_a, o.temperature), soft(z_b, o.temperature)
        compared = [c for c in range(V) if c != label or not o.mask_target]
        if o.mask_target and o.renormalize:
            p_a = [p / (1 - p_a[label]) for p in p_a]
            p_b = [p / (1 - p_b[label]) for p in p_b]
        value = 0.0
        for c in compared:
            a, b = p_a[c], p_b[c]
            middle = (a + b) / 2
            value += {
                "forward": b * math.log(b / a),
                "reverse": a * math.log(a / b),
                "jsd": (b * math.log(b / middle) + a * math.log(a / middle)) / 2,
            }[o.divergence]
        value *= o.temperature**2
        kl += value * (1 - target_mass if o.position_weight == "non_target_mass" else 1.0)
    return ce / count, kl / count, excluded


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_equals_the_formulas_by_hand(options: TMKL) -> None:
    logits, base, labels = _rows()
    result = target_masked_kl(logits, base, labels, options)
    ce, kl, excluded = _by_hand(logits, base, labels, options)
    assert float(result.ce) == pytest.approx(ce, rel=1e-12)
    assert float(result.kl) == pytest.approx(kl, rel=1e-9, abs=1e-12)
    assert float(result.loss) == pytest.approx(ce + options.weight * kl, rel=1e-9)
    assert (int(result.supervised), int(result.excluded)) == (5, excluded)
    if options.exclude_base_above:
        assert 0 < excluded < 5


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_gradient_equals_finite_differences(options: TMKL) -> None:
    logits, base, labels = _rows(1)
    logits.requires_grad_()
    target_masked_kl(logits, base, labels, options).loss.backward()
    step = 1e-5
    numeric = torch.zeros_like(logits)
    with torch.no_grad():
        for i in range(N):
            for j in range(V):
                plus, minus = logits.clone(), logits.clone()
                plus[i, j] += step
                minus[i, j] -= step
                upper = target_masked_kl(plus, base, labels, options).loss
                numeric[i, j] = (upper - target_masked_kl(minus, base, labels, options).loss) / (2 * step)
    assert logits.grad is not None
    assert float((logits.grad - numeric).norm() / numeric.norm()) <= 1e-7


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_equals_nckd_of_decoupled_knowledge_distillation(temperature: float) -> None:
    """As DKD's authors wrote it: subtract 1000 at the target, softmax, kl_div, times T^2."""
    logits, base, labels = _rows(2)
    keep = labels != -100
    z_a, z_b, y = logits[keep], base[keep], labels[keep]
    mask = F.one_hot(y, V).to(z_a)
    teacher = F.softmax(z_b / temperature - 1000.0 * mask, dim=1)
    student = F.log_softmax(z_a / temperature - 1000.0 * mask, dim=1)
    nckd = F.kl_div(student, teacher, reduction="sum") * temperature**2 / len(y)
    kl = target_masked_kl(logits, base, labels, TMKL(temperature=temperature)).kl
    assert float(kl) == pytest.approx(float(nckd), rel=1e-12)


def test_full_kl_is_the_binary_kl_plus_the_masked_kl_times_the_non_target_mass() -> None:
    logits, base, labels = _rows(3)
    p_a, p_b = logits.softmax(1), base.softmax(1)
    binary = masked = 0.0
    for row, label in enumerate(labels.tolist()):
        if label != -100:
            a, b = float(p_a[row, label]), float(p_b[row, label])
            binary += b * math.log(b / a) + (1 - b) * math.log((1 - b) / (1 - a))
    masked = float(target_masked_kl(logits, base, labels, TMKL(position_weight="non_target_mass")).kl) * 5
    full = float(target_masked_kl(logits, base, labels, TMKL(mask_target=False)).kl) * 5
    assert full == pytest.approx(binary + masked, rel=1e-10)


def test_kl_leaves_the_target_logit_alone_and_does_not_fade() -> None:
    logits, base, labels = _rows(4)
    logits[torch.arange(N), labels.clamp(min=0)] += 30  # p_a(y) -> 1
    logits.requires_grad_()
    result = target_masked_kl(logits, base, labels, TMKL(weight=1.0))
    kl_gradient = (
        torch.autograd.grad(result.loss, logits)[0]
        - torch.autograd.grad(target_masked_kl(logits, base, labels, TMKL(weight=0.0)).loss, logits)[0]
    )
    rows = (labels != -100).nonzero().squeeze(1)
    assert kl_gradient[rows, labels[rows]].abs().max() < 1e-15
    assert kl_gradient[rows].abs().sum(1).min() > 0.01


@settings(deadline=None, max_examples=60)
@given(
    confident=st.sampled_from(["base", "adapted", "both"]),
    digits=st.floats(0.5, 8.0),
    seed=st.integers(0, 1000),
    vocabulary=st.integers(3, 4000),
)
def test_float32_keeps_the_kl_where_either_model_is_certain(
    confident: str, digits: float, seed: int, vocabulary: int
) -> None:
    """p(y) up to 1 - 1e-8 on either side, where p / (1 - p) has lost everything in float32."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(1, vocabulary, generator=generator, dtype=torch.float64)
    logits = base + 0.3 * torch.randn(1, vocabulary, generator=generator, dtype=torch.float64)
    label = torch.tensor([vocabulary // 2])
    for side, z in (("base", base), ("adapted", logits)):
        if confident in (side, "both"):
            rest = z.clone()
            rest[0, label] = -math.inf
            z[0, label] = rest.logsumexp(1) + digits * math.log(10)  # 1 - p(y) = 10^-digits, nearly
    exact = target_masked_kl(logits, base, label)
    rounded = target_masked_kl(logits.float(), base.float(), label)
    assert float(rounded.kl) == pytest.approx(float(exact.kl), rel=2e-3, abs=2e-7)
    # and the non-target mass, which weights and excludes positions, is not 1 - p(y) either
    weighted = TMKL(position_weight="non_target_mass")
    assert float(target_masked_kl(logits.float(), base.float(), label, weighted).kl) == pytest.approx(
        float(target_masked_kl(logits, base, label, weighted).kl), rel=2e-3, abs=1e-12
    )


def test_exclusion_is_exact_next_to_one() -> None:
    """1 - 1e-4 against p(y) just above and below it, in float32."""
    labels = torch.tensor([0, 0])
    rest = torch.zeros(2, 3)
    odds = torch.tensor([[1.001e-4], [0.999e-4]], dtype=torch.float64)  # 1 - p(y)
    target = (math.log(3) + torch.log((1 - odds) / odds)).float()
    base = torch.cat([target, rest], 1)
    result = target_masked_kl(torch.randn(2, 4), base, labels, TMKL(exclude_base_above=1 - 1e-4))
    assert int(result.excluded) == 1


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_two_tokens_leave_nothing_to_compare(options: TMKL) -> None:
    logits = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    result = target_masked_kl(logits, torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 1, 1, 0]), options)
    result.loss.backward()
    assert torch.isfinite(logits.grad).all()
    if options.mask_target and options.renormalize:
        assert float(result.kl) == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=name)
def test_tokens_at_minus_infinity_in_both_models_are_as_if_absent(options: TMKL) -> None:
    logits, base, labels = _rows(5)
    wide = lambda z: torch.cat([z, torch.full((N, 3), -math.inf, dtype=z.dtype)], 1).requires_grad_()  # noqa: E731
    narrow, widened = logits.clone().requires_grad_(), wide(logits)
    expected = target_masked_kl(narrow, base, labels, options)
    result = target_masked_kl(widened, wide(base).detach(), labels, options)
    expected.loss.backward()
    result.loss.backward()
    assert float(result.loss) == pytest.approx(float(expected.loss), rel=1e-12)
    assert torch.allclose(widened.grad[:, :V], narrow.grad, rtol=1e-10, atol=1e-14)
    assert torch.equal(widened.grad[:, V:], torch.zeros(N, 3, dtype=torch.float64))


def test_a_base_row_with_nothing_but_the_target_adds_no_kl() -> None:
    base = torch.full((1, 4), -math.inf)
    base[0, 1] = 2.0
    logits = torch.randn(1, 4, requires_grad=True)
    result = target_masked_kl(logits, base, torch.tensor([1]))
    result.loss.backward()
    assert float(result.kl) == 0
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("labels", [[], [-100, -100, -100]])
def test_without_supervised_rows_the_loss_is_a_differentiable_zero(labels: list[int]) -> None:
    logits = torch.randn(len(labels), 5, requires_grad=True)
    result = target_masked_kl(logits, torch.randn(len(labels), 5), torch.tensor(labels, dtype=torch.int64))
    result.loss.backward()
    assert float(result.loss) == 0
    assert int(result.supervised) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("items", [40, 40.0, torch.tensor(40), torch.tensor([40, 40])])
def test_num_items_divides_both_terms(items: object) -> None:
    logits, base, labels = _rows(6)
    mean, total = target_masked_kl(logits, base, labels), target_masked_kl(logits, base, labels, num_items=items)
    for a, b in ((mean.ce, total.ce), (mean.kl, total.kl), (mean.loss, total.loss)):
        assert float(b) == pytest.approx(float(a) * 5 / 40, rel=1e-6)


def test_strided_inputs() -> None:
    logits, base, labels = _rows(7)
    expected = target_masked_kl(logits, base, labels).loss
    strided = target_masked_kl(logits.t().contiguous().t(), base.repeat(1, 2)[:, :V], labels.repeat_interleave(2)[::2])
    assert float(strided.loss) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"weight": -0.5}, "weight=-0.5 is not possible; it must be >= 0"),
        ({"weight": math.nan}, "weight=nan"),
        ({"weight": "1"}, "weight='1'"),
        ({"divergence": "backward"}, "divergence='backward' is unknown; choose one of 'forward', 'reverse', 'jsd'"),
        ({"position_weight": "mass"}, "choose one of 'uniform', 'non_target_mass'"),
        ({"temperature": 0.0}, "temperature=0.0 is not possible; it must be > 0"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"exclude_base_above": 1.0}, "exclude_base_above=1.0"),
        ({"mask_target": "no"}, "mask_target='no' must be True or False"),
        ({"mask_target": False, "renormalize": False}, "means nothing"),
    ],
)
def test_impossible_options_are_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match="TMKL: ") as error:
        TMKL(**kwargs)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("logits", "base", "labels", "message"),
    [
        ((2, 3, 4), (2, 3, 4), [0, 1], "flatten batch and sequence first"),
        ((3, 4), (2, 4), [0, 1, 2], "same number of rows"),
        ((2, 4), (2, 4), [0], "[2, 4], base_logits [2, 4] and labels [1]"),
        ((2, 4), (2, 5), [0, 1], "logits [2, 4] and base_logits [2, 5] must have the same vocabulary"),
        ((2, 4), (2, 4), [0, 4], "labels[1] = 4 lies outside the vocabulary of 4 tokens"),
        ((2, 4), (2, 4), [-1, 0], "labels[0] = -1"),
        ((2, 4), (2, 4), [0.0, 1.0], "int64"),
        ((1, 1), (1, 1), [0], "nothing would be left"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(logits: tuple, base: tuple, labels: list, message: str) -> None:
    with pytest.raises(ValueError) as error:
        target_masked_kl(torch.zeros(logits), torch.zeros(base), torch.tensor(labels))
    assert message in str(error.value)


def test_num_items_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="num_items=0 must be the number of supervised tokens"):
        target_masked_kl(*_rows(), num_items=0)
