"""A whole run: every stage, what it leaves behind, and what happens when it is started again, changed or stopped."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest
from huggingface_hub import ModelCard
from safetensors.numpy import load_file
from tiny_project import finish, jsonl, result, start, write_config

KILLS = 8

WATCHED = """
import hashlib, sys
import jax, numpy as np
from pe_rlhf_jax import main, run

def digests(tree):
    return {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest() for path, x in jax.tree.leaves_with_path(tree)}

def execute(run, original=run.Run.execute):
    before, held = digests(run.context.backbone), run.context.backbone
    summary = original(run)
    loaded = run.backbone.load_params(jax.tree.leaves(held)[0].dtype)
    assert run.context.backbone is held and digests(held) == before == digests(loaded)
    print(f"{len(before)} leaves, the same bits")
    return summary

run.Run.execute = execute
sys.exit(main.cli(sys.argv[1:]))
"""

pytestmark = pytest.mark.xdist_group("whole runs")  # they share one undisturbed run and one cache


def test_they_are_one_workers(request):
    """Where tests are spread over workers by group; else each worker would make the undisturbed run."""
    assert not getattr(request.config.option, "loadgroup", False) or request.node.nodeid.endswith("@whole runs")


def test_a_run_leaves_what_it_promises(undisturbed):
    run = undisturbed / "runs" / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["reward_model"]["ci"][0] <= summary["reward_model"]["accuracy"] <= summary["reward_model"]["ci"][1] <= 1
    assert {"reward_before", "reward_after", "gain_in_std", "ci", "kl_per_token", "length_after", "distinct_2_after"} <= summary[
        "rl"
    ].keys()
    assert summary["sft"]["loss_after"] < summary["sft"]["loss_before"]
    assert all(summary["time"][f"{stage}_s"] > 0 for stage in ("sft", "reward", "rl", "evaluate", "export"))
    assert summary["peak_memory_gib"] > 0.1
    assert "<svg" in (run / "report.html").read_text()
    assert {path.name for path in (run / "export").iterdir()} == {"policy", "reward"}
    assert len((run / "samples" / "evaluation.jsonl").read_text().splitlines()) == 8


def test_the_backbone_in_memory_keeps_its_bits_through_all_stages(undisturbed, project, compiled, tmp_path):
    """And they are the file's, read anew at the end."""
    output = finish(start(write_config(project, tmp_path), compiled, script=WATCHED))
    assert "leaves, the same bits" in output
    assert result(tmp_path) == result(undisturbed)


def test_what_is_exported_is_what_was_trained(undisturbed):
    """The policy, not its reference; the reward model of the best checkpoint."""
    run = undisturbed / "runs" / "run"

    def saved(name):
        [step] = (run / "checkpoints" / name).iterdir()
        reader, path = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()), (step / "state").absolute()
        arguments = {leaf: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in reader.metadata(path).item_metadata.tree}
        return reader.restore(path, args=ocp.args.PyTreeRestore(restore_args=arguments))

    def exported(name):
        return load_file(run / "export" / name / "adapter_model.safetensors")

    module, name = "lora/layers/mlp/up_proj/b", "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    policy, reference, reward = saved("policy"), saved("reference"), saved("reward_model")
    np.testing.assert_array_equal(exported("policy")[name], np.asarray(policy[f"policy/{module}"])[1].T)
    np.testing.assert_array_equal(exported("reward")[name], np.asarray(reward[module])[1].T)
    np.testing.assert_array_equal(exported("reward")["base_model.model.score.weight"], np.asarray(reward["head/kernel"]).T)
    assert np.any(policy[f"policy/{module}"] != reference[module])

    rows = [row for row in result(undisturbed)[1] if row["stage"] == "reward" and "eval/accuracy" in row]
    best = max(rows, key=lambda row: (row["eval/accuracy"], -row["step"]))["step"]
    assert json.loads((run / "summary.json").read_text())["reward_model"]["best_step"] == best < rows[-1]["step"]


def test_before_the_first_update_policy_and_reference_are_one(undisturbed):
    _, rows = result(undisturbed)
    first = next(row for row in rows if row["stage"] == "rl" and row["step"] == 1)
    assert abs(first["objective/kl"]) < 1e-5  # what sampling and another pass round differently
    assert abs(first["objective/non_score_reward"]) < 1e-5
    assert abs(first["val/sampler_kl"]) < 1e-6


def test_started_again_it_is_quick_and_changes_nothing(undisturbed, compiled):
    before = result(undisturbed)
    output = finish(start(undisturbed / "config.yaml", compiled))
    assert output.count("finished before") == 4
    assert result(undisturbed) == before


