"""The decisions are pure: nothing in ``control`` can reach a clock, chance, the machine or the network."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

import resilience.control

FILES = sorted(pathlib.Path(resilience.control.__path__[0]).glob("*.py"))
ALLOWED = {"__future__", "collections", "dataclasses", "enum", "math", "re", "typing"}
OURS = ("resilience.control", "resilience.errors")
CALLS = {"open", "print", "input", "eval", "exec", "__import__", "id", "hash", "globals"}


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            assert node.level == 0


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_nothing_impure(path):
    for name in imports(ast.parse(path.read_text())):
        assert name.split(".")[0] in ALLOWED or name.startswith(OURS), f"{path.name} imports {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_calls_nothing_impure_and_keeps_no_global_state(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, (ast.Global, ast.AsyncFunctionDef)), path.name
        inside_hash = path.name == "persistent.py"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not inside_hash:
            assert node.func.id not in CALLS, f"{path.name}:{node.lineno} calls {node.func.id}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_small(path):
    assert len(path.read_text().splitlines()) <= 400


def test_importing_it_brings_in_no_ray_no_torch_no_threads_of_ours():
    code = (
        "import sys; import resilience.control.supervise, resilience.control.ledger;"
        "print([m for m in ('ray', 'torch', 'fsspec', 'asyncio') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"
