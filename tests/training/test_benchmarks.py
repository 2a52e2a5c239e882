"""The paper's tables and the sweep: that what they compare is what they say, on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import paper_tables
import pytest
import sweep
import utilization
from tiny_pictures import seeing_context
from tiny_vision_folder import write_model


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize("stage", ["reward", "rl"])
def test_twins_are_run_and_weighed(make_context, stage, sees):
    # One short text at a time: at the default sizes, activations outweigh a tiny model's weights a thousandfold.
    sections = {"data": {"max_prompt_length": 8, "max_response_length": 8}, "reward": {"kind": "labels" if sees else "pairs"}}
    sections[stage] = {**sections.get(stage, {}), "batch_size": 1}
    context = seeing_context("paligemma", **sections) if sees else make_context(**sections)
    row = paper_tables.compare(context.config, context, stage, steps=1, setting="as it is")
    assert set(paper_tables._kept(context, "full")) == ({"vision"} if sees else set())  # a tower is one for all roles, on both sides
    small, large = (row["seconds"][name] for name in ("lora", "full"))
    assert small.keys() == large.keys() == set(paper_tables.PARTS if stage == "rl" else ["learning"])
    backbone = sum(x.nbytes for x in context.backbone["layers"]["mlp"]["up_proj"].values())
    # The full reward model has weights, two moments and gradients of what the adapters leave alone; RL's twin four models besides.
    assert row["memory_gib"]["full"] - row["memory_gib"]["lora"] > 3 * backbone / 2**30
    assert 0 < row["trained_share"] < 1 and 0 < row["memory_share"] < 1 and row["speed_up"] > 0
    table = paper_tables.table([row])
    assert f"| {stage} | as it is |" in table
    assert paper_tables.PAPER[stage]["memory"] in table and f"{row['memory_share']:.0%}" in table


def test_what_a_learning_step_has_to_do_is_counted_by_hand(make_context):
    """The tiny decoder: 2 layers of 16 x 16 + 2 x 16 x 8 + 16 x 16 + 3 x 16 x 24 weights, adapters of rank 3, 31 tokens."""
    rank, rows, prompt, response = 3, 4, 8, 8
    lengths = {"max_prompt_length": prompt, "max_response_length": response}
    rl = {"batch_size": rows, "algorithm": "ppo", "num_ppo_epochs": 3, "num_mini_batches": 2, "sampling": {"max_new_tokens": response}}
    context = make_context(data=lengths, reward={"batch_size": rows, "kind": "labels"}, rl=rl, lora={"r": rank})
    assert context.config.model.remat == "full"  # which is not counted
    matrices = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 24)
    adapters = 2 * rank * (2 * (16 + 16) + 2 * (16 + 8) + 3 * (16 + 24))
    attention = 2 * 4 * (prompt + response) * 16  # scores and sums over all heads
    token = 2 * (2 * matrices + 3 * adapters) + 3 * attention  # forward and back; of adapters, what is trained too
    tokens = rows * (prompt + response)
    assert utilization.needed(context, "reward") == pytest.approx(tokens * token)
    logits = 2 * 2 * 16 * 31 * rows * response
    both = 2 * tokens * token + logits  # policy and value model
    assert utilization.needed(context, "rl") == pytest.approx(3 * both)  # each epoch learns each row once


@pytest.mark.usefixtures("quick_compile")
def test_the_command_reads_a_model_and_prints_its_table(tmp_path, monkeypatch, capsys):
    text = {"model": {"source": str(write_model(tmp_path / "model"))}, "reward": {"batch_size": 1}, "lora": {"r": 2}}
    (tmp_path / "config.yaml").write_text(json.dumps(text | {"data": {"max_prompt_length": 32, "max_response_length": 8}}))
    given = ["--config", str(tmp_path / "config.yaml"), "--stages", "reward", "--steps", "1", "--output", str(tmp_path / "table.json")]
    shape = ["--model-config", str(tmp_path / "model/config.json")]
    monkeypatch.setattr(sys, "argv", ["paper_tables.py", *given, *shape, "--grid", "lora.r=2,4"])
    paper_tables.main()
    small, large = json.loads((tmp_path / "table.json").read_text())["rows"]
    assert [row["setting"] for row in (small, large)] == ["model lora.r=2", "model lora.r=4"]
    assert large["trained_share"] > 1.5 * small["trained_share"]
    assert "| reward | model lora.r=4 |" in capsys.readouterr().out


def test_a_copy_counts_and_a_second_name_for_it_does_not(make_context):
    backbone = make_context().backbone
    once = paper_tables._unique(backbone)
    assert paper_tables._unique((backbone, {"again": backbone})) == once == sum(x.nbytes for x in paper_tables.jax.tree.leaves(backbone))
    assert paper_tables._unique((backbone, paper_tables.jax.tree.map(lambda x: x + 0, backbone))) == 2 * once


def test_points_names_and_intervals():
    points = sweep.points(["lora.r=1,4", "reward.optimizer.learning_rate=1e-4"])
    assert points == [("lora.r=1", "reward.optimizer.learning_rate=1e-4"), ("lora.r=4", "reward.optimizer.learning_rate=1e-4")]
    assert sweep.folder_name(points[1], 2) == "r-4_learning_rate-1e-4_seed-2"
    numbers = sweep.points(["rl.sampling.temperature=0.5,1.5", "rl.optimizer.learning_rate=1.5e-4,2.5e-4"])
    assert sweep.folder_name(numbers[0], 0) == "temperature-0.5_learning_rate-1.5e-4_seed-0"
    assert len({sweep.folder_name(point, 0) for point in numbers}) == 4
    assert sweep.interval([0.5]) is None
    assert sweep.interval([1.0, 2.0, 3.0]) == pytest.approx(4.302653 * 1.0 / np.sqrt(3))
    with pytest.raises(SystemExit):
        sweep.points(["lora.r"])


def test_a_sweep_tabulates_what_ran_and_says_what_failed(tmp_path, monkeypatch, capsys):
    """Two ranks, two seeds; one run fails. The runs themselves are stood in for: each writes a summary."""

    def run(command, **_):
        settings = dict(word.split("=", 1) for word in command if "=" in word)
        if settings["lora.r"] == "4" and settings["run.seed"] == "1":
            return subprocess.CompletedProcess(command, 2, "", "error: no such data")
        folder = tmp_path / settings["run.name"]
        folder.mkdir(parents=True, exist_ok=True)
        summary = {"reward_model": {"accuracy": 0.1 * int(settings["lora.r"]) + 0.2 * int(settings["run.seed"])}}
        (folder / "summary.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(sweep.subprocess, "run", run)
    monkeypatch.setattr("sys.argv", f"sweep --config c.yaml --output {tmp_path} --grid lora.r=1,4 --seeds 0 1 --stages reward".split())
    sweep.main()
    lines = (tmp_path / "sweep.md").read_text().splitlines()
    assert lines[0] == "| lora.r | seeds | reward_model.accuracy |"
    assert lines[2] == f"| 1 | 2 | 0.200 ± {12.706 * 0.1:.3f} |"
    assert lines[3] == "| 4 | 1 | 0.400 |"
    assert len((tmp_path / "sweep.csv").read_text().splitlines()) == 4
    assert "<svg" in (tmp_path / "sweep.svg").read_text()
    assert "no such data" in capsys.readouterr().err
