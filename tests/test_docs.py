"""What the README and the documentation tell people to write: it compiles, resolves, and is taken."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mask_the_target.cli import COMMANDS
from mask_the_target.integrations.settings import KEYS

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """Page and text of each code block, with the files that it includes."""
    for page in PAGES:
        for found in re.finditer(rf"^( *)```{language}\n(.*?)^\1```", page.read_text(encoding="utf-8"), re.M | re.S):
            lines = [line.removeprefix(found[1]) for line in found[2].splitlines()]
            text = "\n".join(lines)
            included = re.sub(r'^--8<-- "(.*)"$', lambda name: (ROOT / name[1]).read_text(), text, flags=re.M)
            assert "8<" not in included.replace(" ", ""), f"{page.name} includes no file: {text}"
            yield page.name, included


def test_python_compiles_and_our_names_are_there() -> None:
    imported = set()
    for page, text in blocks("python"):
        tree = ast.parse(text, page)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mask_the_target"):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{page}: {node.module} has no {name.name}"
                    imported.add(name.name)
    assert {"TMKL", "TMKLCallback", "attach"} <= imported


def test_commands_are_there() -> None:
    found = set()
    for page, text in blocks("sh"):
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["mtt"]:
                assert words[1] in COMMANDS, f"{page}: {line}"
                found.add(words[1])
    assert {"train", "eval", "sweep", "report", "demo"} <= found


def test_yaml_is_yaml_and_our_keys_are_taken() -> None:
    found = set()
    for page, text in blocks("yaml"):
        for key in yaml.safe_load(text):
            if key.startswith("tmkl"):
                assert key in KEYS, f"{page}: {key}"
                found.add(key)
    assert "tmkl_weight" in found


def test_each_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f": {page.name}\n" not in navigation] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_linked_exist(page: Path) -> None:
    """The site's own links are checked when it is built; these are read in the repository as well."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_evidence_is_what_the_results_say() -> None:
    """Each table of each study stands in the evidence; each of the README's lines about them is one of its own."""
    from benchmarks import evidence

    studies = [file.parent for file in sorted((ROOT / "results").glob("*/report.figures.csv"))]
    assert studies
    page = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    tables = {f"{study.name}: {name}": table for study in studies for name, table in evidence.tables(study).items()}
    for name, table in tables.items():
        assert table in page, name
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("**Fronts") : readme.index("## Install")]
    lines = [line for line in section.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    known = {line for table in tables.values() for line in table.splitlines()}
    assert len(lines) > 4
    assert [line for line in lines if line.replace("**", "") not in known] == []
