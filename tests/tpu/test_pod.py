"""tpu/pod.sh and tpu/worker.sh against a `gcloud` that records its calls and a `uv` that installs nothing; folders play the hosts."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BASH = str(shutil.which("bash"))
POD = str(ROOT / "tpu" / "pod.sh")
FAKE_GCLOUD = f"""#!/bin/sh
exec {sys.executable} -S {Path(__file__).parent / "fake_gcloud.py"} "$@"
"""
FAKE_UV = """#!/bin/bash
echo "uv $*" >>"$FAKE/installed"
if [[ $1 == pip ]]; then exit; fi
mkdir -p .venv/bin
cat >.venv/bin/pe-rlhf <<'EOT'
#!/bin/bash
printf '%s\\n' "$JAX_PLATFORMS" "$@" >>ran
printf '%s' "${HF_TOKEN:-none}" >token
trap 'exit 75' TERM
until [[ -e finish ]]; do sleep 0.02; done
code=$(cat finish)
rm finish
exit "$code"
EOT
chmod +x .venv/bin/pe-rlhf
"""
OWN = ("JAX_PLATFORMS", "WANDB_API_KEY")
NONE = [1, "", "ERROR: (gcloud) NOT_FOUND: Resource 'rlhf' was not found"]
READY = [0, "READY", ""]


class Pod:
    """A slice of two hosts that does not exist."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.hosts = [folder / "host0", folder / "host1"]
        (folder / "bin").mkdir()
        for host in self.hosts:
            host.mkdir()
        for name, text in (("gcloud", FAKE_GCLOUD), ("uv", FAKE_UV)):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("POD_", "HF_")) and name not in OWN},
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE": str(folder),
            "POD_POLL": "0",
            "POD_NAME": "rlhf",
            "POD_ZONE": "us-west4-a",
            "POD_TOPOLOGY": "v5e:4x4",
        }
        self.answer({})

    def answer(self, answers: dict) -> None:
        (self.folder / "answers.json").write_text(json.dumps(answers))
        (self.folder / "calls").write_text("")

    def call(self, *arguments: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [BASH, POD, *arguments], capture_output=True, text=True, input=stdin, env={**self.environment, **environment}, timeout=60
        )

    def done(self, *arguments: str, **environment: str) -> str:
        finished = self.call(*arguments, **environment)
        assert finished.returncode == 0, finished.stderr
        return finished.stdout

    def refused(self, *arguments: str, stdin: str = "", **environment: str) -> str:
        finished = self.call(*arguments, stdin=stdin, **environment)
        assert finished.returncode == 2, finished.stdout + finished.stderr
        return finished.stderr

    @property
    def calls(self) -> list[str]:
        found = [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]
        assert all(call[:2] == ["compute", "tpus"] or call[0] == "storage" for call in found)
        return [" ".join(call).removeprefix("compute tpus ") for call in found]

    def changes(self) -> list[str]:
        """The calls that are not only questions."""
        return [call for call in self.calls if " describe " not in call]


@pytest.fixture
def pod(tmp_path: Path):
    made = Pod(tmp_path)
    yield made
    for host in made.hosts:  # a run that a failed test left behind
        (host / "pe_rlhf_jax").mkdir(exist_ok=True)
        (host / "pe_rlhf_jax" / "finish").write_text("0")


ZONE = "--zone=us-west4-a"


@pytest.mark.parametrize(
    ("arguments", "topology", "expected"),
    [
        ((), "v5e:4x4", f"tpu-vm create rlhf --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite {ZONE}"),
        (("--spot",), "v6e:2x4", f"tpu-vm create rlhf --accelerator-type=v6e-8 --version=v2-alpha-tpuv6e --spot {ZONE}"),
        (
            ("--queued", "--spot"),
            "v5p:8x8x16",
            f"queued-resources create rlhf --node-id=rlhf --accelerator-type=v5p-2048 --runtime-version=v2-alpha-tpuv5 --spot {ZONE}",
        ),
        (
            ("--queued",),
            "v4:2x2x2",
            f"queued-resources create rlhf --node-id=rlhf --accelerator-type=v4-16 --runtime-version=tpu-ubuntu2204-base {ZONE}",
        ),
        ((), "v5p:4x4x12", f"tpu-vm create rlhf --accelerator-type=v5p-384 --version=v2-alpha-tpuv5 {ZONE}"),
        ((), "v4:4x4x16", f"tpu-vm create rlhf --type=v4 --topology=4x4x16 --version=tpu-ubuntu2204-base {ZONE}"),
        (
            ("--queued",),
            "v4:2x2x8",
            f"queued-resources create rlhf --node-id=rlhf --type=v4 --topology=2x2x8 --runtime-version=tpu-ubuntu2204-base {ZONE}",
        ),
    ],
)
def test_a_slice_is_created_by_plans_name(pod, arguments, topology, expected):
    pod.done("create", *arguments, POD_TOPOLOGY=topology)
    assert pod.calls == [expected]


