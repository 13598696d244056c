"""`mtt train` end to end on a toy Llama: what a user meets, from the YAML file to the saved adapter."""

from __future__ import annotations

import json
import signal
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("trl")

from peft import PeftModel
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from mask_the_target import TMKL
from mask_the_target.cli import main
from mask_the_target.front import train
from mask_the_target.front.options import parse
from mask_the_target.front.probes import encode_row, evenly

WORDS = ["the", "capital", "of", "what", "is", "say", "please", "france", "spain", "italy", "paris", "madrid", "rome"]
TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_model(folder: Path) -> Path:
    """A Llama of 12k parameters with a word tokenizer and a chat template, as an ordinary model folder."""
    special = ["<pad>", "<unk>", "<end>", "<user>", "<assistant>", "<system>"]
    vocabulary = {word: number for number, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", chat_template=TEMPLATE
    )
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=vocabulary["<end>"],
        pad_token_id=vocabulary["<pad>"],
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def make_rows(count: int = 16) -> list[dict[str, Any]]:
    cities = {"france": "paris", "spain": "madrid", "italy": "rome"}
    rows = []
    for number in range(count):
        country = sorted(cities)[number % 3]
        tail = " please" * (number % 4)
        question = {"role": "user", "content": f"what is the capital of {country}{tail}"}
        rows.append({"prompt": [question], "completion": [{"role": "assistant", "content": cities[country]}]})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """A TRL user's YAML file, as it would be for `trl sft`."""
    settings = {
        "model_name_or_path": str(model),
        "dataset_name": str(write_rows(folder / "data.jsonl", make_rows())),
        "output_dir": str(folder / "out"),
        "use_peft": True,
        "lora_r": 4,
        "lora_dropout": 0.0,
        "learning_rate": 1.0e-2,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 2,
        "disable_tqdm": True,
    }
    path = folder / "sft.yaml"
    path.write_text(yaml.safe_dump(settings | changes, sort_keys=False))
    return path


@pytest.fixture
def config(tmp_path: Path, model: Path) -> Path:
    return write_config(tmp_path, model)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(2, 18)[None] if ids is None else ids).logits


