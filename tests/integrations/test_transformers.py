"""TMKLCallback in the real Trainer and the real SFTTrainer, on a toy model; and what makes it stop."""

import contextlib
import copy
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset
from huggingface_hub import ModelCard
from packaging.version import Version
from peft import AdaLoraConfig, LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, SFTConfig, SFTTrainer

from conftest import batch, toy_llama, with_lora
from mask_the_target import TMKL, TMKLCallback
from mask_the_target.attach import attach, attachment_of, detach, unwrap
from reference import model_inputs, reference_loss

ROWS = [{k: v[i].tolist() for k, v in batch(rows=8, length=12, seed=s).items()} for s in range(2) for i in range(8)]


def _collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "attention_mask", "labels")}


def _arguments(tmp_path: Path, kind: type = TrainingArguments, **kwargs: Any) -> Any:
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 0.05,
        "optim": "sgd",
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "bf16": False,
        "seed": 0,
    }
    return kind(**(settings | kwargs))


def _trainer(
    tmp_path: Path, model: nn.Module, callback: TrainerCallback, cls: type = Trainer, **kwargs: Any
) -> Trainer:
    dataset = kwargs.pop("train_dataset", ROWS)
    trainer_kwargs = {k: kwargs.pop(k) for k in ("compute_loss_func", "eval_dataset") if k in kwargs}
    return cls(
        model=model,
        args=_arguments(tmp_path, **kwargs),
        train_dataset=dataset,
        data_collator=_collate,
        callbacks=[callback],
        **trainer_kwargs,
    )


def _logged(trainer: Trainer) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class _Keep(TrainerCallback):
    """A reporter: the logs as they reach it."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.seen.append(dict(logs))


def test_trainer_trains_on_ce_plus_kl_and_logs_both_to_its_reporters(tmp_path: Path) -> None:
    base = toy_llama()
    model = with_lora(copy.deepcopy(base), moved=0.2)
    start = copy.deepcopy(model)
    keep, callback = _Keep(), TMKLCallback(TMKL(weight=0.5), full_kl=True)
    trainer = Trainer(
        model=model,
        args=_arguments(tmp_path),
        train_dataset=ROWS,
        data_collator=_collate,
        callbacks=[keep, callback],  # the reporter stands first, as W&B's does
    )
    batches = [_collate(rows) for rows in torch.utils.data.DataLoader(ROWS, batch_size=4, collate_fn=list)]
    trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(ROWS)
    trainer.train()
    logs = [entry for entry in keep.seen if "loss" in entry]
    assert logs == [{k: v for k, v in entry.items() if k != "step"} for entry in _logged(trainer)]
    for entry in logs:
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.5 * entry["kl"], rel=1e-4)
        assert entry["full_kl"] > 0
    # the same steps by hand, from the two models' own logits
    trainable = [p for p in start.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=0.05)
    for entry, data in zip(logs, batches, strict=False):
        expected = reference_loss(start, base, data, TMKL(weight=0.5))
        assert entry["ce"] == pytest.approx(float(expected.ce), rel=1e-4)
        assert entry["kl"] == pytest.approx(float(expected.kl), rel=1e-4)
        optimizer.zero_grad()
        expected.loss.backward()
        optimizer.step()
    now = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(now, trainable, strict=True))
    assert "forward" not in unwrap(model)[0].__dict__  # detached at the end


def test_accumulation_in_the_trainer_equals_the_whole_batch(tmp_path: Path) -> None:
    logs = []
    for size, steps in ((8, 1), (1, 8)):
        model = with_lora(toy_llama(), moved=0.2)
        kwargs = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = _trainer(tmp_path, model, TMKLCallback(), **kwargs)
        trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(ROWS)
        trainer.train()
        logs.append(_logged(trainer))
    for one, eight in zip(*logs, strict=True):
        for key in ("loss", "ce", "kl"):
            assert one[key] == pytest.approx(eight[key], rel=1e-4)


def test_evaluation_is_plain_cross_entropy(tmp_path: Path) -> None:
    model = with_lora(toy_llama(), moved=0.2)
    arguments = {"learning_rate": 0.0, "eval_strategy": "steps", "eval_steps": 1}
    trainer = _trainer(tmp_path, model, TMKLCallback(), eval_dataset=ROWS[:4], **arguments)
    trainer.train()
    evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    model.eval()
    assert evaluated == [pytest.approx(float(model(**_collate(ROWS[:4])).loss), rel=1e-5)] * 2


def test_the_base_is_settled_before_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    """PiSSA: after resuming, the initial adapter is gone; the callback kept it when the trainer was built."""

    def build() -> PeftModel:
        return with_lora(toy_llama(), init_lora_weights="pissa")

    original = toy_llama()
    kwargs = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1, "learning_rate": 0.5}
    _trainer(tmp_path, build(), TMKLCallback(), **kwargs).train()
    model = build()
    trainer = _trainer(tmp_path, model, callback := TMKLCallback(), **(kwargs | {"max_steps": 2}))
    seen: list[float] = []

    class Look(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            data = {k: v for k, v in batch().items() if k != "labels"}
            inner = unwrap(model)[0]
            with torch.no_grad(), callback.attachment.base.context():
                seen.append(float((inner.eval()(**data).logits - original.eval()(**data).logits).abs().max()))
            inner.train()

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=True)
    assert len(seen) == 1
    assert seen[0] < 1e-4
    assert _logged(trainer)[-1]["kl"] > 1e-3


class _OwnLoss(Trainer):
    """A subclass whose loss is not the model's."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, None) if return_outputs else loss


