"""What a stranger relies on: commands and paths that the documents name, pinned versions, extras, the notebook, a light import."""

import ast
import builtins
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from pe_rlhf_jax import config, main
from pe_rlhf_jax.data.formats import Reader
from pe_rlhf_jax.data.sources import Row, Skipped

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "tpu/README.md", "benchmarks/README.md")
SHELLS = (".ci/run", "Makefile")
NOTEBOOK = "notebooks/quickstart.ipynb"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@functools.cache
def parts(document: str) -> tuple[str, dict[str, list[str]]]:
    """A document's text outside code blocks, and its code blocks by language."""
    text, code, language = [], {}, None
    for line in (ROOT / document).read_text().splitlines(keepends=True):
        if line.startswith("```"):
            language = line[3:].strip() if language is None else None
            code.setdefault(language, []).append("")
        elif language is None:
            text.append(line)
        else:
            code[language][-1] += line
    return "".join(text), code


def blocks(document: str, language: str) -> list[str]:
    return parts(document)[1].get(language, [])


def cells(kind: str) -> list[str]:
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


def command_lines() -> Iterator[tuple[str, str]]:
    """(place, line) of every line that the documents, the Makefile and the notebook would run."""
    for document in DOCUMENTS:
        for block in blocks(document, "bash") + blocks(document, ""):
            yield from ((document, line) for line in re.sub(r" *\\\n *", " ", block).splitlines())
        yield from ((document, text.replace("\n", " ")) for text in re.findall(r"`([^`]+)`", parts(document)[0]))
    for shell in SHELLS:
        yield from ((shell, line) for line in (ROOT / shell).read_text().splitlines() if not line.startswith("#"))
    for cell in cells("code"):
        yield from ((NOTEBOOK, line) for line in cell.splitlines())


def found(pattern: str) -> list[tuple[str, re.Match]]:
    return [(place, match) for place, line in command_lines() for match in re.finditer(pattern, line)]


# --- documents ---


def test_every_make_target_exists():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = [(place, match[1]) for place, match in found(r"\bmake ([a-z][a-z-]+)\b")]
    assert {"quickstart", "test"} <= {name for place, name in named if place == "README.md"}
    assert (".ci/run", "test") in named
    assert not [(place, name) for place, name in named if name not in targets]


def test_every_target_explains_itself():
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## \w", makefile, flags=re.M))


def test_every_module_exists():
    named = [(place, match[1]) for place, match in found(r"(?:-m|IN_VENV\)) (pe_rlhf_jax[\w.]*)")]
    assert {"README.md", "Makefile", NOTEBOOK} <= {place for place, _ in named}
    assert not [(place, name) for place, name in named if importlib.util.find_spec(name) is None]


