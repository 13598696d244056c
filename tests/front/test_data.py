"""Data sets by name, and what their tokens are checked for. What a user is told: test_train.py."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl")

from datasets import Dataset

from mask_the_target.front.data import Supervision, check_labels, load_data
from mask_the_target.front.options import parse


def test_csv_parquet_folder_and_split_slices(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["what is", "say"] * 3, "completion": [" paris", " rome"] * 3})
    rows.to_csv(tmp_path / "data.csv")
    rows.to_parquet(tmp_path / "data.parquet")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows.to_json(folder / "train.jsonl")
    for name in ("data.csv", "data.parquet", "folder"):
        argv = ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(tmp_path / name)]
        data = load_data(parse([*argv, "--dataset_train_split", "train[1:5]"]))
        assert data.train["completion"][:2] == [" rome", " paris"]
        assert len(data.train) == 4
    argv = ["--output_dir", str(tmp_path / "out"), "--dataset_name", str(tmp_path / "data.csv")]
    with pytest.raises(ValueError, match="a part of a split, which streaming can't cut"):
        load_data(parse([*argv, "--dataset_train_split", "train[1:5]", "--dataset_streaming", "true"]))


def test_check_labels_on_packed_rows_and_bad_rows() -> None:
    rows = Dataset.from_dict(
        {
            "input_ids": [[1, 2, 3, 4], [5, 6]],
            "labels": [[-100, 2, 3, -100], [5, -100]],
            "seq_lengths": [[2, 2], [2]],
        }
    )
    # Document 0 supervises token 1; document 1 only its own first token, which nothing predicts; document 2 likewise.
    assert check_labels(rows, 10) == Supervision(documents=3, unsupervised=2, tokens=1)
    with pytest.raises(ValueError, match=r"Row 1 of .* has the input id 6, outside the model's vocabulary of 6"):
        check_labels(rows.remove_columns("labels"), 6)
    with pytest.raises(ValueError, match="has the label -3"):
        check_labels(Dataset.from_dict({"labels": [[1, -3]]}), 6)
