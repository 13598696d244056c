"""TMKL's settings as frameworks hold them: `tmkl_*` keys of a YAML file, or of the environment."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from mask_the_target.anchors import Anchors
from mask_the_target.base import BaseChoice
from mask_the_target.integrations.transformers import TMKLCallback
from mask_the_target.objective import TMKL

PREFIX = "tmkl_"
_OPTIONS = tuple(field.name for field in fields(TMKL))
# The fields of TMKL, and what TMKLCallback takes beside them.
KEYS = tuple(PREFIX + name for name in (*_OPTIONS, "base", "full_kl", "max_drift", "anchors", "anchor_share"))
_BASES = (*get_args(BaseChoice), "cached")


def callback_from(settings: Mapping[str, Any], where: str) -> TMKLCallback:
    """The callback that ``settings`` describe.

    Args:
        settings: ``tmkl_*`` keys (:data:`KEYS`) and their values; text that is a JSON value is taken as that value,
            since YAML reads 1e-3, and the environment everything, as text. None is a key that isn't given.
        where: what holds them, for messages.

    Raises:
        ValueError: for an unknown key, with the nearest valid one, or a value that means nothing.
    """
    for key in settings:
        if key not in KEYS:
            close = difflib.get_close_matches(key, KEYS, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            raise ValueError(f"{where}: unknown key {key!r}. {hint}Known: {', '.join(KEYS)}.")
    given = {key.removeprefix(PREFIX): _value(value) for key, value in settings.items() if value is not None}
    base = given.pop("base", "auto")
    if base not in _BASES:
        raise ValueError(f"{where}: tmkl_base is {base!r}; choose one of {', '.join(_BASES)}.")
    if not isinstance(given.get("full_kl", False), bool):
        raise ValueError(f"{where}: tmkl_full_kl is {given['full_kl']!r}; give true or false.")
    beside = {name: given.pop(name) for name in ("full_kl", "max_drift") if name in given}
    anchors = _anchors(given, where)
    return TMKLCallback(TMKL(**given), base=base, anchors=anchors, **beside)


def _anchors(given: dict[str, Any], where: str) -> Anchors | None:
    """Of ``given``, which they are taken out of."""
    source, share = given.pop("anchors", "none"), given.pop("anchor_share", None)
    if not isinstance(source, str):
        raise ValueError(f"{where}: tmkl_anchors is {source!r}; give auto, none, or a file of JSON Lines.")
    if source != "none":
        return Anchors(source) if share is None else Anchors(source, share=share)
    if share is not None:
        raise ValueError(f"{where}: tmkl_anchor_share is {share!r}, and there are no anchors. Set tmkl_anchors: auto.")
    return None


def _value(value: Any) -> Any:
    """Of an environment variable or a YAML that reads 1e-1 as text; also Python's way to write true and false."""
    if value in ("True", "False"):
        value = value.lower()
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value
