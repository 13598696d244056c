"""Packaged models: names, errors that teach, and a conversion that is whole or not there."""

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
