"""What a run is given and did not make: adapters to start from, and other runs' reward models."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import pytest
from rich.console import Console
from tiny_gguf import hf_tensors, write_gguf

from pe_rlhf_jax import answering, loading, run
from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.answering import Answerer
from pe_rlhf_jax.checkpoint.peft_import import AdapterError
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.data import DataError
from pe_rlhf_jax.outcomes import Outcomes, without_spent_adapters
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.run import Run


def parsed(**sections) -> configuration.Config:
    return configuration.parse(json.dumps({"model": {"source": "x"}} | sections))


def keep(folder: Path, *names: str) -> Store:
    """A run folder's checkpoints with something under each of these names."""
    store = Store(folder / "checkpoints")
    for name in names:
        store.save(name, 1, {"w": jnp.float32(0)}, {"of": {}})
    return store


@pytest.mark.parametrize(
    ("kept", "model", "reward"),
    [
        ([], "a", "b"),
        (["sft"], "a", "b"),
        (["sft", "reference"], None, "b"),
        (["reward"], "a", None),
        (["sft", "reference", "reward", "reward_model"], None, None),
    ],
)
def test_adapters_that_nothing_starts_from_any_more_are_not_looked_for(tmp_path, monkeypatch, kept, model, reward):
    """Neither by a run that goes on, nor by one that is asked."""
    config = parsed(model={"source": "x", "adapter": "a"}, reward={"adapter": "b"})
    store = keep(tmp_path, *kept)
    (tmp_path / "config.yaml").write_text(configuration.dump(config))
    found = without_spent_adapters(config, store)
    assert (found.model.adapter, found.reward.adapter) == (model, reward)
    assert found.model_copy(update={"model": config.model, "reward": config.reward}) == config

    def loads(config, *_, **__):
        raise InterruptedError(config.model.adapter, config.reward.adapter)

    for module in (run, answering):
        monkeypatch.setattr(module, "load", loads)
    with pytest.raises(InterruptedError) as caught:
        Run(config, tmp_path, Progress(Console(file=io.StringIO())), SimpleNamespace())
    assert caught.value.args == (model, reward)
    with pytest.raises(InterruptedError) as caught:
        Answerer(tmp_path, Console(file=io.StringIO()), {})
    assert caught.value.args == (model, None)


@pytest.fixture
def given(tmp_path):
    """A function from a stage to what it is given, of a run with an adapter as its reference and another run's reward model."""
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"one")
    keep(tmp_path / "other", "reward_model")
    rewards = [{"model": "run"}, {"model": str(tmp_path / "other")}, {"function": "a:b"}]

    def of(stage: str, **sections) -> dict[str, str]:
        config = parsed(model={"source": "x", "adapter": str(tmp_path / "adapter")}, rl={"rewards": rewards}, **sections)
        return Outcomes(Store(tmp_path / "mine" / "checkpoints"), SimpleNamespace(), SimpleNamespace(config=config)).given(stage)

    return of


def test_what_a_stage_is_given_is_known_by_its_bits(tmp_path, given):
    adapter, model = "model.adapter", f"rl.rewards {tmp_path / 'other'}"
    assert set(given("sft")) == {adapter}
    # There is no policy to be judged yet, and the reward model may stand on the backbone.
    assert (set(given("evaluate")), set(given("evaluate", reward={"start_from": "sft"}))) == (set(), {adapter})
    assert set(given("rl")) == {adapter, model}
    assert (set(given("reward")), set(given("reward", reward={"start_from": "sft"}))) == (set(), {adapter})
    before = given("rl")
    assert given("rl") == before
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"two")
    changed = given("rl")
    assert changed[adapter] != before[adapter] and changed[model] == before[model]
    Store(tmp_path / "other" / "checkpoints").save("reward_model", 1, {"w": jnp.float32(1)}, {})
    assert given("rl")[model] != before[model]
    keep(tmp_path / "mine", "policy")
    assert given("evaluate") == given("rl")
    keep(tmp_path / "mine", "reference")
    assert set(given("rl")) == {model}  # the reference is the run's own
    for folder in ("adapter", "other"):
        shutil.rmtree(tmp_path / folder)
    assert given("rl") == {}


def test_an_evaluation_counts_while_what_it_was_given_is_the_same(tmp_path):
    """What it does not say, as before such things were kept, or what is out of reach now, makes no difference."""
    run, now = object.__new__(Run), {"model.adapter": "1", "rl.rewards x": "2"}
    run.config, run.store = parsed(), Store(tmp_path / "checkpoints")
    run.outcomes = SimpleNamespace(given=lambda stage: now)
    run.store.save("evaluate", 0, {}, {"of": run._of()})
    old = {name: value for name, value in run._of().items() if name != "given"}
    assert run.evaluated()
    now = {"model.adapter": "1"}
    assert run.evaluated()
    now = {"model.adapter": "2"}
    assert not run.evaluated()
    run.store.save("evaluate", 0, {}, {"of": old})
    assert run.evaluated()


def test_an_adapter_is_compared_with_the_backbones_revision(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", hf_tensors())
    backbone = dataclasses.replace(resolve(configuration.ModelConfig(source=str(tmp_path / "m.gguf"))), source="hf:a/b")
    monkeypatch.setattr(loading, "resolve", lambda _: backbone)

    def checked(**arguments):
        raise InterruptedError(arguments.get("base_model"), arguments["revision"])

    monkeypatch.setattr(loading, "check_adapter", checked)
    for changes, expected in (({}, ("hf:a/b", "v1")), ({"any_backbone": True}, (None, "v1"))):
        model = {"source": "hf:a/b", "revision": "v1", "adapter": "gone"} | changes
        data = {"max_prompt_length": 16, "max_response_length": 16}
        config = parsed(model=model, data=data, rl={"sampling": {"max_new_tokens": 8}})
        with pytest.raises(InterruptedError) as caught:
            loading.load(config, Progress(Console(file=io.StringIO())), needs=set())
        assert caught.value.args == expected


def test_what_needs_no_weights_is_looked_at_before_they_are_read(tmp_path, monkeypatch):
    write_gguf(tmp_path / "m.gguf", hf_tensors())
    (tmp_path / "adapter").mkdir()
    monkeypatch.setattr(loading, "load_decoder", lambda *_: pytest.fail("the weights are read"))
    lengths = {"max_prompt_length": 16, "max_response_length": 16}
    gone = {"data": {"sft": {"train": [str(tmp_path / "gone.jsonl")]}} | lengths, "rl": {"sampling": {"max_new_tokens": 8}}}
    model = {"source": str(tmp_path / "m.gguf")}
    shown = io.StringIO()
    for sections, error, said in (
        ({"model": model | {"revision": "v1"}}, DataError, "gone.jsonl"),
        ({"model": model | {"adapter": str(tmp_path / "adapter")}}, AdapterError, "adapter_config.json: cannot be read"),
        ({"model": model, "reward": {"adapter": str(tmp_path / "nowhere")}}, AdapterError, "nowhere/adapter_config.json: cannot be read"),
    ):
        with pytest.raises(error, match=said):
            loading.load(parsed(**(gone | sections)), Progress(Console(file=shown, width=500)), needs={"sft"})
    assert shown.getvalue().count("model.revision is of the hub, and does nothing with") == 1  # where there is one
