"""Plain documents for recipes/smollm2-documents.yaml: Italian conversations of the package chatterbot-corpus, as text.

    python recipes/italian.py runs/italian.jsonl

A document is a conversation, its turns a line each, none twice, in one order on every machine.
"""

import json
import random
import sys
from pathlib import Path

import yaml

from mask_the_target.files import write_whole
from mask_the_target.front.backbones import package_folder


def main(file: Path) -> None:
    folder = package_folder("chatterbot_corpus", "these documents", "pip install --no-deps chatterbot-corpus==1.3.3")
    found = {}
    for path in sorted((folder / "data" / "italian").glob("*.yml")):
        for turns in yaml.safe_load(path.read_text(encoding="utf-8"))["conversations"]:
            text = "\n".join(" ".join(turn.split()) for turn in turns if isinstance(turn, str))
            if len(text) >= 40:
                found[text] = None
    rows = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in found]
    random.Random(0).shuffle(rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, "".join(rows).encode())
    print(f"{len(rows)} documents in {file}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