class _Adds(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return super().compute_loss(model, inputs, return_outputs, **kwargs) + 1.0


class _Ignores(Trainer):
    """Runs the model's forward, and trains on something else."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        super().compute_loss(model, inputs, return_outputs, **kwargs)
        return sum(p.square().sum() for p in model.parameters() if p.requires_grad)


class _GoesPast(Trainer):
    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return unwrap(model)[0].model(input_ids=inputs["input_ids"]).last_hidden_state.square().mean()


class _Averages(Trainer):
    """A subclass that doesn't tell the model how many tokens the step has, and takes the mean over its batches."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        return model(**inputs).loss


def test_a_trainer_that_averages_over_batches_itself_does_so_with_context_too(tmp_path: Path) -> None:
    """At the first step there is no KL yet, so it changes nothing."""
    found = []
    for options in (TMKL(), TMKL(context_weight=1.0)):
        model = with_lora(toy_llama())
        settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 1}
        trainer = _trainer(tmp_path, model, TMKLCallback(options), _Averages, **settings)
        trainer.train()
        found.append((_logged(trainer)[0]["loss"], [p.detach() for p in model.parameters() if p.requires_grad]))
    (loss, weights), (loss_with, weights_with) = found
    assert loss_with == pytest.approx(loss, rel=1e-5)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(weights, weights_with, strict=True))


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (_OwnLoss, "a training forward came without labels"),
        (_Adds, "the trainer logged a loss of"),
        (_Ignores, "backpropagated it 0 times: it trains on another loss"),
        (_GoesPast, "the backbone ran in training outside of TMKL's forward"),
    ],
)
def test_a_trainer_that_trains_on_another_loss_is_stopped(tmp_path: Path, cls: type, message: str) -> None:
    model = with_lora(toy_llama(), moved=0.2)
    start = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError) as error:
        _trainer(tmp_path, model, TMKLCallback(), cls).train()
    assert message in str(error.value)
    if cls is not _Adds:  # its gradient is the right one
        assert all(torch.equal(a, b) for a, b in zip(start, model.parameters(), strict=True))


def test_compute_loss_func_is_stopped(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path,
        with_lora(toy_llama()),
        TMKLCallback(),
        compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum(),
    )
    with pytest.raises(RuntimeError, match="compute_loss_func"):
        trainer.train()