@pytest.fixture
def help_of(capsys):
    @functools.cache
    def show(command: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main.cli([command, "--help"])
        shown = capsys.readouterr()
        assert ended.value.code == 0, f"there is no command {command!r}: {shown.err}"
        return shown.out

    return show


def test_every_command_and_option_exists(help_of):
    lines = [(place, match[1]) for place, match in found(r"(?:pe-rlhf|pe_rlhf_jax\.main)((?: [^\s`;|>)]+| \"[^\"]*\")*)")]
    assert len(lines) > 5
    anywhere = "".join(help_of(command) for command in ("run", "report", "generate", "plan"))
    alone = [match[0] for place, match in found(r"^--[a-z-]+") if place in DOCUMENTS]
    assert "--restart" in alone
    assert not [option for option in alone if not re.search(rf"{option}\b", anywhere)]
    for place, line in lines:
        command, *rest = shlex.split(line) or ["run"]
        if command.startswith("-"):
            command, rest = "run", [command, *rest]
        shown = help_of(command)
        for option in (word for word in rest if word.startswith("--")):
            assert re.search(rf"{option}\b", shown), f"{place}: {command} has no {option}"
        needed = re.findall(r"(--[a-z-]+) [A-Z]", re.sub(r"\[[^\]]*\]", "", shown.partition("\n\n")[0])) if rest else []
        assert set(needed) <= set(rest), f"{place}: {command} needs {needed}"


def test_every_override_is_accepted():
    """Those of one line together, as they are typed."""
    lines = [[found for found in re.findall(r"--set ([a-z]\S*)", line) if "=" in found] for _, line in command_lines()]
    assert sum(map(len, lines)) >= 5
    for overrides in lines:
        config.load(ROOT / "configs" / "quickstart.yaml", [override for override in overrides if "a.b" not in override])


def test_every_path_exists():
    pattern = r"\b(?:configs|notebooks|benchmarks|tpu|tests)/[\w./-]+\b"
    paths = {(place, match[0]) for place, match in found(pattern)}
    for document in DOCUMENTS:
        paths |= {(document, path) for path in re.findall(pattern, parts(document)[0])}
        targets = re.findall(r"\]\(([^)]+)\)", (ROOT / document).read_text())
        inside = ((ROOT / document).parent / target for target in targets if "://" not in target)
        paths |= {(document, os.path.relpath(path, ROOT)) for path in inside}
    assert ("README.md", "configs/quickstart.yaml") in paths and ("README.md", "LICENSE") in paths
    assert not [(place, path) for place, path in paths if not (ROOT / path).exists()]


def test_the_readme_names_every_part_of_the_package():
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "pe_rlhf_jax").iterdir() if not p.name.startswith("__")}
    (layout,) = [block for block in blocks("README.md", "") if block.startswith("pe_rlhf_jax/\n")]
    assert set(re.findall(r"^  (\S+) ", layout, flags=re.M)) == there


def test_the_example_configurations_are_valid():
    """The first is a whole one; the others are sections that go into one."""
    whole, *sections = blocks("README.md", "yaml")
    assert config.parse(whole).data.preference is not None
    for text in sections:
        assert config.parse(f"model: {{source: somewhere}}\n{text}") != config.parse("model: {source: somewhere}")


def test_the_example_rows_are_valid():
    given = {"chat_template": "given", "get_chat_template": lambda: "given"}
    tokenizer = SimpleNamespace(**given, apply_chat_template=lambda turns, **_: "".join(turn["content"] for turn in turns))
    reader = Reader(tokenizer, Skipped(on_error="error"))  # type: ignore[arg-type]
    (text,) = blocks("README.md", "jsonl")
    kinds = []
    for number, line in enumerate(text.splitlines(), start=1):
        values = json.loads(line)
        kind = "label" if "label" in values else "sft" if {"completion", "messages"} & values.keys() else ""
        kind = kind or ("preference" if "chosen" in values else "prompts")
        assert len(getattr(reader, kind)([Row(values, f"README.md:{number}")])) == 1
        kinds.append(kind)
    assert set(kinds) == {"sft", "preference", "label", "prompts"}


def test_the_readme_is_no_wider_than_the_code():
    assert not [(d, line) for d in DOCUMENTS for line in (ROOT / d).read_text().splitlines() if len(line) > 120]


# --- the notebook ---


def test_the_notebook_is_one():
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) for name in ids)
    for cell in notebook["cells"]:
        fields = {"code": {"outputs", "execution_count"}, "markdown": set()}[cell["cell_type"]]
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | fields
        assert not cell.get("outputs") and cell.get("execution_count") is None, "results of one machine are left in"


def test_the_notebook_compiles():
    for cell in cells("code"):
        ast.parse(re.sub(r"^(\s*)[!%].*$", r"\1pass", cell, flags=re.M))


def test_the_notebook_goes_on_after_a_restart_and_its_first_cell():
    """The install cell asks for it: what the cells after it use must come from the first or from those after the install.

    A name in `!{...}` that nobody defined goes to the shell as it is, so these count as names too.
    """
    notebook = json.loads((ROOT / NOTEBOOK).read_text())
    code = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"}
    del code["install"]
    known = set(dir(builtins))
    for name, cell in code.items():
        tree = ast.parse(re.sub(r"^(\s*)[!%](.*)$", r"\1f'''\2'''", cell, flags=re.M))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        known |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        imported = [alias for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names]
        known |= {(alias.asname or alias.name).partition(".")[0] for alias in imported}
        assert {node.id for node in names} <= known, f"cell {name} uses { ({node.id for node in names} - known) }"