def test_stages_run_one_by_one_as_together(undisturbed, project, compiled, tmp_path):
    config = write_config(project, tmp_path)
    for stages in ("[sft]", "[reward, evaluate]", "[rl]", "[evaluate, export]"):  # what was evaluated too early is done again
        finish(start(config, compiled, "--set", f"run.stages={stages}"))
    assert result(tmp_path) == result(undisturbed)
    output = finish(start(config, compiled, "--set", "run.stages=[evaluate]", "--set", "evaluate.prompts=2"))
    assert "finished before" not in output and json.loads((tmp_path / "runs/run/summary.json").read_text())["rl"]["prompts"] == 2


def test_another_configuration_is_refused_with_the_difference(undisturbed, compiled):
    output = finish(start(undisturbed / "config.yaml", compiled, "--set", "rl.kl_coef=0.125"), code=2)
    assert "rl.kl_coef: 0.05 -> 0.125" in output
    assert "--restart" in output


def test_rl_without_a_reward_model_says_what_to_run(project, compiled, tmp_path):
    output = finish(start(write_config(project, tmp_path), compiled, "--set", "run.stages=[rl]"), code=2)
    assert "run the stage `reward` first" in output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_saves_and_continues(undisturbed, project, compiled, tmp_path, number):
    # No step is due for a checkpoint, so that only the one of the stop can be there.
    process = start(write_config(project, tmp_path, run={"checkpoint_every": 100}), compiled)
    metrics = tmp_path / "runs" / "run" / "metrics.jsonl"
    _wait(lambda: metrics.exists() and '"rl"' in metrics.read_text(), process)
    process.send_signal(number)
    output = finish(process, code=75)
    assert number.name in output
    assert "same command" in output
    done = json.loads(metrics.read_text().splitlines()[-1])["step"]
    saved = max(int(path.name) for path in (tmp_path / "runs/run/checkpoints/rl").iterdir())
    assert saved == done
    finish(start(tmp_path / "config.yaml", compiled))
    assert result(tmp_path) == result(undisturbed)


def test_killed_at_random_instants_it_ends_the_same(undisturbed, project, compiled, tmp_path):
    """Every second kill comes in a save that is under way."""
    generator = random.Random(0)
    config, checkpoints = write_config(project, tmp_path), tmp_path / "runs" / "run" / "checkpoints"
    killed = inside = 0
    while killed < KILLS:
        began, process = time.time_ns(), start(config, compiled)
        if killed % 2 == 1:
            _stop_inside_a_save(process, checkpoints, began)
        else:
            _wait(lambda: (tmp_path / "runs" / "run" / "config.yaml").exists(), process)
            time.sleep(generator.uniform(2.0, 9.0))
        process.kill()
        process.communicate()
        killed += 1
        inside += _unfinished(checkpoints, began)
        if process.returncode == 0:
            break
    assert killed > 2 and inside >= 1
    finish(start(config, compiled))
    assert result(tmp_path) == result(undisturbed)


