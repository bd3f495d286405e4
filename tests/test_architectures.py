"""The registry as data, and names that may not change."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import model_zoo
import pytest

import hf_unfreeze
from hf_unfreeze import Architecture, layer_groups, list_architectures, register_architecture
from hf_unfreeze.architectures import BUILT_IN, find_architecture, markdown_table
from hf_unfreeze.errors import StructureError

SNAPSHOT = Path(__file__).parent / "data" / "group_names.json"
PROMISED = [
    "bert", "roberta", "xlm-roberta", "distilbert", "electra", "deberta", "deberta-v2", "albert", "mpnet",
    "camembert", "xlnet", "modernbert", "longformer", "big_bird", "gpt2", "gpt_neox", "llama", "mistral",
    "mixtral", "qwen2", "qwen3", "gemma2", "phi3", "opt", "bloom", "falcon", "t5", "bart", "mbart", "marian",
    "pegasus", "vit", "deit", "beit", "dinov2", "swin", "convnext", "segformer", "clip", "siglip", "whisper",
    "wav2vec2", "hubert", "wavlm",
]  # fmt: skip


def test_every_promised_row_is_there():
    rows = [row.model_type for row in list_architectures()]
    assert set(PROMISED) <= set(rows)
    assert rows == sorted(rows)


def test_rows_are_frozen_and_equal_by_value():
    row = find_architecture("bert")
    assert row == Architecture("bert", dict(row.stacks), row.embeddings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        row.model_type = "other"


def test_a_second_row_is_refused():
    with pytest.raises(StructureError, match="'bert' has a row already"):
        register_architecture(Architecture("bert", {"": ("layers",)}, ()))


@pytest.mark.parametrize(
    ("stacks", "embeddings", "message"),
    [
        ({"": "layers"}, (), r"'x': stack '' is 'layers', and no tuple of paths\. Write \('layers',\), with the comma"),
        ({"": ("layers",)}, "emb", r"'x': embeddings is 'emb', and no tuple of paths\. Write \('emb',\)"),
        ({"": ("layers", 3)}, (), r"stack '' is \('layers', 3\), and no tuple of paths\. Write \('layers',\)"),
        ({"": ("layers",)}, None, "embeddings is None, and no tuple of paths"),
        (["layers"], ("emb",), r"stacks=\['layers'\] is no dict .* Write \{\"\": \(\"layers\",\)\}"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused_when_it_is_made(stacks, embeddings, message):
    with pytest.raises(StructureError, match=message):
        Architecture("x", stacks, embeddings)


def test_paths_may_be_a_list():
    row = Architecture("x", {"": ["layers"]}, ["emb"])
    assert row == Architecture("x", {"": ("layers",)}, ("emb",)) and hash(row)


def names_now() -> dict[str, list[str]]:
    """Group names, bottom → top → the model types that have them when they are built with three layers."""
    first = {pair.model_type: pair for pair in model_zoo.pairs() if pair.auto == "base"}
    found: dict[str, list[str]] = {}
    for row in BUILT_IN:
        groups = layer_groups(model_zoo.build(first[row.model_type]))
        found.setdefault(", ".join(group.name for group in groups), []).append(row.model_type)
    return found


def test_group_names_are_stable():
    assert names_now() == json.loads(SNAPSHOT.read_text())


def test_the_page_of_architectures_is_current():
    page = Path(hf_unfreeze.__file__).with_name("ARCHITECTURES.md")
    assert page.read_text() == markdown_table()
    assert all(f"| {row.model_type} |" in page.read_text() for row in BUILT_IN)


def test_another_package_registers_a_row_by_an_entry_point(tmp_path):
    (tmp_path / "my_package.py").write_text(
        "from hf_unfreeze.architectures import Architecture, register_architecture\n"
        "def register():\n"
        "    register_architecture(Architecture('my_model', {'': ('tower.layers',)}, ('tok_emb',)))\n"
    )
    info = tmp_path / "my_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hf_unfreeze.architectures]\nmy_package = my_package:register\n")
    script = (
        "from hf_unfreeze.architectures import find_architecture, list_architectures\n"
        "print(find_architecture('my_model').embeddings, sum(r.model_type == 'my_model' for r in list_architectures()))"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(hf_unfreeze.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "('tok_emb',) 1"
