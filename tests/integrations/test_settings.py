"""`tmkl_*` keys of a framework's config."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from mask_the_target import TMKL, Anchors
from mask_the_target.cli import main
from mask_the_target.integrations.settings import callback_from


def test_keys_become_the_callbacks_options_also_as_text() -> None:
    """YAML reads 1e-1 as text, and an environment variable is nothing else."""
    settings = {
        "tmkl_weight": "1e-1",
        "tmkl_mask_target": "false",
        "tmkl_divergence": "jsd",
        "tmkl_context_tokens": None,
    }
    callback = callback_from(settings | {"tmkl_full_kl": "true"}, "here")
    assert callback.options == TMKL(weight=0.1, mask_target=False, divergence="jsd")
    assert callback.full_kl is True
    callback = callback_from({"tmkl_full_kl": "False", "tmkl_mask_target": "False"}, "here")
    assert (callback.full_kl, callback.options.mask_target) == (False, False)
    assert callback_from({}, "here").options == TMKL()


def test_anchors_are_a_word_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "anchors.jsonl"
    file.write_text('{"text": "a b"}\n')
    settings = {"tmkl_context_weight": 1, "tmkl_anchors": str(file), "tmkl_anchor_share": "0.5"}
    assert callback_from(settings, "here").anchors == Anchors(str(file), share=0.5)
    assert callback_from({"tmkl_context_weight": 1, "tmkl_anchors": "auto"}, "here").anchors == Anchors()
    assert callback_from({"tmkl_anchors": "none"}, "here").anchors is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"tmkl_wieght": 1},
            "here: unknown key 'tmkl_wieght'. Did you mean 'tmkl_weight'? Known: tmkl_weight, tmkl_div",
        ),
        ({"tmkl_base": "of"}, "here: tmkl_base is 'of'; choose one of auto, off, initial, cached."),
        ({"tmkl_weight": "much"}, "TMKL: weight='much' is not possible; it must be >= 0"),
        ({"tmkl_full_kl": "no"}, "here: tmkl_full_kl is 'no'; give true or false."),
        ({"tmkl_max_drift": 0.1}, "max_drift=0.1 without a context_weight has no effect"),
        ({"tmkl_anchors": "auto"}, "without a context_weight has no effect"),
        ({"tmkl_anchors": False}, "here: tmkl_anchors is False; give auto, none, or a file of JSON Lines."),
        ({"tmkl_anchors": "none.jsonl", "tmkl_context_weight": 1}, "Anchors: there is no file 'none.jsonl'"),
        ({"tmkl_anchors": "auto", "tmkl_anchor_share": "much"}, "Anchors: share='much' must lie between 0 and 1"),
        ({"tmkl_anchor_share": 0.5}, "here: tmkl_anchor_share is 0.5, and there are no anchors. Set tmkl_anchors"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        callback_from(settings, "here")
    assert message in str(error.value)


@pytest.mark.skipif(find_spec("llamafactory") is not None, reason="LLaMA-Factory is installed")
def test_the_launcher_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llamafactory", "some.yaml"]) == 2
    message = "mtt llamafactory needs LLaMA-Factory (No module named 'llamafactory'). Install it with: pip install"
    assert message in capsys.readouterr().err
