"""No known answer lies unused: every array of the golden files is read by a test."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest


def keys(tree: ast.AST) -> set[str]:
    """What is looked up by a text of the module, as patterns; the gaps of an f-string stand for anything."""
    nodes = list(ast.walk(tree))
    found = {re.escape(node.value) for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for node in nodes:
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else None for part in node.slice.values]
            # Something at least must be said.
            if "".join(part or "" for part in parts).strip("_"):
                found.add("".join(".+" if part is None else re.escape(part) for part in parts))
    return found


@pytest.mark.parametrize("file", ["gpfq_spfq", "baselines"])
def test_every_known_answer_is_read(shared: Path, file: str) -> None:
    tests = [path for path in Path(__file__).parent.rglob("test_*.py") if path != Path(__file__)]
    sources = [text for path in tests if "golden" in (text := path.read_text(encoding="utf-8"))]
    read = re.compile("|".join(sorted(set().union(*(keys(ast.parse(text)) for text in sources)))))
    with np.load(shared / "golden" / f"{file}.npz") as arrays:
        unread = [name for name in arrays.files if not read.fullmatch(name)]
    assert not unread
