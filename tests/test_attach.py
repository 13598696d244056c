"""The patched forward against the dense two-model reference, and the equalities that training relies on."""

import copy
import inspect
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import trl.trainer.utils
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from transformers import BartConfig, BartForCausalLM, DynamicCache

from conftest import batch, move, toy_llama, with_lora
from mask_the_target import TMKL, attach, detach
from mask_the_target.attach import unwrap
from options import ALL_OPTIONS, name
from reference import distance, gradients, reference_loss


def _pair(**config: Any) -> tuple[nn.Module, nn.Module]:
    """A moved LoRA model and an untouched copy of its base."""
    model = toy_llama(**config)
    return with_lora(copy.deepcopy(model), moved=0.2), model


@pytest.mark.parametrize("options", [*ALL_OPTIONS[::5], TMKL(), TMKL(weight=0.0)], ids=name)
def test_loss_and_gradients_equal_the_two_model_reference(options: TMKL) -> None:
    model, base = _pair()
    data = batch()
    expected = reference_loss(model, base, data, options)
    wanted = gradients(expected.loss, model)
    with attach(model, options, full_kl=True) as attachment:
        loss = model(**data).loss
        assert distance(gradients(loss, model), wanted) < 1e-5
        last = attachment.last
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
    assert float(last.ce) == pytest.approx(float(expected.ce), rel=1e-5)
    assert float(last.kl) == pytest.approx(float(expected.kl), rel=1e-4, abs=1e-7)
    full = reference_loss(model, base, data, TMKL(mask_target=False))
    assert float(last.full_kl) == pytest.approx(float(full.kl), rel=1e-4)
    assert (int(last.supervised), int(last.excluded)) == (int(expected.supervised), int(expected.excluded))


def test_num_items_and_shift_labels() -> None:
    model, base = _pair()
    data = batch()
    shifted = {"input_ids": data["input_ids"], "attention_mask": data["attention_mask"]}
    shifted["shift_labels"] = torch.randint(3, 48, data["labels"].shape)  # not what shifting the ids would give
    with attach(model):
        for inputs in (data, shifted):
            for items in (None, 57, torch.tensor(57), torch.tensor([57, 57])):
                loss = model(**inputs, num_items_in_batch=items).loss
                number = None if items is None else 57
                assert float(loss) == pytest.approx(
                    float(reference_loss(model, base, inputs, TMKL(), number).loss), rel=1e-5
                )


def _toy_bart(init_std: float = 0.3) -> nn.Module:
    sizes = {"vocab_size": 48, "d_model": 16, "decoder_layers": 1, "init_std": init_std, "dropout": 0.0}
    return BartForCausalLM(BartConfig(**sizes, decoder_attention_heads=2, decoder_ffn_dim=16)).train()


def test_an_untrained_model_shows_which_label_it_compares_with() -> None:
    """Its two cross-entropies are within a percent of each other."""
    model = with_lora(_toy_bart(init_std=0.002), target_modules=["q_proj"])
    with pytest.warns(UserWarning, match="labels of the same position"), attach(model) as attachment:
        assert not attachment.shifts_labels
    with attach(with_lora(toy_llama(initializer_range=0.002))) as attachment:
        assert attachment.shifts_labels


def test_a_model_that_does_not_shift_its_labels() -> None:
    base = _toy_bart()
    model = with_lora(copy.deepcopy(base), moved=0.2, target_modules=["q_proj", "fc1"])
    data = batch()
    own = float(model(**data).loss)
    shifted = {**data, "shift_labels": F.pad(data["labels"][:, 1:], (0, 1), value=-100)}
    del shifted["labels"]
    with pytest.warns(UserWarning, match="BartForCausalLM compares its logits with the labels of the same position"):
        attachment = attach(model)
    with attachment:
        for inputs, shifts in ((data, False), (shifted, True)):
            expected = reference_loss(model, base, data, TMKL(), shifts_labels=shifts)
            assert distance(gradients(model(**inputs).loss, model), gradients(expected.loss, model)) < 1e-5
            assert float(attachment.last.loss) == pytest.approx(float(expected.loss), rel=1e-5)
            assert (float(attachment.last.ce) == pytest.approx(own, rel=1e-5)) is not shifts
        if not hasattr(trl.trainer.utils, "FusedCausalLMOutput"):
            pytest.skip("the results above hold; this TRL has no fused head, whose results come next")
        # TRL's fused results are those of labels that it shifts itself.
        fused = model(**data, fused_lm_head=True)
        assert fused.log_probs.shape == fused.label_mask.shape == (3, 9)
        mean = -fused.log_probs.sum() / fused.label_mask.sum()
        assert float(mean) == pytest.approx(float(expected.loss), rel=1e-5)