@pytest.mark.skipif(Version(trl.__version__) < Version("1.15"), reason="the trainer doesn't build the loss itself")
def test_token_weights_are_stopped(tmp_path: Path) -> None:
    class Weights(SFTTrainer):
        """DFT by hand: TRL's own option is refused by name."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
            outputs = model(**inputs, fused_lm_head=True)
            return -(outputs.log_probs * outputs.log_probs.exp().detach()).sum()

    with pytest.raises(RuntimeError, match="weights the positions' losses one by one"):
        _sft(tmp_path, cls=Weights).train()


def test_adapters_without_a_peft_model_in_bfloat16(tmp_path: Path) -> None:
    """The trainer wraps the model's own forward in autocast, before training begins."""
    model = inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), toy_llama())
    trainer = _trainer(tmp_path, model, TMKLCallback(), bf16=True, max_steps=3)
    trainer.train()
    assert _logged(trainer)[-1]["kl"] > 0


def test_pissa_in_bfloat16_is_regularised(tmp_path: Path) -> None:
    model = with_lora(toy_llama(), init_lora_weights="pissa")
    trainer = _trainer(tmp_path, model, TMKLCallback(), bf16=True, max_steps=3)
    trainer.train()
    assert _logged(trainer)[-1]["kl"] > 1e-3


def test_adalora_whose_model_adds_to_the_loss(tmp_path: Path) -> None:
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], task_type="CAUSAL_LM")
    trainer = _trainer(tmp_path, get_peft_model(toy_llama(), config), TMKLCallback())
    trainer.train()
    for entry in _logged(trainer):
        assert entry["loss"] > entry["ce"] + entry["kl"] + 0.01


def test_a_weight_that_is_unfrozen_before_training_is_refused(tmp_path: Path) -> None:
    model = with_lora(toy_llama())
    trainer = _trainer(tmp_path, model, TMKLCallback())
    unwrap(model)[0].model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match=r"1 weights outside the adapter are trainable \(model.norm.weight\)"):
        trainer.train()


