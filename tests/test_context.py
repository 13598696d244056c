"""Context anchors: which positions they are, their KL and its own denominator, in each form and in training."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, CachedBase, attach, count_context, linear_target_masked_kl, target_masked_kl
from mask_the_target.attach import attachment_of, unwrap
from mask_the_target.context import context_mask, placeholders_of, sample
from reference import context_positions, distance, gradients, reference_loss

OPTIONS = TMKL(weight=0.5, context_weight=0.8)


def _pair(**adapter: Any) -> tuple[nn.Module, nn.Module]:
    """A moved LoRA model and an untouched copy of its base."""
    model = toy_llama()
    return with_lora(copy.deepcopy(model), moved=0.2, **adapter), model


def _rows(n: int = 7, v: int = 11, d: int = 5) -> dict[str, torch.Tensor]:
    """Rows in float64: supervised, context and ignored ones."""
    generator = torch.Generator().manual_seed(0)
    hidden, base_hidden = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64)
    labels = torch.tensor([3, -1, -100, 0, -1, 10, -1])[:n]
    return {"hidden": hidden, "base_hidden": base_hidden, "head_weight": weight, "labels": labels}


# ------------------------------------------------------------------------------------------------------ definition


def test_the_definition_is_the_mean_of_full_kls() -> None:
    rows = _rows()
    logits, base_logits = rows["hidden"] @ rows["head_weight"].T, rows["base_hidden"] @ rows["head_weight"].T
    plain = target_masked_kl(logits, base_logits, rows["labels"].clamp(min=-1).where(rows["labels"] >= 0, -100))
    kls = []
    for row in (1, 4, 6):
        p, q = base_logits[row].exp(), logits[row].exp()
        p, q = p / p.sum(), q / q.sum()
        kls.append(sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True)))
    found = target_masked_kl(logits, base_logits, rows["labels"], TMKL(context_weight=0.8))
    assert float(found.context_kl) == pytest.approx(sum(kls) / 3, rel=1e-12)
    assert float(found.loss) == pytest.approx(float(plain.loss) + 0.8 * sum(kls) / 3, rel=1e-12)
    assert (int(found.context), int(found.supervised)) == (3, 3)
    assert (float(found.ce), float(found.kl)) == (float(plain.ce), float(plain.kl))
    weights = torch.arange(7, dtype=torch.float64)
    weighted = target_masked_kl(
        logits, base_logits, rows["labels"], TMKL(context_weight=0.8), num_context=5, token_weights=weights
    )
    assert float(weighted.context_kl) == pytest.approx((kls[0] + 4 * kls[1] + 6 * kls[2]) / 5, rel=1e-12)


def test_its_gradient_by_finite_differences() -> None:
    rows = _rows()
    logits = (rows["hidden"] @ rows["head_weight"].T).requires_grad_()
    base_logits = rows["base_hidden"] @ rows["head_weight"].T
    assert torch.autograd.gradcheck(
        lambda x: target_masked_kl(x, base_logits, rows["labels"], OPTIONS, num_context=5).loss, (logits,), atol=1e-7
    )


@pytest.mark.parametrize("trainable_head", [False, True])
@pytest.mark.parametrize("context", [True, False])
def test_the_linear_form_equals_the_dense_one(trainable_head: bool, context: bool) -> None:
    rows = _rows()
    if not context:
        rows["labels"] = rows["labels"].where(rows["labels"] >= 0, -100)
    inputs = [rows["hidden"].requires_grad_()]
    if trainable_head:
        inputs.append(rows["head_weight"].requires_grad_())
    dense = target_masked_kl(
        rows["hidden"] @ rows["head_weight"].T,
        (rows["base_hidden"] @ rows["head_weight"].T).detach(),
        rows["labels"],
        OPTIONS,
        num_items=9,
        num_context=4,
    )
    fused = linear_target_masked_kl(**rows, options=OPTIONS, num_items=9, num_context=4, chunk_tokens=2)
    for name in ("loss", "ce", "kl", "context_kl", "supervised", "context"):
        assert float(getattr(fused, name)) == pytest.approx(float(getattr(dense, name)), rel=1e-10), name
    for own, wanted in zip(
        torch.autograd.grad(fused.loss, inputs), torch.autograd.grad(dense.loss, inputs), strict=True
    ):
        assert torch.allclose(own, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context_weight": -1.0}, "context_weight=-1.0 is not possible; it must be >= 0"),
        ({"context_weight": 1.0, "context_tokens": 0}, "context_tokens=0 is not possible"),
        ({"context_tokens": 5}, "context_tokens=5 without a context_weight has no effect"),
    ],
)
def test_bad_options(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TMKL(**settings)
    rows = _rows()
    with pytest.raises(ValueError, match=r"labels\[1\] = -1 lies outside the vocabulary"):
        linear_target_masked_kl(**rows)  # context rows mean nothing without a weight


# ------------------------------------------------------------------------------------------------------- positions


@given(st.data())
def test_positions_are_real_followed_and_unsupervised(data: st.DataObject) -> None:
    rows, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))

    def table(elements: st.SearchStrategy[int]) -> torch.Tensor:
        row = st.lists(elements, min_size=length, max_size=length)
        return torch.tensor(data.draw(st.lists(row, min_size=rows, max_size=rows)))

    inputs = {"input_ids": table(st.integers(0, 4))}
    if data.draw(st.booleans()):
        inputs["attention_mask"] = table(st.integers(0, 1))
    if data.draw(st.booleans()):
        inputs["position_ids"] = table(st.integers(0, 2))[: data.draw(st.sampled_from([1, rows]))]
    labels = table(st.sampled_from([-100, -100, 3]))
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    placeholders = data.draw(st.sampled_from([(), (4,), (3, 4)]))
    if len(inputs) == 1 and length > 1 and (labels[:, -1] == -100).any():
        with pytest.raises(ValueError, match="a row ends without a target, which may be padding"):
            context_mask(inputs, targets, placeholders)
        inputs["attention_mask"] = torch.ones_like(labels)
    found = context_mask(inputs, targets, placeholders).nonzero().tolist()
    assert [tuple(pair) for pair in found] == context_positions({**inputs, "labels": labels}, placeholders)


def test_positions_that_cannot_be_told_are_refused() -> None:
    targets = torch.full((1, 4), -100)
    with pytest.raises(ValueError, match=r"the attention mask \[1, 1, 4, 4\] is not \[batch, sequence\] \[1, 4\]"):
        context_mask({"attention_mask": torch.ones(1, 1, 4, 4)}, targets)
    with pytest.raises(ValueError, match="needs position_ids to tell packed documents apart"):
        context_mask({"cu_seq_lens_q": torch.tensor([0, 2, 4])}, targets)
    with pytest.raises(ValueError, match=r"and the batch has no attention mask\. Give a mask of 0 and 1"):
        context_mask({"input_ids": torch.ones(1, 4)}, targets, shifted=False)
    padded = torch.tensor([[-100, 3, -100, -100], [-100, -100, 3, -100]])  # the last predicts nothing
    with pytest.raises(ValueError, match="a row ends without a target, which may be padding"):
        context_mask({"input_ids": torch.ones(2, 4)}, padded)
    assert context_mask({"input_ids": torch.ones(1, 4)}, padded[1:]).tolist() == [[True, True, False, False]]


def test_a_document_starts_where_positions_do_not_go_on() -> None:
    """Not only at 0: some collators count from 1, and a chunk of a long document goes on where the last one ended."""
    places = ([0, 1, 2, 0, 1, 2], [1, 2, 3, 1, 2, 3], [0, 1, 2, 7, 8, 9])
    for third, positions in itertools.product((3, -100), places):  # -100: it would predict the next one's first token
        targets = torch.tensor([[-100, -100, third, -100, -100, 3]])
        found = context_mask({"position_ids": torch.tensor([positions])}, targets)
        assert found.tolist() == [[True, True, False, True, True, False]]


def test_placeholders_are_read_from_the_config_and_those_inside_it() -> None:
    model = toy_llama()
    model.config.image_token_id = 40
    model.config.video_token_index = 41
    model.config.text_config = {"audio_token_id": 42, "bos_token_id": 1}
    model.config.image_patch_id = 43  # Molmo2
    model.config.visual_indicator_token_ids = [44, 45]  # Ovis2
    model.config.image_patch_size = 14
    assert placeholders_of(model) == (40, 41, 42, 43, 44, 45)


def test_samples_are_uniform_and_of_their_share() -> None:
    generator, positions = torch.Generator().manual_seed(0), torch.arange(10, 16)
    drawn = torch.stack([sample(positions, 4, 12, generator) for _ in range(3000)])  # 6 of the step's 12: half of 4
    assert drawn.shape == (3000, 2)
    assert (drawn[:, 0] < drawn[:, 1]).all()
    counts = torch.bincount(drawn.flatten(), minlength=16)[10:]
    assert (counts - 1000).abs().max() < 4 * math.sqrt(3000 * 1 / 3 * 2 / 3)
    assert sample(positions, 12, 12, generator).tolist() == positions.tolist()
    assert sample(positions, 1, 1000, generator).numel() == 1  # never none: the factor would be infinite


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("adapter", [{}, {"target_modules": ["q_proj", "lm_head"]}], ids=["layers", "head"])
def test_loss_and_gradients_equal_the_two_model_reference(adapter: dict[str, Any]) -> None:
    model, base = _pair(**adapter)
    for items, context in ((None, None), (31, 17)):
        given = {} if items is None else {"num_items_in_batch": items, "num_context_in_batch": context}
        expected = reference_loss(model, base, batch(), OPTIONS, items, context)
        with attach(model, OPTIONS) as attachment:
            loss = model(**batch(), **given).loss
            assert distance(gradients(loss, model), gradients(expected.loss, model)) < 1e-5
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
        for name in ("ce", "kl", "context_kl", "supervised", "context"):
            assert float(getattr(attachment.last, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-4)
        assert float(expected.context_kl) > 0.01


def test_accumulating_and_packing_change_nothing() -> None:
    model, _ = _pair()
    data = batch(rows=8, length=16, seed=3)
    single = []
    for row in range(8):
        length = int(data["attention_mask"][row].sum())
        single.append({k: v[row : row + 1, :length] for k, v in data.items()})
    packed = {k: torch.cat([row[k] for row in single], 1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in single])[None]
    starts = packed["position_ids"] == 0
    packed["labels"] = packed["labels"].masked_fill(starts, -100)
    items = int((data["labels"][:, 1:] != -100).sum())

    def step(batches: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        trained = copy.deepcopy(model)
        with attach(trained, OPTIONS):
            count = sum(count_context(trained, data) for data in batches)
            assert count == len(context_positions(data))
            for part in batches:
                trained(**part, num_items_in_batch=items, num_context_in_batch=count).loss.backward()
        return {n: p.grad for n, p in trained.named_parameters() if p.requires_grad}

    whole = step([data])
    assert distance(step(single), whole) < 1e-5
    assert distance(step([packed]), whole) < 1e-5


def test_a_batch_without_a_target_still_holds_its_context() -> None:
    model, base = _pair()
    data = batch()
    data["labels"] = torch.full_like(data["labels"], -100)
    expected = reference_loss(model, base, data, OPTIONS)
    assert int(expected.supervised) == 0
    with attach(model, OPTIONS):
        loss = model(**data).loss
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert distance(gradients(loss, model), gradients(expected.loss, model)) < 1e-5
        if not hasattr(trl.trainer.utils, "FusedCausalLMOutput"):
            pytest.skip("the results above hold; this TRL has no fused head, whose results come next")
        fused = model(**data, fused_lm_head=True)
        assert float(-fused.log_probs.sum()) == pytest.approx(float(expected.loss), rel=1e-5)


def test_a_sample_estimates_the_mean_and_moves_no_random_number_of_the_training() -> None:
    model, base = _pair()
    data = batch(rows=4, length=16)
    data["labels"][:, :12] = -100
    expected = reference_loss(model, base, data, OPTIONS)
    with attach(model, TMKL(weight=0.5, context_weight=0.8, context_tokens=6)) as attachment, torch.no_grad():
        before = torch.get_rng_state()
        found = []
        for _ in range(400):
            model(**data)
            found.append(float(attachment.last.context_kl))
        assert torch.equal(torch.get_rng_state(), before)
    deviation = torch.tensor(found).std()
    assert deviation > 0
    assert abs(sum(found) / 400 - float(expected.context_kl)) < 4 * float(deviation) / 20


@pytest.mark.parametrize("tokens", [None, 3])
def test_the_cache_holds_every_context_position(tmp_path: Path, tokens: int | None) -> None:
    model, _ = _pair()
    options = TMKL(weight=0.5, context_weight=0.8, context_tokens=tokens)
    data = batch()
    with attach(model, options) as attachment:
        attachment._sampler.manual_seed(7)
        wanted = [float(model(**data).loss) for _ in range(4)]
    with attach(model, options, base=CachedBase(folder=tmp_path)) as attachment:
        attachment._sampler.manual_seed(7)
        found = [float(model(**data).loss) for _ in range(4)]
        assert attachment.cache.stopped is None
        assert attachment.cache._store.hits == 9  # three rows, in all steps but the first
    assert found == pytest.approx(wanted, rel=1e-5)
    assert (len(set(wanted)) == 1) == (tokens is None)  # other samples, from the same store


def test_data_without_prompts_is_told_at_once_and_trains_as_without() -> None:
    model, base = _pair()
    data = batch()
    data["labels"] = data["input_ids"].where(data["attention_mask"].bool(), -100)
    assert context_positions(data) == []
    expected = reference_loss(model, base, data, TMKL(weight=0.5))
    with attach(model, OPTIONS):
        assert count_context(model, data) == 0
        with pytest.warns(UserWarning, match="the first batch has no context position .* or anchors: TMKLCallback"):
            loss = model(**data).loss
        again = model(**data, num_items_in_batch=int(expected.supervised), num_context_in_batch=0).loss
    assert [float(loss), float(again)] == pytest.approx([float(expected.loss)] * 2, rel=1e-5)


def test_a_denominator_that_is_missing_is_asked_for() -> None:
    model, _ = _pair()
    with attach(model, OPTIONS):
        with pytest.raises(ValueError, match="num_items_in_batch came without num_context_in_batch"):
            model(**batch(), num_items_in_batch=20)
        inner = unwrap(model)[0]
        assert attachment_of(inner).count_context(batch()) == count_context(model, batch())
    with pytest.raises(ValueError, match="TMKL is not attached to this model"):
        count_context(model, batch())


def test_a_weight_that_is_set_where_there_was_none_is_refused() -> None:
    model = with_lora(toy_llama(), moved=0.1)
    with attach(model) as attachment:
        attachment.context_weight = 2.0
        with pytest.raises(RuntimeError, match=r"context_weight was set to 2.0, and the model was attached without"):
            model(**batch())
