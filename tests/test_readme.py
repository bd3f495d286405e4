"""The README's Python runs and prints what stands below it; its commands exist."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_python_block_prints_what_the_readme_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text()
    code, printed = re.search(r"```python\n(.*?)```\n\n```text\n(.*?)```", text, re.DOTALL).groups()
    assert text[: text.index("```python")].count("\n") < 20
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})  # the point of the test
    assert out.getvalue().splitlines()[-1] == printed.strip()


def test_commands_and_pictures_exist():
    text = README.read_text()
    paths = re.findall(r"^bash (\S+)", text, re.MULTILINE) + re.findall(r'<img src="(.*?)"', text)
    assert len(paths) == 3 and all((README.parent / path).exists() for path in paths)