class Grab(TrainerCallback):
    """Keeps the trained model's own logits, to compare with what is loaded from disk."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.logits = logits(kwargs["model"])


# ------------------------------------------------------------------------------------------------ a run, end to end


@pytest.mark.parametrize("method", ["ce", "tmkl"])
def test_adapter_loads_in_plain_peft_with_the_same_logits(
    config: Path, model: Path, tmp_path: Path, method: str
) -> None:
    grab = Grab()
    train.run(parse([str(config), "--method", method]), [grab])
    base = AutoModelForCausalLM.from_pretrained(model)
    before = logits(base)
    after = logits(PeftModel.from_pretrained(base, tmp_path / "out"))
    torch.testing.assert_close(after, grab.logits, rtol=0, atol=1e-6)
    assert (after - before).abs().max() > 1e-2


def test_without_our_keys_a_trl_config_trains_with_tmkl(config: Path, tmp_path: Path) -> None:
    record = train.run(parse([str(config)]))
    assert record["method"]["method"] == "tmkl"
    steps = [entry for entry in record["log_history"] if "kl" in entry]
    assert len(steps) == 6
    assert abs(steps[0]["kl"]) < 1e-6  # LoRA starts as the base
    assert steps[-1]["kl"] > 0
    for entry in steps:
        assert entry["loss"] == pytest.approx(entry["ce"] + 0.1 * entry["kl"] + 3 * entry["context_kl"], abs=2e-4)


def test_example_config() -> None:
    settings = parse([str(Path(__file__).parents[2] / "examples" / "sft.yaml"), "--seed", "4"])
    assert settings.tmkl.options().weight == 1.0
    assert settings.script.dataset_name == "recipe:arpabet"
    assert settings.training.learning_rate == 1e-3
    assert settings.training.seed == 4


def test_run_json_and_model_card(config: Path, tmp_path: Path) -> None:
    assert main(["train", str(config), "--tmkl_weight", "0.5", "--seed", "3"]) == 0
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["method"]["tmkl_weight"] == 0.5
    assert record["seed"] == 3
    assert record["steps"] == 6
    assert record["supervision"] == {"documents": 16, "unsupervised": 0, "tokens": 48 - 16}
    assert record["data"]["fingerprint"].startswith("sha256:")
    assert record["versions"]["torch"] == torch.__version__
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("2605.29498", "PeftModel.from_pretrained", "weight 0.5", str(tmp_path / "data.jsonl"), "mtt eval"):
        assert part in card
    assert not list((tmp_path / "out").glob("*.bin.tmp"))


@pytest.mark.parametrize("method", ["ce", "tmkl"])
def test_resuming_gives_the_weights_of_an_uninterrupted_run(config: Path, tmp_path: Path, method: str) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.run(parse([str(config), "--method", method, "--output_dir", str(whole)]))
    argv = [str(config), "--method", method, "--output_dir", str(cut)]
    with pytest.raises(train.Interrupted, match=r"after step 3 of 6.*--resume_from_checkpoint last"):
        train.run(parse(argv), [PressCtrlC()])
    assert not (cut / "adapter_model.safetensors").exists()
    assert json.loads((cut / "run.json").read_text())["status"] == "running"
    # A checkpoint that a crash left half-written is not trusted, though its number is higher.
    half = cut / "checkpoint-5"
    half.mkdir()
    (half / "trainer_state.json").write_text('{"global_step": 5, "log_his')
    record = train.run(parse([*argv, "--resume_from_checkpoint", "last"]))
    assert record["steps"] == 6
    expected, found = weights(whole), weights(cut)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name


def test_resume_refuses_other_settings_and_a_second_run_in_one_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--max_steps", "2"]) == 0
    assert main(["train", str(config)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", str(config), "--resume_from_checkpoint", "last", "--tmkl_weight", "2"]) == 2
    assert "tmkl_weight was 0.1 and is now 2.0" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["ce", "tmkl"])
def test_nan_stops_before_the_weights_change_and_saves_the_batch(config: Path, tmp_path: Path, method: str) -> None:
    class Poison(TrainerCallback):
        """At step 3 the head becomes NaN, so the loss does."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                self.adapter = {n: p.detach().clone() for n, p in kwargs["model"].named_parameters() if "lora" in n}
                self.model = kwargs["model"]
                kwargs["model"].get_output_embeddings().weight.data[0, 0] = float("nan")

    poison = Poison()
    with pytest.raises(train.BadLossError, match=r"loss became nan in step 4.*checkpoint-2"):
        train.run(parse([str(config), "--method", method]), [poison])
    for name, parameter in poison.model.named_parameters():
        if "lora" in name:
            assert torch.equal(parameter, poison.adapter[name])
    saved = load_file(tmp_path / "out" / "bad_batch" / "batch.safetensors")
    assert saved["input_ids"].shape == saved["labels"].shape
    assert saved["input_ids"].shape[0] == 4
    note = json.loads((tmp_path / "out" / "bad_batch" / "batch.json").read_text())
    assert note["optimizer_steps_done"] == 3
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path / "out" / "checkpoint-2").values())
    assert not (tmp_path / "out" / "checkpoint-4").exists()


def test_infinite_gradient_stops_too(config: Path, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            parameter = next(p for n, p in kwargs["model"].named_parameters() if "lora_B" in n)
            parameter.register_hook(lambda gradient: gradient * float("inf"))

    with pytest.raises(train.BadLossError, match="gradient became"):
        train.run(parse([str(config), "--method", "ce"]), [Poison()])
    assert (tmp_path / "out" / "bad_batch" / "batch.safetensors").exists()


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "what is", "completion": " paris"}],
        [{"messages": [{"role": "user", "content": "what"}, {"role": "assistant", "content": "paris"}]}],
        [{"text": "the capital of france is paris"}],
    ],
    ids=["prompt-completion", "messages", "text"],
)
def test_data_forms(config: Path, tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    data = write_rows(tmp_path / "form.jsonl", rows * 4)
    record = train.run(parse([str(config), "--dataset_name", str(data), "--max_steps", "1"]))
    assert record["supervision"]["documents"] == 4


def test_packing_counts_documents(config: Path, tmp_path: Path) -> None:
    argv = [str(config), "--packing", "true", "--max_length", "64", "--max_steps", "1", "--method", "ce"]
    record = train.run(parse(argv))
    assert record["supervision"] == {"documents": 16, "unsupervised": 0, "tokens": 32}


# ------------------------------------------------------------------------------------- what a wrong input is answered


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["train", *argv]) == 2
    return " ".join(capsys.readouterr().err.split())