@pytest.mark.parametrize(
    ("topology", "told"),
    [
        ("v5e:2x8", "16 chips of v5e as 4x4 only; plan for v5e:4x4"),
        ("v6e:4x2", "8 chips of v6e as 2x4 only; plan for v6e:2x4"),
        ("v5p:4x4x16", "256 chips of v5p as 4x8x8 only; plan for v5p:4x8x8"),
        ("v5p:2x4", "8 chips of v5p as 2x2x2 only"),
        ("v4:4x4", "16 chips of v4 as 2x2x4 only"),
        ("v5e:3x5", "no slice of 15 chips of v5e"),
        ("v5e:0x4", "expected one such as v5e:4x4"),
    ],
)
def test_a_shape_that_another_would_come_for_is_refused(pod, topology, told):
    """An accelerator type says how many chips, not how they lie."""
    assert told in pod.refused("create", POD_TOPOLOGY=topology)
    assert told in pod.refused("--yes", "keep", "--queued", "--", "--config", "c.yaml", POD_TOPOLOGY=topology)
    assert pod.calls == []


FLAT = ["1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"]
DEEP = ["2x2x1", "2x2x2", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16", "16x16x24"]
"""Google's tables of v5e and v6e, and of v5p (cloud.google.com/tpu/docs/v5p, ...)."""


@pytest.mark.parametrize(
    ("generation", "name", "per_chip", "shapes"), [("v5e", "v5litepod", 1, FLAT), ("v6e", "v6e", 1, FLAT), ("v5p", "v5p", 2, DEEP)]
)
def test_the_shapes_of_googles_tables_are_its_own(pod, generation, name, per_chip, shapes):
    for shape in shapes:
        size = per_chip * math.prod(map(int, shape.split("x")))
        assert f"--accelerator-type={name}-{size} " in pod.done("--dry-run", "create", POD_TOPOLOGY=f"{generation}:{shape}")


def test_project_and_image_are_the_users(pod):
    pod.done("create", POD_PROJECT="mine", POD_RUNTIME="other")
    assert pod.calls == ["tpu-vm create rlhf --accelerator-type=v5litepod-16 --version=other --zone=us-west4-a --project=mine"]


def test_what_is_missing_is_named_before_anything_is_called(pod):
    assert "POD_ZONE is not set; for instance: export POD_NAME=" in pod.refused("wait", POD_ZONE="")
    assert "POD_TOPOLOGY is not set" in pod.refused("create", POD_TOPOLOGY="")
    assert "expected one such as v5e:4x4" in pod.refused("create", POD_TOPOLOGY="v5e")
    assert "'tpu7x:2x2x1': of v4, v5e, v5p and v6e" in pod.refused("create", POD_TOPOLOGY="tpu7x:2x2x1")
    assert "expected --queued or --spot, found --cheap" in pod.refused("create", "--cheap")
    assert "expected pe-rlhf's arguments" in pod.refused("run")
    assert "expected a folder" in pod.refused("fetch")
    assert "create [--queued] [--spot]" in pod.refused("start")
    assert pod.calls == []
    few = pod.folder / "few"
    few.mkdir()
    (few / "dirname").symlink_to(str(shutil.which("dirname")))
    assert "gcloud is not here" in pod.refused("wait", PATH=str(few))


def test_no_capacity_says_what_to_do(pod):
    pod.answer({"tpu-vm create": [[1, "", "ERROR: There is no more capacity in the zone"]]})
    told = pod.refused("create")
    assert "no more capacity in the zone" in told and "no v5litepod-16 in us-west4-a now" in told and "create --queued waits" in told


def test_waiting_follows_the_queue_until_the_hosts_are_there(pod):
    states = ["ACCEPTED", "WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    pod.answer(
        {
            "queued-resources describe": [[0, state, ""] for state in states],
            "tpu-vm describe": [[0, "CREATING", ""], READY],
        }
    )
    told = pod.call("wait")
    assert told.returncode == 0
    shown = [line.partition(": ")[2] for line in told.stderr.splitlines()]
    assert shown == ["waiting ACCEPTED", "waiting WAITING_FOR_RESOURCES", "waiting PROVISIONING", "waiting CREATING", "ready"]
    assert "queued-resources describe rlhf --format=value(state.state) --zone=us-west4-a" in pod.calls


@pytest.mark.parametrize(
    ("request_state", "node", "message"),
    [
        (NONE, NONE, "rlhf does not exist in us-west4-a; create it first"),
        ([0, "FAILED", ""], NONE, "was not granted (failed FAILED)"),
        ([0, "SUSPENDED", ""], NONE, "was taken away (lost SUSPENDED)"),
        ([0, "ACTIVE", ""], [0, "PREEMPTED", ""], "was taken away (lost PREEMPTED)"),
        (NONE, [0, "TERMINATED", ""], "was taken away (lost TERMINATED)"),
        ([1, "", "ERROR: PERMISSION_DENIED: tpu.googleapis.com"], READY, "PERMISSION_DENIED"),
    ],
)
def test_waiting_ends_where_there_is_nothing_to_wait_for(pod, request_state, node, message):
    pod.answer({"queued-resources describe": [request_state], "tpu-vm describe": [node]})
    assert message in pod.refused("wait")


def test_the_hosts_are_set_up_run_stop_and_go_on(pod, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    (data / "pairs.jsonl").write_text("{}\n")
    pod.answer({"queued-resources describe": [NONE], "tpu-vm describe": [READY]})
    assert pod.done("status").split() == ["ready", "new", "new"]
    assert pod.done("setup", POD_FILES=str(data)).split() == ["installed", "installed"]
    for host in pod.hosts:
        assert (host / "pe_rlhf_jax" / "pyproject.toml").exists() and (host / "pe_rlhf_jax" / "data" / "pairs.jsonl").exists()
    installed = (tmp_path / "installed").read_text().splitlines()
    assert installed[1] == "uv pip install --quiet --python .venv/bin/python --constraint constraints.txt --editable .[tpu,gcs,quickstart]"
    assert pod.done("setup").split() == ["already", "installed"] * 2 and len((tmp_path / "installed").read_text().splitlines()) == 4
    assert pod.done("setup", POD_EXTRAS="tpu,wandb").split() == ["installed", "installed"]
    assert (tmp_path / "installed").read_text().splitlines()[-1].endswith(" --editable .[tpu,wandb]")

    arguments = ["--config", "configs/llama3_8b.yaml", "--set", 'model.source="hf:a/b c"']
    assert pod.done("run", *arguments).split() == ["started", "started"]
    assert pod.done("run", *arguments).split() == ["already", "running"] * 2
    assert pod.done("status").split() == ["ready", "running", "running"]
    assert pod.done("stop").split() == ["done", "75"] * 2
    assert pod.done("run", *arguments).split() == ["started", "started"]
    pod.done("stop")
    for host in pod.hosts:
        assert (host / "pe_rlhf_jax" / "ran").read_text().splitlines() == ["tpu,cpu", *arguments] * 2
        assert (host / "pe_rlhf_jax" / "token").read_text() == "none"


def test_setting_up_waits_for_the_end_of_a_run(pod):
    """Its package and .venv would be replaced under it: on one host, too, and where the extras changed."""
    pod.answer({"queued-resources describe": [NONE], "tpu-vm describe": [READY]})
    pod.done("setup")
    pod.done("run", "--config", "c.yaml")
    (pod.hosts[0] / "pe_rlhf_jax" / "finish").write_text("0")
    while pod.done("status").split() != ["ready", "done", "0", "running"]:
        pass
    (pod.folder / "calls").write_text("")
    told = pod.refused("setup", POD_EXTRAS="tpu,wandb")
    assert "a run is going on there" in told and "tpu/pod.sh stop first" in told
    assert not [call for call in pod.calls if " scp " in call or "worker.sh setup" in call]
    by_hand = ["bash", str(pod.hosts[1] / "pe_rlhf_jax" / "tpu" / "worker.sh"), "setup"]
    refused = subprocess.run(by_hand, capture_output=True, text=True, env={**pod.environment, "EXTRAS": "tpu,wandb"}, timeout=30)
    assert refused.returncode == 2 and "a run is going on in" in refused.stderr
    assert len((pod.folder / "installed").read_text().splitlines()) == 4  # of both hosts, once
    pod.done("stop")
    assert pod.done("setup", POD_EXTRAS="tpu,wandb").split() == ["installed", "installed"]


def test_tokens_go_along_in_a_file_and_on_no_command_line(pod):
    pod.answer({"queued-resources describe": [NONE], "tpu-vm describe": [READY]})
    pod.done("setup", HF_TOKEN="hf_a $b")
    pod.done("run", "--config", "c.yaml")
    pod.done("stop")
    for host in pod.hosts:
        folder = host / "pe_rlhf_jax"
        assert (folder / "token").read_text() == "hf_a $b" and (folder / "worker.env").stat().st_mode & 0o77 == 0
    assert "hf_a" not in (pod.folder / "calls").read_text()


def test_ssh_is_tried_again_and_then_given_up(pod):
    refused = [1, "", "ssh: connect to host port 22: Connection refused"]
    pod.answer({"tpu-vm ssh": [refused, refused, [0, "started", ""]]})
    assert pod.done("run", "--config", "c.yaml") == "started\n" and len(pod.calls) == 3
    pod.answer({"tpu-vm ssh": [refused]})
    finished = pod.call("run", "--config", "c.yaml")
    assert finished.returncode == 1 and len(pod.calls) == 4
    assert "failed; try 2 of 4" in finished.stderr and "Connection refused" in finished.stderr


def test_deleting_asks_and_takes_the_queued_request_too(pod):
    pod.answer({"queued-resources describe": [[0, "ACTIVE", ""]]})
    for answer in ("", "y\n", "other\n"):
        assert "nothing was done" in pod.refused("delete", stdin=answer)
    assert pod.calls == []
    assert pod.call("delete", stdin="rlhf\n").returncode == 0
    assert pod.changes() == [f"queued-resources delete rlhf --quiet --force {ZONE}"]
    pod.answer({"queued-resources describe": [NONE]})
    pod.done("--yes", "delete")
    assert pod.changes() == [f"tpu-vm delete rlhf --quiet {ZONE}"]


def test_a_dry_run_shows_every_command_and_calls_none(pod):
    for arguments, shown in (
        (("create", "--queued"), "gcloud compute tpus queued-resources create rlhf"),
        (("wait",), "gcloud compute tpus tpu-vm describe rlhf"),
        (("setup",), "gcloud compute tpus tpu-vm scp"),
        (("run", "--config", "c.yaml"), "worker.sh"),
        (("status",), "tpu-vm ssh rlhf --worker=all"),
        (("watch",), "tpu-vm ssh rlhf --worker=0"),
        (("stop",), "tpu-vm ssh rlhf --worker=all"),
        (("fetch", "runs/x"), "tpu-vm scp rlhf:pe_rlhf_jax/runs/x runs --recurse --worker=0"),
        (("delete",), "tpu-vm delete rlhf --quiet"),
        (("keep", "--spot", "--", "--config", "c.yaml"), "tpu-vm create rlhf"),
    ):
        assert shown in pod.done("--dry-run", *arguments).replace("\\ ", " "), arguments
    assert pod.calls == []
    shutil.rmtree(pod.folder / "bin")
    pod.done("--dry-run", "create")  # without gcloud too


def test_a_run_is_fetched_from_a_host_or_a_bucket(pod, tmp_path):
    run = pod.hosts[0] / "pe_rlhf_jax" / "runs" / "x"
    run.mkdir(parents=True)
    (run / "summary.json").write_text("{}")
    pod.done("fetch", "runs/x", str(tmp_path / "here"))
    assert (tmp_path / "here" / "x" / "summary.json").exists()
    pod.done("fetch", "gs://bucket/runs/x", str(tmp_path / "here"))
    assert pod.calls[-1] == f"storage cp --recursive gs://bucket/runs/x {tmp_path / 'here'}"


def test_keeping_a_run_going_over_slices_that_are_taken_away(pod):
    """Created, lost while it waits, lost while it runs, stopped by its signal, and done in the end."""
    waiting, active, lost = ([0, word, ""] for word in ("WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED"))
    pod.answer(
        {
            "queued-resources describe": [NONE, waiting, active, active, lost, lost, NONE, active],
            "tpu-vm describe": [NONE, READY, READY, NONE, READY],
            "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status": [
                [0, text, ""]
                for text in (
                    "new\nnew",
                    "new\nnew",
                    "running\nrunning",
                    "idle\nidle",
                    "running\ndone 75",
                    "done 75\ndone 75",
                    "done 0\ndone 0",
                )
            ],
            "tpu-vm ssh": [[0, "", ""]],
        }
    )
    finished = pod.call("keep", "--queued", "--spot", "--", "--config", "c.yaml", stdin="rlhf\n")
    assert finished.returncode == 0, finished.stderr
    kinds = [
        " ".join(call.split()[:2]) + (" " + call.split("worker.sh ")[1].split()[0] if "worker.sh" in call else "") for call in pod.changes()
    ]
    status = "tpu-vm ssh status"
    setting_up = [status, "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh setup"]
    create, start = "queued-resources create", "tpu-vm ssh start"
    assert kinds == [
        *(create, status, *setting_up, start, status),
        *("queued-resources delete", create),
        *(status, start, status, status, start, status),
    ]
    assert "rlhf was taken away (lost SUSPENDED); deleting it and creating another" in finished.stderr


def test_keeping_asks_and_stops_at_errors(pod):
    assert "nothing was done" in pod.refused("keep", "--", "--config", "c.yaml")
    assert "expected [--queued] [--spot] -- and" in pod.refused("--yes", "keep", "--config", "c.yaml")
    assert pod.calls == []
    status = "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status"
    here = {"queued-resources describe": [NONE], "tpu-vm describe": [READY]}
    well = {"tpu-vm ssh": [[0, "started", ""]], "tpu-vm scp": [[0, "", ""]]}
    pod.answer(here | {status: [[0, "new\nnew", ""]] * 2 + [[0, "done 2\ndone 137", ""]]} | well)
    assert "ended with an error" in pod.refused("--yes", "keep", "--", "--config", "c.yaml")
    pod.answer(here | {status: [[0, "running\nrunning", ""], [0, "done 0\ndone 134", ""]]} | well)
    assert "ended three times without saving (134)" in pod.refused("--yes", "keep", "--", "--config", "c.yaml")
    assert len([call for call in pod.calls if "worker.sh start" in call]) == 3
    pod.answer(here | {"tpu-vm describe": [NONE], "tpu-vm create": [[1, "", "Quota exceeded"]]})
    assert "Quota exceeded" in pod.refused("--yes", "keep", "--", "--config", "c.yaml")


@pytest.mark.parametrize("before", ["done 0", "done 2", "done 134", "idle"])
def test_how_an_earlier_run_ended_says_nothing_about_this_one(pod, before):
    """With files of now: the configuration may have been mended."""
    status = "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status"
    looks = [[0, f"{word}\n{word}", ""] for word in (before, before, "running", "done 0")]
    well = {"tpu-vm ssh": [[0, "", ""]], "tpu-vm scp": [[0, "", ""]]}
    pod.answer({"queued-resources describe": [NONE], "tpu-vm describe": [READY], status: looks} | well)
    pod.done("--yes", "keep", "--", "--config", "c.yaml")
    did = [call.split("worker.sh ")[1].split()[0] for call in pod.changes() if "worker.sh" in call]
    assert did == ["status", "status", "setup", "start", "status", "status"] and any("tpu-vm scp" in call for call in pod.calls)


@pytest.mark.parametrize("at", ["tpu-vm scp", "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh start", "delete"])
def test_a_slice_that_goes_while_it_is_set_up_or_deleted_is_replaced(pod, at):
    """Four tries of a command are made; then it is asked how the slice is."""
    active, lost, gone = [0, "ACTIVE", ""], [0, "SUSPENDED", ""], [1, "", "ERROR: Internal"]
    status = "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status"
    requests = [lost] * 4 + [NONE] + [active] if at == "delete" else [active, lost, lost, NONE, active]
    looks = [[0, f"{word}\n{word}", ""] for word in ["new"] * (2 if at == "delete" else 4) + ["running", "done 0"]]
    nodes = [NONE, READY] if at == "delete" else [READY, NONE, READY]
    answers = {"queued-resources describe": requests, "tpu-vm describe": nodes, status: looks}
    answers |= {"queued-resources delete" if at == "delete" else at: [gone] * (1 if at == "delete" else 4) + [[0, "", ""]]}
    pod.answer(answers | {"tpu-vm ssh": [[0, "", ""]]} | ({} if at == "tpu-vm scp" else {"tpu-vm scp": [[0, "", ""]]}))
    kept = pod.call("--yes", "keep", "--queued", "--spot", "--", "--config", "c.yaml")
    assert kept.returncode == 0, kept.stderr
    made = [verb for _, verb, *_ in map(str.split, pod.calls) if verb in ("create", "delete")]
    assert made == ["delete"] * (2 if at == "delete" else 1) + ["create"]
    assert "; looking again" in kept.stderr


@pytest.mark.parametrize(("at", "told"), [("tpu-vm scp", "could not be set up"), ("queued-resources delete", "was not deleted")])
def test_what_fails_again_and_again_is_given_up(pod, at, told):
    request = [0, "ACTIVE" if at == "tpu-vm scp" else "SUSPENDED", ""]
    status = "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status"
    pod.answer(
        {"queued-resources describe": [request], "tpu-vm describe": [READY], status: [[0, "new", ""]], at: [[1, "", "ERROR: PERMISSION"]]}
    )
    said = pod.refused("--yes", "keep", "--", "--config", "c.yaml")
    assert told + ", three times in a row: see above" in said and "PERMISSION" in said


@pytest.mark.parametrize("between", ["running", "RESTARTING"])
def test_hosts_that_ssh_never_reaches_are_given_up(pod, between):
    """After ten looks of four tries in a row; two before the hosts were there, or the slice was not, do not count."""
    gone = [255, "", "ssh: connect to host port 22: Connection timed out"]
    status = "tpu-vm ssh rlhf --worker=all --command=bash pe_rlhf_jax/tpu/worker.sh status"
    seen = [[0, "running\nrunning", ""]] if between == "running" else []
    nodes = [READY, READY, *([] if seen else [[0, between, ""]]), READY]
    pod.answer({"queued-resources describe": [NONE], "tpu-vm describe": nodes, status: [gone] * 8 + seen + [gone]})
    told = pod.refused("--yes", "keep", "--", "--config", "c.yaml")
    assert "rlhf is ready, and its hosts could not be reached 10 times in a row" in told and "Connection timed out" in told
    assert len(pod.changes()) == 8 + len(seen) + 40


def test_a_worker_without_an_install_says_so_and_notes_what_a_run_ended_with(pod, tmp_path):
    home = pod.hosts[0] / "pe_rlhf_jax"
    (home / "tpu").mkdir(parents=True)
    for name in ("tpu/worker.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, home / name)

    def worker(*arguments: str) -> subprocess.CompletedProcess:
        command = ["bash", str(home / "tpu" / "worker.sh"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=pod.environment, timeout=30)

    refused = worker("start", "--config", "c.yaml")
    assert refused.returncode == 2 and "run setup first" in refused.stderr
    assert worker("status").stdout == "new\n" and "bash tpu/worker.sh setup" in worker("go").stderr
    assert worker("setup").returncode == 0 and worker("status").stdout == "idle\n"
    for code in (0, 2):
        worker("start", "--config", "c.yaml")
        (home / "finish").write_text(str(code))
        for _ in range(300):
            if worker("status").stdout != "running\n" and (home / "run.exit").exists():
                break
        assert worker("status").stdout == f"done {code}\n"