def test_a_fitted_head_is_judged_and_lasts_through_a_kill(project, compiled, tmp_path):
    """Killed before the first update, a run goes on with the head it has; rows share what they begin with, those that are judged too."""
    sections = {"data": {"packing": True, "group_by_prefix": True}, "reward": {"linear_probe": 20}, "run": {"stages": ["reward"]}}
    folders = [tmp_path / "whole", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    whole, killed = (write_config(project, folder, **sections) for folder in folders)
    output = finish(start(whole, compiled))
    assert "reward: fits a head to 20 examples before the first update" in output
    process = start(killed, compiled)
    _wait((folders[1] / "runs/run/checkpoints/reward/0").exists, process)
    process.kill()
    process.communicate()
    assert "fits a head" not in finish(start(killed, compiled))
    assert result(folders[0]) == result(folders[1])
    _, rows = result(folders[0])
    assert [row["step"] for row in rows] == list(range(7)) and "loss" not in rows[0] and rows[0]["eval/accuracy"] > 0.5


def test_eight_devices_learn_what_one_does(undisturbed, project, compiled, tmp_path):
    """Data, fsdp and tensor axes of two: the same losses to rounding, the same choices of tokens at the start."""
    config = write_config(project, tmp_path, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    finish(start(config, compiled, "--set", "run.stages=[sft, reward]", devices=8))
    (_, one), (_, eight) = result(undisturbed), result(tmp_path)
    for row, other in zip([row for row in one if row["stage"] != "rl"], eight, strict=True):
        assert (row["stage"], row["step"]) == (other["stage"], other["step"])
        np.testing.assert_allclose(other["loss"], row["loss"], rtol=1e-4)


def _unfinished(checkpoints, since: int) -> bool:
    """Whether there is an unfinished checkpoint that was worked on since then: others are what an earlier kill left."""
    for path in checkpoints.glob("*/.saving*"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ctime_ns > since:
                return True
    return False


def _stop_inside_a_save(process, checkpoints, since: int) -> None:
    """Stops the process where a checkpoint is not finished, as seen while it stands still; or waits for its end."""
    while process.poll() is None:
        _wait(lambda: _unfinished(checkpoints, since), process, pause=0.0005)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if _unfinished(checkpoints, since):
            return
        process.send_signal(signal.SIGCONT)


def _wait(condition, process, pause: float = 0.02, limit: float = 240.0) -> None:
    """Until the condition holds or the process has ended."""
    until = time.monotonic() + limit
    while not condition() and process.poll() is None:
        assert time.monotonic() < until, "nothing happened"
        time.sleep(pause)


def test_labels_and_functions_through_a_whole_run(project, compiled, tmp_path, monkeypatch):
    """A reward model of labels, with a function beside it and one that only watches; GRPO; then the same model for another run."""
    (tmp_path / "mine.py").write_text(
        "def short(prompts, completions, **columns):\n    return [-0.01 * len(text) for text in completions]\n"
        "def words(prompts, completions, **columns):\n    return [float(len(text.split())) for text in completions]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    labels = [{"prompt": f"film {i} is", "completion": f" {('good', 'poor')[i % 2]} {i % 7}", "label": 1 - i % 2} for i in range(40)]
    rewards = [{"model": "run"}, {"function": "mine:short", "weight": 0.5}, {"function": "mine:words", "weight": 0}]
    sections = {
        "data": project["data"] | {"label": {"train": [jsonl(tmp_path / "labels.jsonl", labels)]}},
        "reward": project["reward"] | {"kind": "labels", "balance_classes": True},
        "rl": project["rl"] | {"algorithm": "grpo", "rewards": rewards, "group_size": 4},
    }
    config = write_config(project, tmp_path, **sections)
    finish(start(config, compiled))
    summary = json.loads((tmp_path / "runs/run/summary.json").read_text())
    assert 0 <= summary["reward_model"]["auc_ci"][0] <= summary["reward_model"]["auc"] <= 1
    assert set(summary["rl"]["rewards"]) == {"model", "short", "words"}
    rows = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if row["stage"] == "rl":
            expected = row["rewards/model"] + 0.5 * row["rewards/short"]
            np.testing.assert_allclose(row["objective/scores"], expected, rtol=1e-4, atol=1e-5)

    # Another run takes that reward model as it is, and has no reward stage of its own.
    other = {"rl": project["rl"] | {"algorithm": "rloo", "group_size": 4, "rewards": [{"model": str(tmp_path / "runs/run")}]}}
    config = write_config(project, tmp_path, **other)
    arguments = ("--set", "run.name=other", "--set", "run.stages=[sft, rl, evaluate, export]")
    output = finish(start(config, compiled, *arguments))
    assert "the reward model was not trained" in output
    again = json.loads((tmp_path / "runs/other/summary.json").read_text())
    # The same reference answers the same prompts with the same keys, so the same model gives them the same score.
    np.testing.assert_allclose(again["rl"]["rewards"]["run"]["before"], summary["rl"]["rewards"]["model"]["before"], rtol=1e-5)


def test_a_function_that_fails_stops_the_run_with_its_name(project, compiled, tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def broken(prompts, completions, **columns):\n    return [float('nan')] * len(completions)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    changes = {"rewards": [{"function": "mine:broken"}], "value_init": "zero"}
    config = write_config(project, tmp_path, rl=project["rl"] | changes)
    output = finish(start(config, compiled, "--set", "run.stages=[rl]"), code=2)
    assert "mine:broken returned nan" in output


def test_full_tuning_beside_a_shared_backbone_is_refused_with_the_reason(project, compiled, tmp_path):
    config = write_config(project, tmp_path, reward=project["reward"] | {"tuning": "full"})
    output = finish(start(config, compiled), code=2)
    assert "reward.tuning full makes another; set rl.roles: separate" in output


def test_a_quantized_backbone_serves_every_stage(project, compiled, tmp_path):
    """All stages end, adapters come out, and what is not the same backbone is kept apart."""
    model = project["model"] | {"quantization": "nf4"}
    config = write_config(project, tmp_path, model=model, rl=project["rl"] | {"steps": 1, "old_logprobs": "recompute"})
    assert "float32 over nf4" in finish(start(config, compiled))
    summary = json.loads((tmp_path / "runs" / "run" / "summary.json").read_text())
    assert summary["model"]["quantization"] == "nf4"
    assert summary["sft"]["loss_after"] < summary["sft"]["loss_before"]
    adapters, rows = result(tmp_path)
    assert {name.split("/")[0] for name in adapters} == {"policy", "reward"}
    kl = next(row["objective/kl"] for row in rows if row["stage"] == "rl")
    assert kl == 0  # before the first update, policy and reference are one

    other = {"rewards": [{"model": str(tmp_path / "runs" / "run")}], "steps": 1, "value_init": "zero"}
    plain = write_config(project, tmp_path, rl=project["rl"] | other)
    stages = ("--set", "run.name=plain", "--set", "run.stages=[sft, rl]")
    output = finish(start(plain, compiled, *stages), code=2)
    assert "tiny.gguf in nf4" in output and "rl.roles: separate" in output
    finish(start(plain, compiled, *stages, "--set", "rl.roles=separate", "--restart"))


def test_a_quantized_backbone_cannot_be_tuned(project, compiled, tmp_path):
    config = write_config(project, tmp_path, model=project["model"] | {"quantization": "int8"}, sft=project["sft"] | {"tuning": "full"})
    output = finish(start(config, compiled, "--set", "rl.roles=separate"), code=2)
    assert "a quantized backbone cannot be trained, but sft.tuning is full" in " ".join(output.split())


def test_an_exported_adapter_starts_another_run_and_comes_out_as_it_went_in(undisturbed, project, compiled, tmp_path):
    """To the bit; and merged into the backbone it is a plain model, whose weights a third run trains on from there."""
    made = undisturbed / "runs" / "run" / "export"
    for role in ("policy", "reward"):
        told = ModelCard.load(made / role / "README.md")
        assert told.data.library_name == "peft" and told.data.pipeline_tag.startswith("text-")
        assert "pe-rlhf run --config " in told.content and "95% interval" in told.content
    adapters = {"model": project["model"] | {"adapter": str(made / "policy")}, "export": {"roles": ["policy"], "merged": True}}
    output = finish(start(write_config(project, tmp_path, **adapters), compiled, "--set", "run.stages=[export]"))
    assert "warning" not in output
    ours = tmp_path / "runs" / "run" / "export"
    before, after = (load_file(folder / "policy" / "adapter_model.safetensors") for folder in (made, ours))
    assert before.keys() == after.keys()
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)
    assert sorted(path.name for path in (ours / "merged").iterdir()) == ["policy"]

    merged = {"model": {"source": str(ours / "merged" / "policy")}, "sft": project["sft"] | {"steps": 1}}
    finish(start(write_config(project, tmp_path, **merged), compiled, "--set", "run.name=third", "--set", "run.stages=[sft]"))
    figures = json.loads((tmp_path / "runs" / "third" / "summary.json").read_text())["sft"]
    trained = json.loads((undisturbed / "runs" / "run" / "summary.json").read_text())["sft"]
    assert figures["loss_before"] < trained["loss_before"]  # it has learned what the first run taught it
    command = [sys.executable, "-m", "pe_rlhf_jax.main", "generate", "--run", str(tmp_path / "runs" / "third"), "--prompt", "film 3 is"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PE_RLHF_CACHE": str(compiled), "COLUMNS": "120"}
    said = subprocess.run([*command, "--max-new-tokens", "3"], env=environment, capture_output=True, text=True, timeout=300)
    assert said.returncode == 0 and "\nreference: " in said.stdout and "\npolicy: " not in said.stdout  # RL has not been


def test_an_adapter_of_another_shape_is_refused(undisturbed, project, compiled, tmp_path):
    made = str(undisturbed / "runs" / "run" / "export" / "policy")
    sections = {"model": project["model"] | {"adapter": made}, "lora": {"r": 3, "lora_alpha": 4.0}}
    output = finish(start(write_config(project, tmp_path, **sections), compiled), code=2)
    assert "adapter_config.json" in output and "error:" in output


def test_generate_answers_with_both_policies(undisturbed, compiled):
    """Greedy, so twice the same; a sampling field that cannot be is refused."""
    run = str(undisturbed / "runs" / "run")
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PE_RLHF_CACHE": str(compiled), "COLUMNS": "120"}

    def generate(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pe_rlhf_jax.main", "generate", "--run", run, "--prompt", "film 3 is", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)

    first, second = (generate("--temperature", "0", "--max-new-tokens", "5") for _ in range(2))
    assert first.returncode == 0, first.stdout + first.stderr
    assert "film 3 is\nreference: " in first.stdout and "\npolicy: " in first.stdout and first.stdout == second.stdout
    refused = generate("--temperature", "-1")
    assert refused.returncode == 2 and "temperature" in refused.stdout
