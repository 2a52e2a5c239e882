"""A whole run with pictures: it learns which colour it is shown, and continues bit for bit wherever it was stopped."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file
from tiny_project import jsonl, result, write_config
from tiny_seeing_project import COLOURS, PROMPT, seeing_project

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import main
from pe_rlhf_jax.answering import Answerer
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import DataError
from pe_rlhf_jax.report.metrics import MetricsLog

pytestmark = pytest.mark.xdist_group("whole runs with pictures")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """Configuration values, and the folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("seeing")
    values = seeing_project(folder)
    execute(write_config(values, folder))
    return values, folder


def execute(config) -> dict:
    return main.run(configuration.load(config, []), console=Console(file=io.StringIO()))


def test_it_learns_what_it_is_shown(seen):
    _, folder = seen
    summary = json.loads((folder / "runs" / "run" / "summary.json").read_text())
    assert summary["sft"]["loss_after"] < 0.6 * summary["sft"]["loss_before"]
    assert summary["reward_model"]["auc"] > 0.9
    assert summary["rl"]["reward_after"] > summary["rl"]["reward_before"]
    assert summary["judge"]["after"] > max(0.8, summary["judge"]["before"])
    assert {path.name for path in (folder / "runs" / "run" / "export").iterdir()} == {"policy", "reward"}
    answered = (folder / "runs" / "run" / "samples" / "evaluation.jsonl").read_text().splitlines()
    assert (folder / "runs" / "run" / "report.html").read_text().count('<img src="data:image/webp;base64,') == len(answered) > 0
    first = next(row for row in result(folder)[1] if row["stage"] == "rl")
    assert abs(first["objective/kl"]) < 1e-5 and abs(first["val/sampler_kl"]) < 1e-6


def test_stopped_and_continued_it_ends_the_same(seen, tmp_path, monkeypatch):
    """Features of pictures are no part of a checkpoint: what is left of a run encodes them again."""
    values, folder = seen
    config = write_config(values, tmp_path)
    write = MetricsLog.write

    def interrupted(log, stage, step, metrics):
        if (stage, step) == ("rl", 6):
            raise KeyboardInterrupt
        write(log, stage, step, metrics)

    monkeypatch.setattr(MetricsLog, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        execute(config)
    monkeypatch.setattr(MetricsLog, "write", write)
    execute(config)
    assert result(tmp_path) == result(folder)


def test_exported_adapters_and_projector_start_another_run(seen, tmp_path):
    """It exports as they were what it reads: factors to the bit, the projector's sums to rounding."""
    values, folder = seen
    made = folder / "runs" / "run" / "export"
    sections = {name: {"adapter": str(made / role)} for name, role in (("model", "policy"), ("reward", "reward"))}
    execute(write_config(values, tmp_path, **sections, run={"stages": ["export"]}, export={"roles": ["policy"]}))
    before, after = (load_file(path / "policy" / "adapter_model.safetensors") for path in (made, tmp_path / "runs" / "run" / "export"))
    assert before.keys() == after.keys() and any("multi_modal_projector" in name for name in before)
    for name, tensor in before.items():
        np.testing.assert_allclose(after[name], tensor, rtol=0, atol=0 if ".lora_" in name else 1e-6, err_msg=name)


def test_a_damaged_picture_is_named_or_skipped(seen, tmp_path):
    values, folder = seen
    whole = (folder / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "1.png").write_bytes((folder / "1.png").read_bytes())
    rows = [{"prompt": PROMPT, "image": f"{number}.png", "completion": " red"} for number in range(2)]
    data = {"sft": {"train": [jsonl(tmp_path / "rows.jsonl", rows)], "validation": [jsonl(tmp_path / "held.jsonl", rows[1:])]}}
    only = {"run": {"stages": ["sft"]}, "sft": {"steps": 1, "batch_size": 2}}
    for name in ("stops", "skips"):
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"rows.jsonl:1: expected a whole picture in .*0.png, found damaged or truncated data"):
        execute(write_config(values, tmp_path / "stops", data=data, **only))
    shown = io.StringIO()
    config = write_config(values, tmp_path / "skips", data=data | {"on_error": "skip"}, **only)
    main.run(configuration.load(config, []), console=Console(file=shown, width=200))
    assert "1 row skipped as bad in" in shown.getvalue()


def test_it_answers_about_a_picture_that_it_is_shown(seen):
    _, folder = seen
    answerer = Answerer(folder / "runs" / "run", Console(file=io.StringIO()), {"temperature": 0.0})
    answers = [answerer([PROMPT], [folder / f"{number}.png"])[0]["policy"] for number in range(6)]
    assert answers == [colour for _ in range(2) for colour in COLOURS]
    answerer.backbone.tokenizer.chat_template = "{% for turn in messages %}{{ turn.content }}{% endfor %}"
    (talked,) = answerer([[{"role": "user", "content": PROMPT.removeprefix("<image>\n")}]], [folder / "0.png"])
    assert talked["policy"] == answers[0] and talked["prompt"] == PROMPT
    with pytest.raises(ConfigError, match="expected <image> 2 times, once for each picture"):
        answerer([PROMPT], [folder / "0.png", folder / "1.png"])
    with pytest.raises(ConfigError, match="found no file"):
        answerer([PROMPT], [folder / "none.png"])