def test_a_base_that_is_written_over_in_training_is_told_at_the_next_log(tmp_path: Path) -> None:
    told: list[int] = []

    class Overwrites(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            told.append(sum("weights of the base have changed" in str(each.message) for each in seen))
            if state.global_step == 2:
                unwrap(model)[0].model.norm.weight.data *= 1.1

    trainer = _trainer(tmp_path, with_lora(toy_llama()), TMKLCallback(), max_steps=4)
    trainer.add_callback(Overwrites())
    with warnings.catch_warnings(record=True) as seen:
        trainer.train()
    assert told == [0, 0, 1, 1]  # step 2 is logged after its end, and so told before step 3's
    assert any("(model.norm.weight; by up to 10.0%)" in str(each.message) for each in seen)


def test_an_adapter_that_is_added_after_the_trainer_was_built_is_refused(tmp_path: Path) -> None:
    model = with_lora(toy_llama())
    trainer = _trainer(tmp_path, model, TMKLCallback())
    model.add_adapter("late", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    model.set_adapter("late")
    with pytest.raises(RuntimeError, match="adapter 'late' was added since the base was settled"):
        trainer.train()


def test_an_initial_base_after_the_checkpoint_was_loaded_is_refused(tmp_path: Path) -> None:
    kwargs = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    _trainer(tmp_path, with_lora(toy_llama()), TMKLCallback(base="initial"), **kwargs).train()
    model = with_lora(toy_llama())
    trainer = Trainer(
        model, _arguments(tmp_path, **(kwargs | {"max_steps": 2})), train_dataset=ROWS, data_collator=_collate
    )
    trainer.add_callback(TMKLCallback(base="initial"))
    for _ in range(2):  # nothing of the first attempt is taken for the base in another
        with pytest.raises(ValueError, match="this callback came after the checkpoint was loaded"):
            trainer.train(resume_from_checkpoint=True)
    assert "forward" not in unwrap(model)[0].__dict__


def test_the_first_step_is_logged_to_prove_the_loss_early(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, with_lora(toy_llama()), TMKLCallback(), logging_steps=4, max_steps=4)
    trainer.train()
    assert [entry["step"] for entry in _logged(trainer)] == [1, 4]
    with pytest.raises(RuntimeError, match="over its first 1 steps"):
        _trainer(tmp_path, with_lora(toy_llama()), TMKLCallback(), _Adds, logging_steps=4, max_steps=4).train()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 makes the trainer compute its own loss"),
        ({"kind": SFTConfig, "loss_type": "dft"}, "loss_type='dft' replaces the cross-entropy"),
        ({"kind": RewardConfig}, "TRL's trainer with a RewardConfig trains on another loss than the model's own"),
    ],
)
def test_arguments_that_switch_it_off_are_refused_when_the_trainer_is_built(
    tmp_path: Path, kwargs: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        Trainer(with_lora(toy_llama()), _arguments(tmp_path, **kwargs), train_dataset=ROWS, callbacks=[TMKLCallback()])
    assert message in str(error.value)


def test_models_are_audited_when_the_trainer_is_built(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no adapter layer"):
        _trainer(tmp_path, toy_llama(), TMKLCallback())
    with pytest.raises(ValueError, match=r"takes the options as TMKL\(...\), got float"):
        TMKLCallback(0.5)


def _tokenizer() -> Any:
    """One token a word, with a chat template that marks the assistant's turn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<unk>"])}
    words |= {f"w{i}": i + 6 for i in range(42)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }} {% else %} <assistant> "
        "{% generation %}{{ m.content }} <eos>{% endgeneration %} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <assistant> {% endif %}"
    )
    return fast


LIGER = {"rope": False, "rms_norm": False, "swiglu": False}  # its layers run on GPUs only

CHATS = [
    (
        [{"role": "user", "content": f"w{i} w{i + 1}"}],
        [{"role": "assistant", "content": " ".join(f"w{j}" for j in range(i % 7 + 1))}],
    )
    for i in range(16)
]


def _sft(
    tmp_path: Path, form: str = "completion", cls: type = SFTTrainer, callback: Any = None, **kwargs: Any
) -> SFTTrainer:
    if form == "completion":
        rows = [{"prompt": prompt, "completion": completion} for prompt, completion in CHATS]
    else:
        rows = [{"messages": prompt + completion} for prompt, completion in CHATS]
    return cls(
        toy_llama(),
        _arguments(tmp_path, SFTConfig, **({"max_length": 64} | kwargs)),
        train_dataset=Dataset.from_list(rows),
        processing_class=_tokenizer(),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
        callbacks=[callback or TMKLCallback()],
    )


@pytest.mark.parametrize(
    ("form", "kwargs"),
    [
        ("completion", {"completion_only_loss": True}),
        ("completion", {"completion_only_loss": False}),
        ("messages", {"assistant_only_loss": True}),
        ("messages", {"packing": True}),
        ("completion", {"packing": True, "max_length": 32, "completion_only_loss": True}),
        ("messages", {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
        ("messages", {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
        ("messages", {"padding_free": True, "max_length": None}),
        ("completion", {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}),
        ("completion", {"bf16": True}),
        ("completion", {"loss_type": "chunked_nll"}),
        ("completion", {"use_liger_kernel": True, "liger_kernel_config": LIGER}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else value,
)
def test_sft_trainer_trains_on_the_reference_loss(tmp_path: Path, form: str, kwargs: dict[str, Any]) -> None:
    """Each batch's logged terms are those of the two models' own logits on the batch that the trainer made."""
    if kwargs.get("loss_type") == "chunked_nll" and Version(trl.__version__) < Version("1.4"):
        pytest.skip("this TRL has no chunked_nll")
    if kwargs.get("packing_strategy") == "bfd_split" and Version(trl.__version__) < Version("1.0"):
        pytest.skip("this TRL has no bfd_split")
    if "use_liger_kernel" in kwargs:
        pytest.importorskip("liger_kernel")
        if Version(trl.__version__) < Version("1.15"):
            pytest.skip("this TRL logs no entropy with Liger")
    options = TMKL(weight=0.5)
    trainer = _sft(tmp_path, form, callback=TMKLCallback(options), **({"max_steps": 3} | kwargs))
    base = toy_llama()
    seen: list[Any] = []
    training_step = trainer.training_step

    def step(model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        keys = ("input_ids", "attention_mask", "position_ids", "labels")
        data = {k: v.clone() for k, v in inputs.items() if k in keys}
        adapter = copy.deepcopy({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        seen.append((data, adapter, num_items_in_batch))
        return training_step(model, inputs, num_items_in_batch)

    trainer.training_step = step
    trainer.train()
    logs = _logged(trainer)
    assert len(logs) == 3
    assert {"ce", "kl", "entropy", "mean_token_accuracy"} <= set(logs[-1])
    exact = 2e-2 if kwargs.get("bf16") else 1e-4
    per_step = kwargs.get("gradient_accumulation_steps", 1)
    fresh = with_lora(toy_llama())
    for index, entry in enumerate(logs):
        batches = seen[index * per_step : (index + 1) * per_step]
        fresh.load_state_dict(batches[0][1], strict=False)
        items = sum(int((data["labels"][:, 1:] != -100).sum()) for data, *_ in batches)
        results = [reference_loss(fresh, base, data, options, items) for data, *_ in batches]
        assert entry["ce"] == pytest.approx(sum(float(r.ce) for r in results), rel=exact)
        assert entry["kl"] == pytest.approx(sum(float(r.kl) for r in results), rel=5 * exact, abs=exact / 50)
        # transformers 4 also counts the labels of first positions, which nothing predicts
        loss = sum(float(r.loss.detach()) for r in results) * items / int(batches[0][2])
        assert entry["loss"] == pytest.approx(loss, rel=exact)
        if Version(trl.__version__) >= Version("1.15"):  # which logs that of the targets' positions
            entropies = [_entropy(fresh, data) for data, *_ in batches]
            assert entry["entropy"] == pytest.approx(sum(entropies) / per_step, rel=exact)
    assert logs[0]["kl"] == 0
    assert logs[2]["kl"] > 0


def _entropy(model: nn.Module, data: dict[str, torch.Tensor]) -> float:
    """Nats a token, of the positions with a target."""
    with torch.no_grad():
        logits = model(**model_inputs(data)).logits
    log_p = logits[:, :-1][data["labels"][:, 1:] != -100].double().log_softmax(-1)
    return float(-(log_p.exp() * log_p).sum(-1).mean())


@pytest.mark.parametrize("fused", [{}, {"fused_linear_cross_entropy": True}], ids=["default", "asked for"])
def test_ligers_fused_cross_entropy_does_not_replace_the_loss(tmp_path: Path, fused: dict[str, bool]) -> None:
    """Its layers need a GPU, and are off here; the fused loss is on by default."""
    pytest.importorskip("liger_kernel")
    logs = []
    for settings in ({}, {"use_liger_kernel": True, "liger_kernel_config": LIGER | fused}):
        trainer = _trainer(tmp_path, with_lora(toy_llama(), moved=0.2), TMKLCallback(), **settings)
        trainer.train()
        logs.append([(entry["loss"], entry["ce"], entry["kl"]) for entry in _logged(trainer)])
    assert logs[0] == logs[1]
    assert trainer.args.liger_kernel_config["fused_linear_cross_entropy"] is False


@pytest.mark.parametrize(
    ("kind", "settings"),
    [("DPO", {"loss_type": ["sigmoid", "sft"]}), ("KTO", {})],
    ids=["dpo with an sft term", "kto"],
)
def test_trainers_of_preferences_are_refused(tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    rows = [
        {"prompt": prompt, "completion": answer, "label": True}
        if kind == "KTO"
        else {"prompt": prompt, "chosen": answer, "rejected": [{"role": "assistant", "content": "w1"}]}
        for prompt, answer in CHATS
    ]
    with pytest.raises(ValueError) as error:
        getattr(trl, f"{kind}Trainer")(
            toy_llama(),
            args=_arguments(tmp_path, getattr(trl, f"{kind}Config"), **settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(r=4, target_modules=["q_proj"]),
            callbacks=[TMKLCallback()],
        )
    message = f"TRL's trainer with a {kind}Config trains on another loss than the model's own, and TMKL would not be"
    assert message in str(error.value)


def test_sft_trainer_saves_a_plain_adapter(tmp_path: Path) -> None:
    trainer = _sft(tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert {"sft", "tmkl"} <= set(ModelCard(card).data.tags)
    assert "tmkl" not in SFTTrainer._tag_names
    assert not any("tmkl" in file.name.lower() for file in (tmp_path / "adapter").iterdir())
    loaded = PeftModel.from_pretrained(toy_llama(), str(tmp_path / "adapter")).eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    assert torch.equal(loaded(**inputs).logits, trainer.model.eval()(**inputs).logits)


def test_an_interrupted_training_can_be_started_again(tmp_path: Path) -> None:
    class Interrupt(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and not self.__dict__.setdefault("done", False):
                self.done = True
                raise KeyboardInterrupt

    trainer = _sft(tmp_path, max_steps=2)
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.train()
    assert _logged(trainer)[-1]["kl"] > 0
    trainer.add_callback(Interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    other = Trainer(trainer.model, _arguments(tmp_path), train_dataset=ROWS, data_collator=_collate)
    other.add_callback(TMKLCallback())
    other.train()
    assert _logged(other)[-1]["kl"] > 0
    assert attachment_of(unwrap(other.model)[0]) is None


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_training_that_fails_gives_the_model_back(tmp_path: Path, error: type[BaseException], late: bool) -> None:
    """The next one, without TMKL, is plain; a new SFTTrainer wraps the model's forward once more."""

    class Fail(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1:
                inner.register_forward_pre_hook(fail)

    def fail(*inputs: Any) -> None:
        raise error("out of memory")

    model = with_lora(toy_llama(), moved=0.2)
    inner = unwrap(model)[0].model
    trainer = _trainer(tmp_path, model, Fail() if late else TMKLCallback())
    trainer.add_callback(TMKLCallback() if late else Fail())
    with pytest.raises(error, match="out of memory"):
        trainer.train()
    assert attachment_of(unwrap(model)[0]) is None
    inner._forward_pre_hooks.clear()
    settings = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False, "max_steps": 1}
    for callbacks in ([], [TMKLCallback()]):
        following = SFTTrainer(
            model=model,
            args=_arguments(tmp_path, SFTConfig, **settings),
            train_dataset=Dataset.from_list(ROWS),
            data_collator=_collate,
            processing_class=_tokenizer(),
            callbacks=callbacks,
        )
        following.train()
        assert ("kl" in _logged(following)[-1]) == bool(callbacks)


@pytest.mark.parametrize("late", [False, True])
def test_a_training_that_fails_between_its_steps_gives_the_model_back(tmp_path: Path, late: bool) -> None:
    """The next one is plain: each of its losses is the model's own."""

    class Fail(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    model = with_lora(toy_llama(), moved=0.2)
    trainer = _trainer(tmp_path, model, Fail() if late else TMKLCallback())
    trainer.add_callback(TMKLCallback() if late else Fail())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    alone = with_lora(toy_llama())
    alone.load_state_dict(model.state_dict())
    losses = []
    for each in (model, alone):
        plain = Trainer(each, _arguments(tmp_path), train_dataset=ROWS, data_collator=_collate)
        plain.train()
        losses.append([entry["loss"] for entry in _logged(plain)])
    assert losses[0] == losses[1]
    assert attachment_of(unwrap(model)[0]) is None


def test_a_forward_that_a_late_callback_can_not_tell_is_its_trainers_is_not_left_plain(tmp_path: Path) -> None:
    class Elsewhere(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **kwargs: Any) -> Any:
            with ThreadPoolExecutor(1) as pool:
                return pool.submit(model, **inputs).result().loss

    trainer = Elsewhere(with_lora(toy_llama()), _arguments(tmp_path), train_dataset=ROWS, data_collator=_collate)
    trainer.add_callback(TMKLCallback())
    with pytest.raises(RuntimeError, match="which took TMKL off the model, and the trainer goes on"):
        trainer.train()


def test_a_trainer_that_goes_on_after_a_failed_step_is_stopped(tmp_path: Path) -> None:
    """The callback came late, and something around the step swallows what it raises."""

    class Swallow(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = trainer.training_step

            def training_step(*args: Any, **kwargs: Any) -> torch.Tensor:
                with contextlib.suppress(ZeroDivisionError):
                    return step(*args, **kwargs)
                return torch.zeros(())

            trainer.training_step = training_step

    def fail(*inputs: Any) -> None:
        raise ZeroDivisionError

    model = with_lora(toy_llama(), moved=0.2)
    trainer = Trainer(model, _arguments(tmp_path), train_dataset=ROWS, data_collator=_collate)
    for callback in (TMKLCallback(), Swallow()):
        trainer.add_callback(callback)
    unwrap(model)[0].model.register_forward_pre_hook(lambda *inputs: fail() if trainer.state.global_step else None)
    with pytest.raises(RuntimeError, match="and the trainer goes on: it would train without TMKL"):
        trainer.train()
    assert trainer.state.global_step == 1


def test_an_attachment_is_found_under_trls_wrapper() -> None:
    """Left by a loop of the user's own. TRL's wrapper names the class's forward as what it wraps."""
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL computes the head in its trainer")
    model = with_lora(toy_llama())
    attachment = attach(model)
    utils.add_fused_lm_head(unwrap(model)[0])
    assert attachment_of(unwrap(model)[0]) is attachment
    assert attachment_of(copy.deepcopy(unwrap(model)[0])) is None
    with pytest.warns(UserWarning, match="the wrapper stays in place; TMKL's part of it is off"):
        detach(model)
    assert attachment_of(unwrap(model)[0]) is None
    with pytest.raises(ValueError, match="TMKL is not attached"):
        detach(model)


@pytest.mark.parametrize("cls", [Trainer, SFTTrainer])
def test_context_anchors_have_their_own_denominator_in_each_trainer(tmp_path: Path, cls: type) -> None:
    """One batch of 8 or 8 of 1: same losses and same weights; and the same as by hand."""
    options = TMKL(weight=0.5, context_weight=0.8)
    base = toy_llama()
    start = with_lora(copy.deepcopy(base), moved=0.2)
    logs, weights = [], []
    for size, steps in ((8, 1), (1, 8)):
        model = copy.deepcopy(start)
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        settings["remove_unused_columns"] = False
        if cls is Trainer:
            trainer = _trainer(tmp_path, model, TMKLCallback(options), **settings)
        else:
            trainer = SFTTrainer(
                model=model,
                args=_arguments(tmp_path, SFTConfig, dataset_kwargs={"skip_prepare_dataset": True}, **settings),
                train_dataset=Dataset.from_list(ROWS),
                data_collator=_collate,
                processing_class=_tokenizer(),
                callbacks=[TMKLCallback(options)],
            )
        trainer._get_train_sampler = lambda *a: torch.utils.data.SequentialSampler(ROWS)
        trainer.train()
        assert "get_batch_samples" not in vars(trainer)
        logs.append(_logged(trainer))
        weights.append([p.detach() for p in model.parameters() if p.requires_grad])
    for one, accumulated in zip(*logs, strict=True):
        for name in ("loss", "ce", "kl", "context_kl"):
            assert accumulated[name] == pytest.approx(one[name], rel=1e-3), name
        assert one["loss"] == pytest.approx(one["ce"] + 0.5 * one["kl"] + 0.8 * one["context_kl"], rel=1e-3)
        assert one["context_kl"] > 0.01
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*weights, strict=True))
    expected = reference_loss(start, base, _collate(ROWS[:8]), options)
    assert logs[0][0]["context_kl"] == pytest.approx(float(expected.context_kl), rel=1e-4)
    assert logs[0][0]["loss"] == pytest.approx(float(expected.loss), rel=1e-4)


def test_another_tools_way_to_collect_batches_is_kept(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, with_lora(toy_llama(), moved=0.2), TMKLCallback(TMKL(context_weight=0.5)))
    own, calls = trainer.get_batch_samples, []

    def theirs(*arguments: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*arguments, **kwargs)

    trainer.get_batch_samples = theirs
    trainer.train()
    assert len(calls) >= 2
    assert trainer.get_batch_samples is theirs