def test_a_separate_base_model() -> None:
    model, base = _pair()
    data = batch()
    other = toy_llama(seed=5, hidden_size=24, num_hidden_layers=1)  # another size, the same vocabulary
    for reference in (base, other):
        expected = reference_loss(model, reference, data, TMKL())
        reference.train()
        with attach(model, base=reference) as attachment:
            assert attachment.base.kind == "model"
            assert float(model(**data).loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert all(module.training for module in reference.modules())
        assert "forward" not in reference.lm_head.__dict__


def test_adapters_of_transformers_own() -> None:
    """model.add_adapter, or what it does where this transformers asks for a newer PEFT than there is."""
    base = toy_llama()
    model = copy.deepcopy(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    try:
        model.add_adapter(config)
    except ValueError:  # "The version of PEFT you are using is not compatible"
        inject_adapter_in_model(config, model)
        model.peft_config = {"default": config}
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in parameter_name)
    move(model, 0.2)
    data = batch()
    expected = reference_loss(model.train(), base, data, TMKL())
    with attach(model):
        loss = model(**data).loss
        assert float(loss) == pytest.approx(float(expected.loss), rel=1e-5)
        assert distance(gradients(loss, model), gradients(expected.loss, model)) < 1e-5


def test_eval_and_calls_without_labels_are_the_models_own() -> None:
    model, _ = _pair()
    data = batch()
    inputs = {k: v for k, v in data.items() if k != "labels"}
    model.eval()
    own = model(**data)
    text = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with attach(model):
        now = model(**data)
        assert torch.equal(now.loss, own.loss)
        assert torch.equal(now.logits, own.logits)
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), text)
        model.train()
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, own.logits)


def _trace(model: nn.Module) -> list[Any]:
    return [
        (n, sorted(m.__dict__), len(m._forward_pre_hooks), len(m._forward_hooks), m.training)
        for n, m in model.named_modules()
    ] + [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()]


def test_detach_leaves_no_trace() -> None:
    model, _ = _pair()
    before = _trace(model)
    attachment = attach(model)
    model(**batch()).loss.backward()
    attachment.detach()
    attachment.detach()
    assert _trace(model) == before
    attach(model)
    detach(model)
    assert _trace(model) == before
    with pytest.raises(ValueError, match="not attached"):
        detach(model)


def test_an_instance_forward_of_another_tool_is_kept() -> None:
    model, _ = _pair()
    inner = unwrap(model)[0]
    calls: list[int] = []
    own = inner.forward

    def theirs(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    inner.forward = theirs
    with attach(model):
        calls.clear()
        model(**batch())
        assert len(calls) == 2  # base and adapted pass
    assert inner.forward is theirs


def test_an_exception_inside_leaves_the_model_usable() -> None:
    model, base = _pair()
    data = batch()
    with attach(model):
        with pytest.raises(
            ValueError, match=r"labels \[3, 7\] don't match the positions that reach the head \[3, 10\]"
        ):
            model(**(data | {"labels": data["labels"][:, :7]}))
        with pytest.raises(ValueError, match=r"labels\[4\] = 48 lies outside the vocabulary of 48 tokens"):
            model(**(data | {"labels": torch.full_like(data["labels"], -100).index_fill_(1, torch.tensor(5), 48)}))
        assert all(module.training for module in model.modules())
        assert not any(getattr(m, "_disable_adapters", False) for m in model.modules())
        assert float(model(**data).loss) == pytest.approx(
            float(reference_loss(model, base, data, TMKL()).loss), rel=1e-5
        )


def _step(model: nn.Module, batches: list[dict[str, Any]], items: int | None, **kwargs: Any) -> list[torch.Tensor]:
    """The adapter after one SGD step over ``batches``, accumulated."""
    model = copy.deepcopy(model)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.5)
    with attach(model, **kwargs):
        for data in batches:
            model(**data, num_items_in_batch=items).loss.backward()
    optimizer.step()
    return [p.detach() for p in trainable]


def _same(a: list[torch.Tensor], b: list[torch.Tensor], start: nn.Module) -> bool:
    start_values = [p.detach() for p in start.parameters() if p.requires_grad]
    moved = max(float((x - y).abs().max()) for x, y in zip(a, start_values, strict=True))
    apart = max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))
    return moved > 1e-3 and apart < 2e-5 * max(1.0, moved)


