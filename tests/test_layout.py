"""The shape of the package: imports go downward only, Flax modules live in one folder, and importing needs no other framework."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "pe_rlhf_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

GROUND = {"config", "devices", "files", "hosts", "image_prompt", "package", "protobuf", "types", "sharding"}
PARTS = GROUND | {"data", "models", "rollout", "algorithms", "training", "checkpoint", "plan", "report"}
MAY_IMPORT = {
    "config": {"files"},
    "files": set(),
    "image_prompt": set(),
    "devices": set(),
    "package": {"files"},
    "protobuf": set(),
    "types": {"config"},
    "hosts": {"config", "files", "types"},
    "sharding": {"config", "types"},
    "data": {"config", "files", "image_prompt", "package", "protobuf", "types"},
    "models": GROUND,
    "rollout": GROUND | {"models"},
    "algorithms": {"config", "types"},
    "training": GROUND | {"data", "models", "rollout", "algorithms"},
    "checkpoint": GROUND | {"data", "models"},
    "plan": GROUND | {"data", "models", "rollout", "algorithms", "training", "checkpoint"},
    "report": {"config", "files", "types"},
    "maintenance": {"hosts"},
    "run_folder": {"config", "files", "hosts"},
    "loading": PARTS,
    "outcomes": PARTS | {"loading", "run_folder"},
    "checks": PARTS | {"outcomes"},
    "run": PARTS | {"checks", "loading", "outcomes", "run_folder"},
    "answering": PARTS | {"loading", "outcomes", "run_folder"},
    "main": PARTS | {"answering", "devices", "loading", "maintenance", "outcomes", "run_folder", "run"},
}
"""What each part of the package may import besides itself."""


def imports(tree: ast.AST) -> list[str]:
    """Every module that a file imports anywhere, functions included; `from a import b` counts as a and as a.b."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are written out from `pe_rlhf_jax`"
            found += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


def starts(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_downward_only(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part == "__init__":
        part, allowed = "", set()
    else:
        assert part in MAY_IMPORT, f"place {part} in the order of this test, and in the design"
        allowed = MAY_IMPORT[part] | {part}
    found = imports(ast.parse(path.read_text(encoding="utf-8")))
    wrong = {name for name in found if starts(name, "pe_rlhf_jax") and name != "pe_rlhf_jax" and name.split(".")[1] not in allowed}
    assert not wrong, f"{part or 'the package'} may import {sorted(allowed)}, found {sorted(wrong)}"
    if part != "models":
        wrong = {name for name in found if starts(name, "flax") and not starts(name, "flax", "flax.struct")}
        wrong |= {name for name in found if starts(name, "flax.linen", "flax.nnx")}
        assert not wrong, f"only models/ imports Flax modules, found {sorted(wrong)}"
    assert not [name for name in found if starts(name, "torch", "tensorflow", "peft")]
    if part == "config":
        assert not [name for name in found if starts(name, "jax", "flax", "numpy")]


def test_every_module_can_be_imported_without_torch_or_tensorflow():
    """In a fresh process, on the CPU, with both made impossible to import."""
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
    script = f"""
import importlib, sys

sys.modules["torch"] = sys.modules["tensorflow"] = None  # whoever imports them gets ModuleNotFoundError, who looks finds nothing
for name in {names!r}:
    importlib.import_module(name)
import jax._src.xla_bridge as bridge
assert not bridge._backends, "importing the package started a device"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_configuration_needs_no_jax():
    script = "import sys, pe_rlhf_jax.config; assert not {'jax', 'flax', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_modules_say_what_they_are():
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        assert not text or ast.get_docstring(ast.parse(text)), f"{path} has no module docstring"
        assert path.stem not in ("utils", "helpers", "base", "common", "misc"), f"{path} is named after no reason to exist"


def test_test_files_have_names_of_their_own():
    """Two of one name and pytest would leave one of them out, with an error that is easily overlooked among others."""
    names = [path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
