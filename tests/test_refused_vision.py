"""What is not there yet for models with images is said before anything is loaded, trained or written."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace

import pytest
from rich.console import Console
from tiny_vision import TinyVision

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.loading import load_decoder
from pe_rlhf_jax.plan import command

YAML = "model: {source: somewhere}\ndata: {prompts: {train: [a.jsonl]}}\n"


@pytest.fixture
def backbone():
    tiny = TinyVision("llava")
    return SimpleNamespace(config=tiny.architecture, family=tiny.family, source="hf:someone/llava", reader=tiny)


def test_no_stage_is_started(backbone):
    with pytest.raises(ConfigError, match=r"hf:someone/llava: a model with images \(llava\), which the stages do not train yet"):
        load_decoder(configuration.parse(YAML), backbone, mesh=None)


def test_nothing_is_planned(tmp_path):
    (tmp_path / "run.yaml").write_text(YAML, encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(TinyVision("llava").config), encoding="utf-8")
    files = {"config": tmp_path / "run.yaml", "model_config": tmp_path / "config.json"}
    arguments = argparse.Namespace(**files, set=[], topology=None, stage=None)
    with pytest.raises(ConfigError, match="a model with images, which the stages do not train yet"):
        command.run(arguments, Console())
