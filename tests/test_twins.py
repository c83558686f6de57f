"""Copies stay copies: one name in two scripts is one thing, so that `diff rloo.py grpo.py` tells what differs."""

import ast
import itertools
from pathlib import Path

import pytest

SCRIPTS = sorted(Path(__file__).parents[1].glob("*.py"))
PAIRS = [pytest.param(*pair, id="-".join(path.stem for path in pair)) for pair in itertools.combinations(SCRIPTS, 2)]


def definitions(script: Path) -> dict[str, ast.AST]:
    """Top-level functions and classes, docstrings taken out."""
    found = {node.name: node for node in ast.parse(script.read_text()).body if hasattr(node, "name")}
    for node in ast.walk(ast.Module(list(found.values()), [])):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return found


def choices(annotation: ast.AST) -> set[str]:
    """{"'drop'", "'error'"} of Literal["error", "drop"], {"int"} of int: one script may offer fewer than another."""
    is_literal = isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal"
    values = annotation.slice.elts if is_literal and isinstance(annotation.slice, ast.Tuple) else [annotation]
    return {ast.unparse(value) for value in values}


@pytest.mark.parametrize("one, other", PAIRS)
def test_one_name_one_body(one, other):
    ours, theirs = definitions(one), definitions(other)
    shared = (ours.keys() & theirs.keys()) - {"Args", "main"}
    drifted = [name for name in sorted(shared) if ast.dump(ours[name]) != ast.dump(theirs[name])]
    assert not drifted, f"{one.name} and {other.name} differ in {drifted}: make them equal, or give one another name"


@pytest.mark.parametrize("one, other", PAIRS)
def test_one_flag_one_type(one, other):
    ours, theirs = (
        {field.target.id: choices(field.annotation) for field in definitions(script)["Args"].body
         if isinstance(field, ast.AnnAssign)}
        for script in (one, other)
    )  # fmt: skip
    drifted = [
        name for name in sorted(ours.keys() & theirs.keys() - {"loss_type"})  # each script has its own losses
        if not (ours[name] <= theirs[name] or theirs[name] <= ours[name])
    ]  # fmt: skip
    assert not drifted, f"{one.name} and {other.name} give other types to {drifted}"
