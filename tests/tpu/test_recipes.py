"""The recipes of tpu/: what they hand to schedulers is what the package understands, and the shell scripts pass shellcheck."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from pe_rlhf_jax import config as configuration

ROOT = Path(__file__).parents[2]
TPU = ROOT / "tpu"
SCRIPTS = sorted(TPU.glob("*.sh"))
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def loaded(arguments: list[str]) -> configuration.Config:
    """The configuration that a recipe's command names."""
    path = arguments[arguments.index("--config") + 1]
    overrides = [arguments[i + 1] for i, argument in enumerate(arguments) if argument == "--set"]
    return configuration.load(ROOT / path, overrides)


def test_shell_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([str(shellcheck), *map(str, SCRIPTS), str(ROOT / ".ci" / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_stop_at_errors(path):
    assert re.search(r"^set -euo pipefail$", path.read_text(), re.MULTILINE)


def test_the_jobset_asks_for_all_hosts_of_its_slice_and_repeats_no_error():
    jobset = yaml.safe_load((TPU / "gke.yaml").read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    x, y = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    hosts = x * y // container["resources"]["limits"]["google.com/tpu"]
    assert job["parallelism"] == job["completions"] == hosts and job["backoffLimit"] == 0
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"containerName": container["name"], "operator": "In", "values": [2]}}
    (policy,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (policy["action"], policy["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert loaded(container["args"]).run.folder == "gs://BUCKET/runs"
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_skypilot_recovers_what_was_stopped_and_runs_what_is_there():
    task = yaml.safe_load((TPU / "sky.yaml").read_text())
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]
    *_, setup = shlex.split(task["setup"])[:-1]
    assert (ROOT / setup).exists()
    command = task["run"].replace("$CONFIG", task["envs"]["CONFIG"]).replace("$RUNS", "gs://bucket/runs")
    assert loaded(shlex.split(command)).run.folder == "gs://bucket/runs"


def test_extras_that_recipes_install_exist():
    found = set()
    for path in TPU.iterdir():
        for names in re.findall(r'EXTRAS(?::-|=)([a-z0-9,-]+)|"\.\[([a-z0-9,-]+)\]"', path.read_text()):
            found |= {name for part in names for name in part.split(",") if name}
    assert {"tpu", "quickstart"} <= found <= set(EXTRAS)


@pytest.mark.parametrize("code", [0, 2, 75])
def test_slurm_queues_a_run_again_that_was_stopped(tmp_path, code):
    for name, text in {"srun": f'echo srun "$@" >>calls; exit {code}', "scontrol": 'echo scontrol "$@" >>calls'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "96"}
    arguments = ["--config", "a b.yaml"]
    done = subprocess.run(["bash", str(TPU / "slurm.sh"), *arguments], cwd=tmp_path, env=environment)
    assert done.returncode == code
    called = "srun --kill-on-bad-exit=0 --cpus-per-task=96 .venv/bin/pe-rlhf --config a b.yaml\n" + (
        "scontrol requeue 7\n" if code == 75 else ""
    )
    assert (tmp_path / "calls").read_text() == called


def test_slurm_gives_the_one_task_of_a_node_all_of_it():
    asked = re.findall(r"^#SBATCH --(\S+)$", (TPU / "slurm.sh").read_text(), re.MULTILINE)
    assert {"ntasks-per-node=1", "exclusive", "mem=0"} <= set(asked)


def test_the_image_is_built_from_what_it_copies_and_nothing_else():
    """In a fresh clone too, which has no data."""
    copies = re.findall(r"^COPY (.+) \S+$", (TPU / "Dockerfile").read_text(), re.MULTILINE)
    sources = {source for line in copies for source in line.split()}
    _, everything, *rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert everything == "*" and {rule[1:] for rule in rules if rule.startswith("!")} == sources
    assert [rule for rule in rules if not rule.startswith("!")] == ["**/__pycache__"]
    assert [source for source in sources if not (ROOT / source).exists()] in ([], ["data"])
    for text in ((TPU / "Dockerfile").read_text(), (TPU / "README.md").read_text()):
        assert re.findall(r"(.*)docker build -f tpu/Dockerfile", text) in (["mkdir -p data && "], ["#   mkdir -p data && "])


def test_nothing_in_the_recipes_names_an_account():
    for path in TPU.iterdir():
        text = path.read_text()
        assert not re.search(r"AIza|ya29\.|hf_[A-Za-z0-9]{20}|[a-z0-9-]+\.iam\.gserviceaccount|-----BEGIN", text), path
        assert not re.search(r"--project[= ](?!\"?\$)", text), path
