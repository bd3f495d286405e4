"""The pages beside the code: Python runs, schedules parse, links lead somewhere, and no name or message is left out."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import hf_unfreeze
from hf_unfreeze import UnfreezeArguments, UnfreezeCallback, architectures, criteria, errors, parse_schedule
from hf_unfreeze._named import NAMED
from hf_unfreeze._structure import find_stacks
from hf_unfreeze.cli import main

PACKAGE = Path(hf_unfreeze.__file__).parent
ROOT = PACKAGE.parent
PAGES = {name: (PACKAGE / f"{name}.md").read_text() for name in ("GUIDE", "SCHEDULES", "SCALE", "ERRORS")}
CODE = re.compile(r"`([^`]+)`")


def tables(page: str) -> Iterator[list[dict[str, str]]]:
    """The tables of a page, each as rows of column → cell."""
    for table in re.findall(r"(?:^\|.*\n)+", PAGES[page], re.MULTILINE):
        head, _, *rows = ([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table.splitlines())
        assert all(len(row) == len(head) for row in rows), table
        yield [dict(zip(head, row, strict=True)) for row in rows]


def cells(page: str, column: str) -> list[dict[str, str]]:
    return [row for table in tables(page) for row in table if column in row]


@pytest.mark.parametrize("page", ["GUIDE", "SCHEDULES", "SCALE"])
def test_the_python_and_the_commands_of_a_page_run_and_print_what_it_says(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(architectures, "_REGISTRY", dict(architectures._REGISTRY))
    monkeypatch.setattr(criteria, "_CRITERIA", dict(criteria._CRITERIA))
    blocks = re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)
    assert all(line.startswith(">>> ") for line in (block.splitlines()[0] for block in blocks))
    examples = doctest.DocTestParser().get_doctest("".join(blocks), {}, page, f"{page}.md", 0)
    said: list[str] = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(examples, out=said.append)
    assert not said, "".join(said)
    commands = [block.split("\n", 1) for block in re.findall(r"^\$ (.*?)(?=^(?:\$ |```))", PAGES[page], re.M | re.S)]
    for command, expected in commands:
        capsys.readouterr()
        assert main(shlex.split(command)[1:]) == 0
        printed, flags = capsys.readouterr().out, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
        assert doctest.OutputChecker().check_output(expected, printed, flags), printed
    assert len(commands) == (3 if page == "SCALE" else 0)


@pytest.mark.parametrize("page", ["GUIDE", "SCHEDULES"])
def test_schedules_and_arguments_in_tables_are_taken(page):
    rows = cells(page, "schedule")
    assert len(rows) > 15
    for row in rows:
        texts = CODE.findall(row["schedule"])
        arguments = {key: value for text in CODE.findall(row.get("arguments", "")) for key, value in _given(text)}
        assert texts, row
        for text in texts:
            assert parse_schedule(str(parse_schedule(text))) == parse_schedule(text)
            UnfreezeCallback(text, **arguments)


def _given(text: str) -> Iterator[tuple[str, object]]:
    """The keyword arguments that a cell writes: ``layer_decay=0.9``."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    yield from ((str(keyword.arg), ast.literal_eval(keyword.value)) for keyword in call.keywords)


def test_every_named_schedule_stands_in_full_and_every_criterion_and_option_is_told():
    texts = [text for row in cells("SCHEDULES", "schedule") for text in CODE.findall(row["schedule"])]
    told = {row["argument"] for row in cells("SCHEDULES", "argument")}
    for name, named in NAMED.items():
        schedule = next(parse_schedule(text) for text in texts if re.match(rf"{name}\b", text))
        written = next(text for text in texts if re.match(rf"{name}\b", text))
        for key, default in named.arguments.items():
            given = dict(schedule.arguments)[key]
            assert key == named.positional or given == default, (name, key)
            assert f"{key}=" in written or key == named.positional or default is None, (name, key)
    assert set(NAMED["plateau"].arguments) == {word for cell in told for word in CODE.findall(cell)}
    assert {f"auto({name})" for name in criteria._CRITERIA} <= set(texts)
    missing = [f.name for f in dataclasses.fields(UnfreezeArguments) if f"`{f.name}" not in PAGES["GUIDE"]]
    assert not missing