# --- versions ---


def pins(python: str) -> dict[str, Requirement]:
    """What constraints.txt pins on a version of Python, by normal name."""
    chosen: dict[str, Requirement] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        assert pin.url is None and not pin.extras, line
        assert re.fullmatch(r"==[0-9][0-9A-Za-z.]*", str(pin.specifier)), f"not one public version: {line}"
        if pin.marker is None or pin.marker.evaluate({"python_version": python, "python_full_version": f"{python}.0"}):
            name = canonicalize_name(pin.name)
            assert name not in chosen, f"{name} is pinned twice on Python {python}"
            chosen[name] = pin
    return chosen


@pytest.mark.parametrize("python", PYTHONS)
def test_pins_cover_what_is_asked_for(python):
    extras = PROJECT["optional-dependencies"]
    asked = [Requirement(text) for text in PROJECT["dependencies"] + extras["quickstart"] + extras["dev"] + extras["benchmarks"]]
    chosen = pins(python)
    for requirement in asked:
        if requirement.name == PROJECT["name"]:
            continue
        pin = chosen[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(next(iter(pin.specifier)).version), f"{requirement} asked for, {pin} pinned"
    assert chosen["jax"].specifier == chosen["jaxlib"].specifier


def test_pins_cover_every_dependency_of_a_dependency():
    """Followed through what is installed here; a package without a pin would change under a user's feet."""
    chosen, seen = pins(f"{sys.version_info.major}.{sys.version_info.minor}"), set()
    waiting = [(Requirement(text), "") for text in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["quickstart"]]
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (requirement.marker and not requirement.marker.evaluate({"extra": extra})) or name in seen:
            continue
        seen.add(name)
        assert name in chosen, f"{name} has no pin"
        further = importlib.metadata.requires(name) or []
        waiting += [(Requirement(text), extra) for text in further for extra in (requirement.extras or {""})]
    assert len(seen) > 40


def test_nothing_names_a_host_or_a_place_of_one_machine():
    for name in ("constraints.txt", "Makefile", ".ci/run", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert not re.search(r"://|--(extra-)?index-url|--find-links|/home/|/root/|/work/", text), name


# --- the package ---


def test_extras_are_there():
    extras = PROJECT["optional-dependencies"]
    assert {"tpu", "cuda", "cuda12", "wandb", "quickstart", "parity", "benchmarks", "dev"} <= extras.keys()
    named = {extra for _, match in found(r"\.\[([\w,-]+)\]") for extra in match[1].split(",")}
    assert {"tpu", "cuda", "cuda12", "quickstart"} <= named <= extras.keys()
    heavy = {"torch", "tensorflow", "peft", "scikit-learn", "wandb"}
    assert not heavy & {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}


def test_the_console_script_is_the_module():
    module, _, function = PROJECT["scripts"]["pe-rlhf"].partition(":")
    assert module == "pe_rlhf_jax.main"
    assert callable(getattr(importlib.import_module(module), function))


def test_ci_runs_the_tests():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    assert re.search(r"^exec make test\b", (ROOT / ".ci" / "run").read_text(), flags=re.M)


def test_importing_needs_neither_torch_nor_tensorflow_nor_a_device():
    """Every module is imported in a process that cannot find these packages and has no usable device: a backend started at import would
    fail there. Where torch is found, transformers takes it along with its automatic classes, which are therefore left alone.
    """
    program = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        missing = name in ("torch", "tensorflow", "peft", "sklearn", "wandb", "vaderSentiment", "pytest")
        return None if missing else super().find_spec(name, path, target)

sys.meta_path = [Without if finder is PathFinder else finder for finder in sys.meta_path]
import pe_rlhf_jax
names = [module.name for module in pkgutil.walk_packages(pe_rlhf_jax.__path__, "pe_rlhf_jax.")]
assert "pe_rlhf_jax.training.rl" in names and "pe_rlhf_jax.main" in names
for name in names:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.startswith("transformers.models.auto")]
"""
    environment = os.environ | {"JAX_PLATFORMS": "a_device_that_nobody_has"}
    finished = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert finished.returncode == 0, finished.stderr