def _uneven() -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """A batch of 8 rows of uneven length, the same rows one by one without padding, and their supervised tokens."""
    data = batch(rows=8, length=16, seed=3)
    single = []
    for row in range(8):
        length = int(data["attention_mask"][row].sum())
        single.append({k: v[row : row + 1, :length] for k, v in data.items()})
    return data, single, int((data["labels"][:, 1:] != -100).sum())


def test_accumulating_eight_single_rows_equals_one_batch_of_eight() -> None:
    model, _ = _pair()
    data, single, items = _uneven()
    assert len({len(row["input_ids"][0]) for row in single}) > 4
    whole = _step(model, [data], items)
    assert _same(whole, _step(model, single, items), model)
    assert _same(whole, _step(model, [data], None), model)  # one batch: its own tokens are the denominator
    options = TMKL(exclude_base_above=0.1)
    assert _same(_step(model, [data], items, options=options), _step(model, single, items, options=options), model)


def test_packed_rows_equal_padded_rows() -> None:
    model, _ = _pair()
    data, single, items = _uneven()
    packed = {k: torch.cat([row[k] for row in single], 1) for k in ("input_ids", "labels")}
    packed["position_ids"] = torch.cat([torch.arange(row["input_ids"].shape[1]) for row in single])[None]
    packed["labels"][packed["position_ids"] == 0] = -100  # no target crosses a document, as collators mark it
    assert _same(_step(model, [data], items), _step(model, [packed], items), model)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant: bool) -> None:
    model, _ = _pair()
    data, _, items = _uneven()
    plain = _step(model, [data], items)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert _same(plain, _step(model, [data], items), model)


def test_attaching_before_and_after_wrapping(monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform == "linux":
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")  # else gloo resolves the host's name, which may take minutes
    model, _ = _pair()
    data, _, items = _uneven()
    plain = _step(model, [data], items)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        for first in (True, False):
            wrapped = copy.deepcopy(model)
            trainable = [p for p in wrapped.parameters() if p.requires_grad]
            if first:
                attach(wrapped)
            parallel = nn.parallel.DistributedDataParallel(wrapped)
            if not first:
                attach(parallel)
            parallel(**data, num_items_in_batch=items).loss.backward()
            torch.optim.SGD(trainable, lr=0.5).step()
            assert _same(plain, [p.detach() for p in trainable], model)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("attach_first", "options"), [(True, TMKL()), (False, TMKL()), (True, TMKL(weight=0.5, context_weight=1.0))]
)
def test_torch_compile(attach_first: bool, options: TMKL) -> None:
    model, _ = _pair()
    data = batch()
    if attach_first:
        attach(model, options)
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = torch.compile(model, backend="eager")
        attach(compiled, options)
    expected = reference_loss(*_pair(), data, options).loss
    assert float(compiled(**data).loss) == pytest.approx(float(expected), rel=1e-5)


def test_dropout_is_off_in_the_base_pass_and_draws_no_random_number() -> None:
    model, _ = _pair(attention_dropout=0.4)
    zero = with_lora(toy_llama(), lora_dropout=0.5)
    data = batch()
    torch.manual_seed(7)
    plain = model(**data).loss
    state = torch.get_rng_state()
    with attach(model) as attachment:
        torch.manual_seed(7)
        model(**data)
        assert torch.equal(torch.get_rng_state(), state)
        assert float(attachment.last.ce) == pytest.approx(float(plain), rel=1e-5)  # the same dropout masks
    with attach(zero, full_kl=True) as attachment:
        zero(**data)
        assert float(attachment.last.kl) == 0
        assert float(attachment.last.full_kl) == 0


def test_router_auxiliary_loss_is_added_once() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3}
    torch.manual_seed(0)
    base = MixtralForCausalLM(MixtralConfig(**sizes, output_router_logits=True, router_aux_loss_coef=0.3)).train()
    model = with_lora(copy.deepcopy(base), moved=0.2, target_modules=["q_proj", "v_proj"])
    data = batch()
    own = model(**data)
    kl = reference_loss(model, base, data, TMKL()).kl
    with attach(model):
        output = model(**data)
        assert float(output.loss) == pytest.approx(float(own.loss + kl), rel=1e-5)
        assert float(output.aux_loss) == pytest.approx(float(own.aux_loss), rel=1e-5)
        assert float(own.loss) != pytest.approx(float(model(**data, output_router_logits=False).loss - kl), rel=1e-3)


def test_no_supervised_token_gives_a_zero_that_can_be_backpropagated() -> None:
    model, _ = _pair()
    data = batch()
    with attach(model) as attachment:
        loss = model(**(data | {"labels": torch.full_like(data["labels"], -100)})).loss
        loss.backward()
        assert float(loss) == 0
        assert int(attachment.last.supervised) == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters() if p.requires_grad)