@pytest.mark.parametrize("page", [*PAGES, "README", "CONTRIBUTING"])
def test_links_and_sources(page):
    folder = {"README": ROOT, "CONTRIBUTING": ROOT / ".github"}.get(page, PACKAGE)
    text = (folder / f"{page}.md").read_text()
    links = re.findall(r"\]\(((?!http)[^)]+)\)", text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        target = folder / path if path else folder / f"{page}.md"
        assert target.exists(), link
        headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE) if anchor else []
        assert not anchor or anchor in {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}, link
    for written in re.findall(r"arXiv:?\s*([\w.]*\w)", text):
        assert re.fullmatch(r"\d{4}\.\d{5}", written), written
    assert text.count("```") % 2 == 0
    for path in re.findall(r"\b(?:recipes|tests|hf_unfreeze|\.github)/[\w/.]*\w", text):
        assert (ROOT / path).exists(), path


# Messages of errors and warnings, read from the code: what differs is an ellipsis.
TREES = [ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))]
CONSTANTS = {
    target.id: node.value
    for tree in TREES
    for node in tree.body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name) and target.id.isupper()
}


def literal(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(map(literal, node.values))
    if isinstance(node, ast.FormattedValue):
        return literal(node.value)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    if isinstance(node, ast.Name) and node.id in CONSTANTS:
        return literal(CONSTANTS[node.id])
    return "…"


def raised() -> set[str]:
    found = set()
    for node in (node for tree in TREES for node in ast.walk(tree)):
        call = node.exc if isinstance(node, ast.Raise) else node
        if isinstance(call, ast.Call):
            name = getattr(call.func, "id", getattr(call.func, "attr", ""))
            if name in (errors.__all__ if call is not node else ("warn", "_warn")):
                found.add(literal(call.args[0]))
    return {message for message in found if message.strip("…")}


def test_the_catalogue_has_every_message_and_no_other():
    rows = [CODE.findall(row["message"])[0] for row in cells("ERRORS", "message")]
    patterns = {row: re.compile(".*".join(map(re.escape, row.split("…"))), re.DOTALL) for row in rows}
    messages = raised() | {"the checkpoint at step … was trained by another schedule"}  # written by _history
    assert len(rows) == len(set(rows)) > 80
    stale = [row for row in rows if not any(patterns[row].match(message) for message in messages)]
    unknown = [message for message in messages if not any(pattern.match(message) for pattern in patterns.values())]
    assert not stale and not unknown, f"no longer raised: {stale}; write a row of ERRORS.md for: {unknown}"


def examples() -> Iterator[doctest.DocTest]:
    """The examples of docstrings that print something; the others train, as tests do."""
    for path in sorted(PACKAGE.glob("*.py")):
        module = importlib.import_module(f"hf_unfreeze.{path.stem}") if not path.stem.startswith("__") else hf_unfreeze
        for found in doctest.DocTestFinder(exclude_empty=True).find(module):
            if any(example.want for example in found.examples):
                yield found


def test_the_examples_of_docstrings_print_what_they_say(monkeypatch):
    monkeypatch.setattr(architectures, "_REGISTRY", dict(architectures._REGISTRY))
    sizes = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 12}
    minilm = BertConfig(**sizes, num_hidden_layers=6, num_labels=3)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2}
    texts, images = LlamaConfig(**small, vocab_size=9), CLIPVisionConfig(**small, image_size=8, patch_size=4)
    log = [{"step": 0, "unfreeze/phase": 0, "unfreeze/trainable": "head"},
           {"step": 40, "unfreeze/phase": 1, "unfreeze/trainable": "block[5], head"}]  # fmt: skip
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig(vision_config=images, text_config=texts))
    about = {
        "bert": BertModel(BertConfig(**small, vocab_size=9)), "ids": torch.tensor([[1, 2]]), "llava": llava,
        "model": BertForSequenceClassification(minilm), "torch": torch, "nn": torch.nn,
        "find_stacks": find_stacks, "find_architecture": architectures.find_architecture,
        "trainer": SimpleNamespace(state=SimpleNamespace(log_history=log)),
        **{name: getattr(hf_unfreeze, name) for name in hf_unfreeze.__all__},
    }  # fmt: skip
    said: list[str] = []
    tried = 0
    for found in examples():
        if "timm." in found.examples[0].source:
            continue  # no package of the tests
        found.globs = about | found.globs
        doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found, out=said.append)
        tried += 1
    assert not said, "".join(said)
    assert tried > 25
