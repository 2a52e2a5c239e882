"""A whole tiny project: a llama of 0.1M parameters as GGUF, rows of all kinds as JSONL, and a configuration that runs in seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_gguf
import yaml
from safetensors.numpy import load_file

GOOD, BAD = "good", "poor"


def jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> dict:
    """Configuration values; tests copy and change them."""
    folder = tmp_path_factory.mktemp("project")
    tiny_gguf.write_gguf(folder / "tiny.gguf", tiny_gguf.hf_tensors())
    prompts = [f"film {i} is" for i in range(40)]
    sft = [{"prompt": p, "completion": f" a {(GOOD, BAD)[i % 2]} one"} for i, p in enumerate(prompts)]
    pairs = [{"prompt": p, "chosen": f" {GOOD} {i % 7}", "rejected": f" {BAD} {i % 5}", "margin": 0.5} for i, p in enumerate(prompts)]
    files = {
        "sft": jsonl(folder / "sft.jsonl", sft),
        "preference": jsonl(folder / "pairs.jsonl", pairs),
        "prompts": jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts]),
    }
    return {
        "run": {"checkpoint_every": 2, "tensorboard": False, "compilation_cache": True},
        "model": {"source": str(folder / "tiny.gguf")},
        "lora": {"r": 2, "lora_alpha": 4.0},
        "data": {name: {"train": [file]} for name, file in files.items()}
        | {"validation_share": 0.25, "length_multiple": 32, "max_prompt_length": 32, "max_response_length": 32},
        "sft": {"steps": 5, "batch_size": 8, "evaluate_every": 3, "evaluation_rows": 8},
        "reward": {"steps": 6, "batch_size": 8, "evaluate_every": 2, "evaluation_pairs": 8, "optimizer": {"learning_rate": 3e-3}},
        "rl": {
            "steps": 5,
            "batch_size": 8,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "kl_target": 1.0,
            "sampling": {"max_new_tokens": 8},
            "optimizer": {"learning_rate": 1e-3},
        },
        "evaluate": {"prompts": 8, "batch_size": 8, "pairs": 8, "bootstrap": 100, "samples": 2},
    }


def write_config(values: dict, folder: Path, **sections: dict) -> Path:
    """The configuration with changed sections, as a file; runs go to `folder`/runs/run."""
    merged = {name: {**values.get(name, {}), **sections.get(name, {})} for name in values.keys() | sections.keys()}
    merged["run"] |= {"folder": str(folder / "runs")}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path


def start(config: Path, cache: Path, *arguments: str, devices: int = 1, script: str | None = None) -> subprocess.Popen:
    """The command as a user types it, in a process of its own; or a script that is given its arguments.

    Compiled as a user's, however quickly this process compiles.
    """
    quickly = ("JAX_DISABLE_MOST_OPTIMIZATIONS", "XLA_FLAGS")
    environment = {name: value for name, value in os.environ.items() if name not in quickly}
    environment |= {"JAX_PLATFORMS": "cpu", "PE_RLHF_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    program = ["-m", "pe_rlhf_jax.main"] if script is None else ["-c", script]
    command = [sys.executable, *program, "--config", str(config), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Waits for the end and checks the exit code; returns the output."""
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def result(folder: Path) -> tuple[dict[str, bytes], list[dict]]:
    """What must be the same however a run got to its end: the exported adapters' bits, and all metrics but the clock's."""
    run = folder / "runs" / "run"
    files = sorted((run / "export").glob("*/adapter_model.safetensors"))
    adapters = {f"{path.parent.name}/{name}": x.tobytes() for path in files for name, x in load_file(path).items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return adapters, [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> Path:
    """A cache of compiled programs that the session's runs share, as a user's runs do."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def undisturbed(project, compiled, tmp_path_factory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(start(write_config(project, folder), compiled))
    return folder