def test_positional_arguments_and_tuples() -> None:
    model, base = _pair()
    data = batch()
    inner = unwrap(model)[0]
    with attach(model):
        expected = float(reference_loss(_pair()[0], base, data, TMKL()).loss)
        assert float(inner(data["input_ids"], data["attention_mask"], labels=data["labels"]).loss) == pytest.approx(
            expected, rel=1e-5
        )
        output = model(**data, return_dict=False)
        assert isinstance(output, tuple)
        assert float(output[0]) == pytest.approx(expected, rel=1e-5)
        assert model(**data).logits is None


def test_labels_that_never_arrive_are_reported_once() -> None:
    model, _ = _pair()
    data = batch()
    inputs = {k: v for k, v in data.items() if k != "labels"}
    with attach(model) as attachment:
        with pytest.warns(UserWarning, match="a training forward came without labels, so TMKL is not in its loss"):
            model(**inputs)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model(**inputs)
        attachment.strict = True
        with pytest.raises(RuntimeError, match="without labels"):
            model(**inputs)


def test_one_warning_does_not_hide_another() -> None:
    """A validation forward in eval mode is harmless, a training forward without labels is not."""
    model, _ = _pair()
    data = batch()
    with attach(model):
        model.eval()
        with pytest.warns(UserWarning, match="ran in eval mode"):
            model(**data)
        model.train()
        with pytest.warns(UserWarning, match="a training forward came without labels"):
            model(**{name: value for name, value in data.items() if name != "labels"})


def test_training_in_eval_mode_is_reported() -> None:
    """What get_peft_model gives for a loaded model: the wrapper in train mode, the model inside in eval mode."""
    model, _ = _pair()
    with attach(model):
        unwrap(model)[0].eval()
        with pytest.warns(UserWarning, match=r"ran in eval mode, where the loss is plain.*call model.train\(\) first"):
            model(**batch())
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("error", UserWarning)
            model(**batch())


def test_the_forward_looks_like_the_models_own() -> None:
    model, _ = _pair()
    inner = unwrap(model)[0]
    own = inspect.signature(inner.forward)
    with attach(model):
        assert inspect.signature(inner.forward) == own


def test_a_look_without_gradients_is_not_counted_as_a_step() -> None:
    model, _ = _pair()
    with attach(model) as attachment:
        with torch.no_grad():
            model(**batch())
        assert attachment.totals.forwards == 0
        loss = model(**batch()).loss
        loss *= 4  # as trainers do over ranks
        assert float(attachment.last.loss) == pytest.approx(float(attachment.last.ce + attachment.last.kl), rel=1e-5)


def test_a_later_patch_that_goes_past_the_forward_is_reported() -> None:
    """As TRL's fused head does when it is added after attaching: it calls the backbone itself."""
    model, _ = _pair()
    data = batch()
    attachment = attach(model)
    inner = unwrap(model)[0]
    inner.forward = lambda input_ids, **kwargs: inner.model(input_ids=input_ids)
    with pytest.warns(UserWarning, match="the backbone ran in training outside of TMKL's forward"):
        model(**data)
    assert not attachment.installed
    with pytest.warns(UserWarning, match="another tool wrapped this model's forward"):
        attachment.detach()


def test_refusals() -> None:
    model, _ = _pair()
    attach(model)
    with pytest.raises(ValueError, match="attached to this model already; call detach"):
        attach(model)
    duplicate = copy.deepcopy(model)
    with pytest.raises(RuntimeError, match="this is a copy of a model that TMKL was attached to"):
        duplicate(**batch())
    detach(model)
    with pytest.raises(RuntimeError, match="this is a copy of a model that TMKL was attached to"):
        duplicate(**batch())
    with pytest.raises(ValueError, match=r"nn\.DataParallel copies the model in every step"):
        attach(nn.DataParallel(model))
    with pytest.raises(ValueError, match="LlamaModel has no head"):
        attach(with_lora(toy_llama().model, task_type=None))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_keys_and_values_of_earlier_tokens_are_refused_in_training(name: str) -> None:
    """The base's pass would read the adapted model's, and add its own to them."""
    model, _ = _pair()
    data = batch()
    with attach(model):
        inner = unwrap(model)[0]
        inner(**data, past_key_values=None)
        with pytest.raises(ValueError, match=f"was given {name}, the adapted model's keys and values"):
            inner(**data, **{name: DynamicCache(config=inner.config)})
