"""The counts that say whether a peer's step was the work."""

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from peers import work


def _asked(what: str, *options: str) -> work.Work:
    parser = argparse.ArgumentParser()
    work.add_options(parser)
    return work.Work.of(what, parser.parse_args(options))


def test_counts_of_smollm2() -> None:
    """SmolLM2-135M has 134,515,008 parameters, the tied embedding once; PEFT counts 4,884,480 of rank 16 on all its linear layers."""
    asked = _asked("ppo_model")
    assert (asked.adapter, asked.backbone) == (4_884_480, 134_515_008)
    trained = {what: _asked(what).trained for what in work.WORKS}
    head = 576
    assert trained["reward_lora"] == trained["reward_lora_prompt"] == 4_884_480 + head
    assert trained["reward_full"] == 134_515_008 + head
    assert trained["ppo_model"] == trained["ppo_function"] == 2 * 4_884_480 + head
    assert trained["rloo"] == 4_884_480


def test_counts_of_heads_wider_than_the_hidden_size(tmp_path: Path) -> None:
    """A layer of hidden size 4 and inner size 6, with two query heads and one key head of size 3, in place of 4 / 2."""
    shape = {"model_type": "llama", "vocab_size": 10, "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 3, "tie_word_embeddings": False}
    path = tmp_path / "config.json"
    path.write_text(json.dumps(shape))
    asked = _asked("reward_lora", "--model-config", str(path))
    assert asked.adapter == 16 * (2 * (4 + 6) + 2 * (4 + 3) + 3 * (4 + 6))
    assert asked.backbone == (2 * 4 * 6 + 2 * 4 * 3 + 3 * 4 * 6 + 2 * 4) + 4 + 10 * 4


def test_a_process_is_asked_for_the_same_work() -> None:
    options = ["--dtype", "bfloat16", "--rows", "32", "--warmup", "0", "--recompute", "--micro-batch", "2"]
    asked = _asked("rloo", *options)
    assert (asked.dtype, asked.rows, asked.warmup, asked.recompute, asked.micro_batch) == ("bfloat16", 32, 0, True, 2)
    what, *passed = asked.options()[1:]
    assert _asked(what, *passed) == asked


def test_only_a_llama_is_counted(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"model_type": "gemma2"}')
    with pytest.raises(ValueError, match="gemma2"):
        _asked("rloo", "--model-config", str(path)).trained  # noqa: B018


def test_a_peer_that_fails_loses_no_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(work.__file__).parent))
    compare, asked_of, log = importlib.import_module("compare"), [], tmp_path / "log.jsonl"

    def measured(python: str, who: str, asked: Any) -> dict[str, Any] | None:
        asked_of.append(who)
        found = {"who": who, "version": "1", "device": "H100", "median": 0.5, "peak_rss_gib": 9.0, "peak_device_gib": 3.0, "parts": {}}
        processors = len(compare.os.sched_getaffinity(0))
        return None if who == "trl" else found | asked.record() | {"processors": processors, "note": ""}

    def run(*options: str) -> int | str | None:
        command = ["compare.py", "--trl-python", "python", "--what", "reward_lora", "--turns", "2", "--log", str(log)]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        with pytest.raises(SystemExit) as ended:
            compare.main()
        return ended.value.code

    monkeypatch.setattr(compare, "measured", measured)
    assert run() == 1 and asked_of == ["ours", "trl", "ours"], "a failure is not tried again"
    printed = capsys.readouterr().out
    assert "| reward_lora | trl | | failed |" in printed
    assert "| reward_lora | ours 1 | H100 | 0.500 (0.500 to 0.500) |  |  | 3.00 (3.00 to 3.00) |" in printed, "the device's memory"
    assert len(log.read_text().splitlines()) == 2
    run()
    assert asked_of[3:] == ["trl"], "what the log has is done"
    run("--pairs", "16")
    assert sorted(asked_of[4:]) == ["ours", "ours", "trl"], "other sizes are other work"
