"""The benchmarks of sampling: that they run, and that what they compare is what they say, on one layer of a tiny shape."""

from __future__ import annotations

import json

import decode
import group_sampling
import pytest

SHAPE = {"model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
SHAPE |= {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 64}
SHAPE |= {"tie_word_embeddings": False}


@pytest.fixture
def shape(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path / "config.json")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_prompts_once_and_each(shape, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["group_sampling", "--model-config", shape, "--prompt=8", "--answer=3", "--rows=6", "--turns=1"])
    group_sampling.main()
    found = json.loads(capsys.readouterr().out)
    assert found["differ"] == 0 and found["flops"] > 1.5 and len(found["seconds"]) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_what_a_decode_step_has_to_read(shape, monkeypatch, capsys):
    monkeypatch.setattr(decode, "LARGE", 2**20)
    argv = ["decode", "--model-config", shape, "--batch", "1", "2000", "--prompt=8", "--steps=3", "--turns=1", "--adapter"]
    monkeypatch.setattr("sys.argv", argv)
    decode.main()
    one, many = map(json.loads, capsys.readouterr().out.splitlines())
    assert one["batch"] == 1 and many["batch"] == 2000
    # Two times a head of 8 in float32, for 8 tokens before and 1 to 3 of its own.
    assert many["bytes"] - one["bytes"] == round(1999 * 2 * 8 * 4 * 10 / 1e6)
    assert one["read"] == many["read"] > 0 and 0 < one["share"][1] <= one["share"][0] <= one["share"][2]