def test_unknown_options_and_values(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_line(line: str) -> str:
        path = tmp_path / "bad.yaml"
        path.write_text(config.read_text() + line + "\n")
        return str(path)

    assert "Unknown option 'tmkl_wieght' in" in (found := refused([with_line("tmkl_wieght: 1")], capsys))
    assert "Did you mean 'tmkl_weight'?" in found
    assert "Unknown option '--lora-rank'" in refused([str(config), "--lora-rank", "4"], capsys)
    assert "max_steps: 'soon' is not a valid int" in refused([with_line("max_steps: soon")], capsys)
    assert "tmkl_divergence: 'backward' is not one of" in refused([with_line("tmkl_divergence: backward")], capsys)
    assert "eval_strategy" in refused([with_line("eval_strategy: sometimes")], capsys)
    assert "weight" in refused([str(config), "--tmkl_weight", "-1"], capsys)
    assert "no config file 'none.yaml'" in refused(["none.yaml"], capsys)
    assert "must hold 'key: value' lines" in refused(
        [str(write_rows(tmp_path / "list.yaml", [{}]))[:0] or str(_list_file(tmp_path))], capsys
    )


def _list_file(tmp_path: Path) -> Path:
    path = tmp_path / "list.yaml"
    path.write_text("- one\n- two\n")
    return path


def test_impossible_combinations(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "full fine-tune" in refused([str(config), "--use_peft", "false"], capsys)
    assert "label_smoothing_factor is 0.1" in refused([str(config), "--label_smoothing_factor", "0.1"], capsys)
    assert "'dft'" in refused([str(config), "--loss_type", "dft"], capsys)
    parse([str(config), "--loss_type", "dft", "--method", "ce"])  # plain CE may


def test_without_a_choice_the_recommended_weights_are_taken(config: Path) -> None:
    def options(*argv: str) -> TMKL:
        return parse([str(config), *argv]).tmkl.options()

    assert options() == options("--max_drift", "0.1") == TMKL.recommended() != TMKL()
    assert options("--tmkl_weight", "1") == options("--method", "ce") == TMKL()
    assert options("--tmkl_divergence", "jsd") == TMKL(divergence="jsd")


def test_data_that_cannot_work(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def with_rows(rows: list[dict[str, Any]], *more: str) -> str:
        return refused([str(config), "--dataset_name", str(write_rows(tmp_path / "bad.jsonl", rows)), *more], capsys)

    assert "no data file" in refused([str(config), "--dataset_name", str(tmp_path / "no.jsonl")], capsys)
    assert "the column 'completion' is missing. Columns found: answer, prompt" in with_rows(
        [{"answer": "a", "prompt": "b"}]
    )
    assert "needs 'prompt' and 'completion', or 'messages', or 'text'. Columns found: question" in with_rows(
        [{"question": "what"}]
    )
    assert "row 1 has no 'completion'" in with_rows([{"prompt": "a", "completion": "b"}, {"prompt": "a"}])
    assert "is empty" in with_rows([])
    assert "has no split 'validation'; it has: train" in with_rows(make_rows(2), "--dataset_train_split", "validation")
    assert "split 'train[5:9]' of" in with_rows(make_rows(2), "--dataset_train_split", "train[5:9]")
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    assert "cannot be read" in refused([str(config), "--dataset_name", str(tmp_path / "broken.jsonl")], capsys)
    assert "Unknown recipe 'recipe:nope'. Known: recipe:arpabet" in refused(
        [str(config), "--dataset_name", "recipe:nope"], capsys
    )
    assert "row 1 of" in with_rows(
        [{"input_ids": [3, 4, 5], "labels": [3, 4, 5]}, {"input_ids": [3, 4, 5], "labels": [-100, 4, 99]}]
    ).replace("Row", "row")


def test_model_that_is_not_there(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "The model './nowhere' cannot be" in refused([str(config), "--model_name_or_path", "./nowhere"], capsys)


def test_unsupervised_sequences_are_counted_and_refused_if_all(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = make_rows(6)
    rows[2]["prompt"][0]["content"] = "what " * 40  # max_length leaves only the prompt
    argv = [str(config), "--dataset_name", str(write_rows(tmp_path / "some.jsonl", rows)), "--max_length", "24"]
    assert main(["train", *argv, "--max_steps", "1"]) == 0
    assert "1 of 6 sequences have no supervised token" in capsys.readouterr().err
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["supervision"]["unsupervised"] == 1
    argv += ["--max_length", "4", "--output_dir", str(tmp_path / "other")]
    assert "None of the 6 sequences" in refused(argv, capsys)


@pytest.mark.parametrize("packing", [False, True])
def test_the_cached_base_trains_the_same_and_is_filled_beforehand(
    config: Path, tmp_path: Path, packing: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three epochs: losses as without the cache; `mtt cache` leaves no base pass to the run but the first proof's."""
    monkeypatch.setenv("MTT_CACHE", str(tmp_path / "cache"))
    options = ["--max_steps", "12", "--packing", str(packing).lower(), "--max_length", "40"]
    losses = {}
    for base in ("auto", "cached"):
        output = tmp_path / base
        if base == "cached":
            assert main(["cache", str(config), *options, "--output_dir", str(tmp_path / "unused")]) == 0
            assert "MiB of hidden states in" in capsys.readouterr().out
            shards = {path.name for path in (tmp_path / "cache").rglob("*.safetensors")}
            assert shards
        assert main(["train", str(config), *options, "--base", base, "--output_dir", str(output)]) == 0
        history = json.loads((output / "run.json").read_text())["log_history"]
        losses[base] = [entry["loss"] for entry in history if "loss" in entry]
    assert losses["cached"] == pytest.approx(losses["auto"], rel=1e-3)
    assert {path.name for path in (tmp_path / "cache").rglob("*.safetensors")} == shards  # all was there
    assert main(["cache", str(config), *options, "--output_dir", str(tmp_path / "unused")]) == 0
    assert "(0 sequences were there already)" not in capsys.readouterr().out


def test_a_cache_over_its_limit_is_refused_before_anything_is_computed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTT_CACHE", str(tmp_path / "cache"))
    for command in ("cache", "train"):
        assert main([command, str(config), "--base", "cached", "--cache_limit_gib", "1e-7"]) == 2
        assert "over the limit of" in capsys.readouterr().err
    assert main(["train", str(config), "--base", "cached", "--cache_limit_gib", "0"]) == 2
    assert "limit_gib=0.0" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- anchors and a budget


def test_anchors_and_a_budget_survive_an_interruption(tmp_path: Path, model: Path) -> None:
    """Stopped and gone on with: the weights of a run that was not, with the anchors that were written once."""
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[n % 7 :])} for n in range(16)])
    more = {"dataset_name": str(texts), "tmkl_context_weight": 1.0, "anchors": "auto", "max_drift": 1e-3}
    config = write_config(tmp_path, model, **more)

    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 2:
                signal.raise_signal(signal.SIGINT)

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    record = train.run(parse([str(config), "--output_dir", str(whole)]))
    logged = [row for row in record["log_history"] if "loss" in row]
    assert logged[-1]["context_kl"] > 0
    assert logged[0]["context_weight"] == 1.0 < logged[-1]["context_weight"]
    with pytest.raises(train.Interrupted):
        train.run(parse([str(config), "--output_dir", str(cut)]), [PressCtrlC()])
    (written,) = cut.glob("anchors-*.jsonl")
    before = written.stat().st_mtime_ns
    train.run(parse([str(config), "--output_dir", str(cut), "--resume_from_checkpoint", "last"]))
    assert written.stat().st_mtime_ns == before
    assert all(torch.equal(weight, weights(cut)[name]) for name, weight in weights(whole).items())
    card = (whole / "README.md").read_text()
    assert "anchors auto, anchor_share 0.25, max_drift 0.001" in card
    assert "replay" not in card


def test_without_a_choice_data_without_prompts_get_anchors_and_it_is_said(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": " ".join(WORDS[n % 7 :])} for n in range(16)])
    config = write_config(tmp_path, model, dataset_name=str(texts), max_steps=1)

    def trained(name: str, *more: str) -> tuple[dict[str, Any], str]:
        settings = parse([str(config), "--output_dir", str(tmp_path / name), *more])
        return train.run(settings)["method"], capsys.readouterr().err

    method, said = trained("auto")
    assert (method["anchors"], method["tmkl_weight"], method["tmkl_context_weight"]) == ("auto", 0.0, 1.0)
    assert f"Note: every token of {texts} is a target, so there are no prompts to hold. The base writes 512" in said
    assert list((tmp_path / "auto").glob("anchors-*.jsonl"))
    assert main(["cache", str(config)]) == 2
    assert "nothing to fill a cache with: every token of" in capsys.readouterr().err
    method, said = trained("none", "--anchors", "none")
    assert (method["anchors"], method["tmkl_weight"]) == ("none", TMKL.recommended().weight)
    method, again = trained("paper", "--tmkl_weight", "1")
    assert (method["anchors"], method["tmkl_context_weight"]) == ("none", 0.0)
    assert "Note: every token" not in said + again


def test_anchors_of_a_file_are_replay_unless_a_model_wrote_them_and_the_card_says_which(
    config: Path, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "anchors.jsonl"
    asked = ["anchors", "--model", str(model), "--count", "6", "--length", "5", "--output", str(file)]
    assert main(asked) == 0
    assert len(file.read_text().splitlines()) == 6
    assert main(asked) == 2
    assert "exists already" in capsys.readouterr().err
    given = [str(config), "--anchors", str(file)]
    assert "without a context_weight has no effect" in refused([*given, "--tmkl_weight", "1"], capsys)
    given += ["--tmkl_context_weight", "0.5"]
    assert "anchors and max_drift are parts of TMKL" in refused([*given, "--method", "ce"], capsys)
    assert "share=2.0 must lie between" in refused([*given, "--anchor_share", "2"], capsys)
    assert "there is no file" in refused([*given, "--anchors", "none.jsonl"], capsys)
    assert main(["train", *given]) == 0
    assert f"anchors {file} (written by a model)" in (tmp_path / "out/README.md").read_text()
    data = write_rows(tmp_path / "rows.jsonl", make_rows(4))
    assert main(["train", *given, "--anchors", str(data), "--output_dir", str(tmp_path / "replay")]) == 0
    assert f"anchors {data} (data, so this is replay)" in (tmp_path / "replay/README.md").read_text()


# ------------------------------------------------------------------------------------------------- drift in the log


@pytest.mark.parametrize("options", [{"method": "ce"}, {"method": "tmkl"}, {"method": "l2", "rival_weight": 0.1}])
def test_drift_is_logged_for_every_method_and_changes_nothing(
    tmp_path: Path, model: Path, options: dict[str, Any]
) -> None:
    held_out = {"dataset_train_split": "train[:12]", "dataset_test_split": "train[12:]"}
    logged = write_config(tmp_path, model, logging_steps=2, drift_rows=3, **held_out, **options)
    assert main(["train", str(logged)]) == 0
    history = json.loads((tmp_path / "out/run.json").read_text())["log_history"]
    at = {row["step"]: (row["held_out_kl"], row["held_out_full_kl"]) for row in history if "loss" in row}
    assert list(at)[-3:] == [2, 4, 6]  # and TMKL logs its first step

    # The figure of step 4 against the checkpoint and a base that is loaded apart.
    base = AutoModelForCausalLM.from_pretrained(model)
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(tmp_path / "out/checkpoint-4"))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    masked, full = [], []
    for row in evenly(make_rows()[12:], 3):
        prompt, answer = encode_row(tokenizer, row)
        ids = torch.tensor([prompt + answer])
        for place in range(len(prompt), ids.shape[1]):
            p, q = (logits(one, ids)[0, place - 1].double().softmax(-1) for one in (base, adapted))
            full.append((p * (p / q).log()).sum().item())
            kept = torch.arange(len(p)) != ids[0, place]
            p, q = p[kept] / p[kept].sum(), q[kept] / q[kept].sum()
            masked.append((p * (p / q).log()).sum().item())
    assert at[4] == pytest.approx((statistics.fmean(masked), statistics.fmean(full)), rel=1e-4)

    plain = write_config(tmp_path, model, output_dir=str(tmp_path / "plain"), **held_out, **options)
    assert main(["train", str(plain)]) == 0
    for name, weight in weights(tmp_path / "plain").items():
        assert torch.equal(weight, weights(tmp_path / "out")[name])


def test_drift_with_pissa_is_against_the_true_base(tmp_path: Path, model: Path) -> None:
    """With the adapter off, PiSSA's model is not the base: a learning rate of nothing must give a drift of nothing."""
    config = write_config(
        tmp_path, model, adapter="pissa", method="ce", learning_rate=1e-12, drift_rows=3, dataset_test_split="train"
    )
    assert main(["train", str(config)]) == 0
    history = json.loads((tmp_path / "out/run.json").read_text())["log_history"]
    assert all(abs(row["held_out_full_kl"]) < 1e-6 for row in history if "loss" in row)


def test_drift_needs_held_out_prompts_and_completions(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "has no split 'test'" in refused([str(config), "--drift_rows", "3"], capsys)
    assert "drift_rows is -1; it is a number of rows" in refused([str(config), "--drift_rows", "-1"], capsys)
    texts = write_rows(tmp_path / "texts.jsonl", [{"text": "the capital"}] * 4)
    options = ["--dataset_name", str(texts), "--dataset_test_split", "train", "--drift_rows", "2"]
    assert "on held-out rows with 'prompt' and 'completion'" in refused([str(config), *options], capsys)
