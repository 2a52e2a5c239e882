"""How a run saves, stops, continues and chooses, over a stage that only counts: a state is the number of its step."""

from __future__ import annotations

import io
import json
import re
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from jax.errors import JaxRuntimeError
from jax.sharding import AbstractMesh
from rich.console import Console

from pe_rlhf_jax import checks, main
from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.checkpoint.store import CheckpointError, Store
from pe_rlhf_jax.config import ConfigError
from pe_rlhf_jax.data import LabelExample, PreferenceExample, PromptExample, Split
from pe_rlhf_jax.loading import needed
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.outcomes import Outcomes
from pe_rlhf_jax.report.metrics import MetricsLog
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.run import Run, Stopped
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.types import TrainState

STEPS = 7


class Counting:
    """A run folder and a stage; each `start` is a new process on it."""

    def __init__(self, folder, every: int = 100, accuracies: dict[int, float] | None = None, patience: int | None = None):
        self.folder, self.accuracies, self.patience, self.seen = folder, accuracies or {}, patience, []
        self.data, self.said, self.devices, self.given = "one", io.StringIO(), 1, {}
        self.config = configuration.parse(f"{{model: {{source: x}}, run: {{checkpoint_every: {every}}}, reward: {{steps: {STEPS}}}}}")

    def start(self, stop_at: int | None = None, kill_at: int | None = None):
        """Runs the stage; returns what it left, or None where it was stopped or killed after a step."""
        run = object.__new__(Run)
        run.config, run.folder, run.progress = self.config, self.folder, Progress(Console(file=self.said))
        run.store, run.log = Store(self.folder / "checkpoints"), MetricsLog(self.folder, tensorboard=False)
        run.backbone = SimpleNamespace(source="x", sha256="0")
        mesh = AbstractMesh((self.devices, 1, 1), ("data", "fsdp", "tensor"))
        run.context = SimpleNamespace(data=SimpleNamespace(preference=Split([PromptExample(np.arange(1), self.data, {})], [])), mesh=mesh)
        run.outcomes = SimpleNamespace(like=lambda init: init(), check=lambda meta: None, given=lambda stage: self.given)
        stop = SimpleNamespace(received=None)
        run.stop = SimpleNamespace(asked=lambda: stop.received)

        fresh = run.store.latest("reward") is None

        def advance(state):
            self.seen.append(int(state.step))
            if fresh and 0 in self.accuracies:
                yield state, {"eval/accuracy": self.accuracies[0]}
            for step in range(int(state.step) + 1, STEPS + 1):
                if step == kill_at:
                    raise KeyboardInterrupt
                if step == stop_at:
                    stop.received = "SIGTERM"
                state = state.replace(step=jnp.int32(step), trainable={"w": jnp.float32(step)})
                metrics = {"eval/accuracy": self.accuracies[step]} if step in self.accuracies else {}
                yield state, {"loss": 1.0 / step} | metrics

        start = TrainState(jnp.int32(0), {"w": jnp.float32(0)}, {"m": jnp.zeros(1)}, jnp.int32(0), jnp.int32(0))
        select = "eval/accuracy" if self.accuracies else None
        try:
            finish = lambda s: (s.trainable, {"best_step": int(s.step)})  # noqa: E731
            run._train("reward", lambda: start, advance, finish, select=select, patience=self.patience)
        except (Stopped, KeyboardInterrupt):
            return None
        outcome, meta = run.store.restore("reward_model", {"w": jnp.float32(0)})
        assert meta["figures"]["best_step"] == float(outcome["w"])
        return int(outcome["w"])

    @property
    def rows(self) -> list[int]:
        return [json.loads(line)["step"] for line in (self.folder / "metrics.jsonl").read_text().splitlines()]

    @property
    def saved(self) -> list[int]:
        return sorted(int(path.name) for path in (self.folder / "checkpoints" / "reward").iterdir())


@pytest.mark.parametrize(
    ("accuracies", "best"), [({}, 7), ({2: 0.5, 4: 0.9, 6: 0.7}, 4), ({2: 0.9, 4: 0.9, 7: 0.1}, 2), ({7: float("nan")}, 7)]
)
def test_the_best_checkpoint_is_the_outcome_or_else_the_last(tmp_path, accuracies, best):
    run = Counting(tmp_path, accuracies=accuracies)
    assert run.start() == best
    assert run.rows == [1, 2, 3, 4, 5, 6, 7] and run.seen == [0]


def test_what_a_stage_begins_with_may_be_the_best(tmp_path):
    """It is kept beside the newest two, and a start after a kill does not judge it again, or log it twice."""
    run = Counting(tmp_path, accuracies={0: 0.9, 4: 0.5})
    MetricsLog(tmp_path, tensorboard=False).write("reward", 0, {"eval/accuracy": 0.8})  # a kill came before it was saved
    assert run.start(kill_at=3) is None
    assert run.rows == [0, 1, 2] and run.saved == [0]
    assert run.start() == 0
    assert run.rows == list(range(8)) and run.seen == [0, 0] and run.saved[0] == 0


def test_a_finished_stage_is_not_run_again(tmp_path):
    run = Counting(tmp_path)
    assert [run.start(), run.start()] == [7, 7]
    assert run.seen == [0] and run.rows == [1, 2, 3, 4, 5, 6, 7]


def test_a_stop_saves_the_step_that_is_done_and_the_next_start_goes_on_there(tmp_path):
    run = Counting(tmp_path)
    assert run.start(stop_at=3) is None
    assert (run.rows, run.saved) == ([1, 2, 3], [3])
    assert run.start(stop_at=5) is None
    assert run.start() == 7
    assert run.seen == [0, 3, 5] and run.rows == [1, 2, 3, 4, 5, 6, 7]


def test_other_rows_than_a_stage_began_with_are_said(tmp_path):
    run = Counting(tmp_path)
    for data, warned in (("one", 0), ("one", 0), ("two", 1), ("two", 1)):
        run.data = data
        run.start(stop_at=(run.saved or [0])[-1] + 1 if (tmp_path / "checkpoints").exists() else 1)
        assert run.said.getvalue().count("reward began with other rows of data") == warned


def test_a_changed_adapter_or_reward_model_that_a_stage_is_given_is_said(tmp_path):
    """Not what a folder without such entries began with, and not what is out of reach for a while."""
    run = Counting(tmp_path)
    seen = ({}, {"model.adapter": "1"}, {}, {"model.adapter": "1"}, {"model.adapter": "2"}, {"model.adapter": "2"})
    for step, (given, warned) in enumerate(zip(seen, (0, 0, 0, 0, 1, 1), strict=True), start=1):
        run.given = given
        run.start(stop_at=step)
        assert " ".join(run.said.getvalue().split()).count("reward began with another model.adapter, whose files") == warned


def test_a_policy_that_is_judged_beside_another_reference_than_it_was_trained_with_is_said(tmp_path, monkeypatch):
    run, said = object.__new__(Run), io.StringIO()
    run.config, run.folder, run.store = configuration.parse("model: {source: x}"), tmp_path, Store(tmp_path / "checkpoints")
    run.progress, run.backbone = Progress(Console(file=said, width=500)), SimpleNamespace(source="x", sha256="0")
    run.context = SimpleNamespace(data=SimpleNamespace(preference=None, prompts=Split([], [])))
    run.outcomes = SimpleNamespace(
        reward_model=lambda: None, policy=Role, reference=Role, reward_models=dict, given=lambda stage: {"model.adapter": "2"}
    )
    run.stop = SimpleNamespace(asked=lambda: None)
    monkeypatch.setattr("pe_rlhf_jax.run.Rewards", lambda *_: None)
    monkeypatch.setattr("pe_rlhf_jax.run.evaluate.policy", lambda *_: iter([(0, {"samples": []})]))
    for kept, warned in (({}, 0), ({"given": {"model.adapter": "2"}}, 0), ({"given": {"model.adapter": "1"}}, 1)):
        run.store.save("policy", 1, {"w": jnp.float32(0)}, kept)
        run._evaluate()
        assert said.getvalue().count("rl began with another model.adapter") == warned
        assert run.store.meta("evaluate")["of"]["given"] == {"model.adapter": "2"}
        (tmp_path / "checkpoints" / "evaluate").rename(tmp_path / f"before-{len(list(tmp_path.iterdir()))}")  # to be judged again


@pytest.mark.parametrize(
    ("role", "said", "written"),
    [
        (Role(), "the policy model was not trained", None),
        (Role(params={"w": jnp.ones(1)}), "the policy model has weights of its own", True),
        (Role(lora={}), "of v1", True),
    ],
)
def test_only_what_was_trained_is_written_whole(tmp_path, monkeypatch, role, said, written):
    run, shown, calls = object.__new__(Run), io.StringIO(), []
    text = {"model": {"source": "hf:a/b", "revision": "v1"}, "export": {"roles": ["policy"], "merged": True}}
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    run.progress, run.context = Progress(Console(file=shown, width=500)), SimpleNamespace(backbone={})
    family = SimpleNamespace(weights=lambda config: ())
    run.backbone = SimpleNamespace(source="x", sha256="0", family=family, config=None)
    run.outcomes = SimpleNamespace(policy=lambda: None, reference=lambda: role, reward_model=lambda: None)
    monkeypatch.setattr(run, "summary", dict)
    monkeypatch.setattr(run, "_training", lambda *_: None)
    monkeypatch.setattr("pe_rlhf_jax.run.merged.export_merged", lambda folder, *_, **__: calls.append(folder))
    monkeypatch.setattr("pe_rlhf_jax.run.export.export_policy", lambda *_, revision, **__: run.progress.note(f"of {revision}"))
    run._export()
    assert said in shown.getvalue()
    assert calls == ([tmp_path / "export" / "merged" / "policy"] if written else [])


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_configuration_may_be_in_an_object_store(monkeypatch, capsys, command):
    asked = []

    def load(place, overrides):
        asked.append(place)
        raise ConfigError("as far as it goes")

    monkeypatch.setattr(configuration, "load", load)
    assert main.cli([command, "--config", "gs://bucket/c.yaml"]) == 2
    assert asked == ["gs://bucket/c.yaml"] and "as far as it goes" in capsys.readouterr().out


def test_a_place_that_cannot_be_is_said_by_the_command_line(capsys):
    for arguments in (["report", "ftp://x"], ["generate", "--run", "ftp://x"]):
        with pytest.raises(SystemExit):
            main.cli(arguments)
        assert "ftp://x is neither a path nor a place that begins with gs://" in capsys.readouterr().err


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_other_devices_in_the_middle_of_a_stage_with_dropout_are_said(tmp_path, dropout):
    run = Counting(tmp_path)
    run.config = configuration.parse(configuration.dump(run.config), [f"lora.lora_dropout={dropout}"])
    for step, devices in ((1, 1), (2, 1), (3, 2), (4, 2)):
        run.devices = devices
        run.start(stop_at=step)
        assert run.said.getvalue().count("from here on dropout draws otherwise") == (step > 2 and dropout > 0)


def test_after_a_kill_what_the_last_checkpoint_does_not_know_is_done_again(tmp_path):
    run = Counting(tmp_path, every=2)
    assert run.start(kill_at=6) is None
    assert (run.rows, run.saved) == ([1, 2, 3, 4, 5], [2, 4])
    assert run.start() == 7
    assert run.seen == [0, 4] and run.rows == [1, 2, 3, 4, 5, 6, 7]


def test_an_evaluated_step_is_saved_and_kept_while_it_is_the_best(tmp_path):
    run = Counting(tmp_path, every=2, accuracies={1: 0.9, 3: 0.2})
    assert run.start(kill_at=7) is None
    assert run.saved == [1, 4, 6]
    assert run.start() == 1


@pytest.mark.parametrize(("patience", "steps"), [(1, 3), (2, 5), (3, 6), (None, 7)])
def test_training_ends_early_where_the_held_out_figure_does_not_rise(tmp_path, patience, steps):
    """0.9 at step 2 is never beaten; an equal one is no rise."""
    run = Counting(tmp_path, accuracies={1: 0.5, 2: 0.9, 3: 0.9, 5: 0.8, 6: 0.89}, patience=patience)
    assert run.start() == 2
    assert run.rows == list(range(1, steps + 1))


def test_a_run_that_was_killed_where_it_would_have_ended_ends_there(tmp_path):
    """Killed after the last step's checkpoint and before the outcome: the next start must not train on."""
    accuracies = {1: 0.9, 2: 0.8, 3: 0.7, 4: 1.0}
    stopped = Counting(tmp_path, accuracies=accuracies, patience=2)
    assert stopped.start(stop_at=3) is None  # the signal comes with the step that ends it
    assert stopped.start() == 1
    assert stopped.rows == [1, 2, 3]


def test_a_named_data_set_serves_the_evaluation_with_what_it_has():
    """Sentences have no labels; questions about pictures do."""

    def kinds(source: str, kind: str) -> set[str]:
        return needed(
            configuration.Config(model={"source": "x"}, data={"source": source}, reward={"kind": kind}, run={"stages": ["evaluate"]})
        )

    assert kinds("movie-reviews", "pairs") == kinds("easy-vqa", "pairs") == {"preference", "prompts"}
    assert kinds("movie-reviews", "labels") == {"prompts"} and kinds("easy-vqa", "labels") == {"label", "prompts"}


@pytest.mark.parametrize(
    ("rl", "said"),
    [
        ({}, "run the stage `reward` first"),
        ({"rewards": [{"function": "math:sqrt"}]}, "rl.value_init reward .* set it to zero"),
        ({"rewards": [{"function": "math:sqrt"}], "value_init": "zero"}, None),
        ({"rewards": [{"function": "math:sqrt"}], "algorithm": "rloo"}, None),
        ({"rewards": [{"function": "math:sqrt"}], "value_model": "trunk"}, None),
    ],
)
def test_a_reward_model_that_rl_will_miss_is_missed_before_anything_is_trained(tmp_path, rl, said):
    run, text = object.__new__(Run), {"model": {"source": "x"}, "run": {"stages": ["sft", "rl"]}, "rl": rl}
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    run.outcomes = SimpleNamespace(check_other_runs=lambda: seen.append(1))
    seen: list[int] = []
    if said is None:
        checks.order(run)
    else:
        with pytest.raises(ConfigError, match=said):
            run.execute()
    run.store.save("reward_model", 1, {"w": jnp.float32(0)}, {})
    checks.order(run)
    asked = len(seen)
    run.store.save("policy", 1, {"w": jnp.float32(0)}, {})
    checks.order(run)
    assert (asked, len(seen) - asked) == (2, 0)  # a finished policy needs no other run any more


def test_what_cannot_be_judged_or_begun_is_refused_before_anything_is_trained(tmp_path):
    """Held-out rows of one label; a head on the policy's trunk that would begin as the reward model's."""

    def check(stages, held_out, **rl):
        run, text = object.__new__(Run), {"model": {"source": "x"}, "run": {"stages": stages}, "reward": {"kind": "labels"}, "rl": rl}
        text["evaluate"] = {"pairs": 3}
        run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
        rows = [SimpleNamespace(label=label) for label in held_out]
        run.context = SimpleNamespace(config=run.config, split=lambda kind: Split(rows, rows), packing=lambda *_: None)
        run.outcomes = SimpleNamespace(check_other_runs=lambda: None)
        checks.order(run)

    check(["reward"], [1, 1, 1, 0])
    for stages, held_out, said in (
        (["reward"], [1] * 4, "reward.evaluation_pairs: the first 4 held-out rows have one label only"),
        (["reward", "evaluate"], [1, 1, 1, 0], "evaluate.pairs: the first 3 held-out rows"),
    ):
        with pytest.raises(ConfigError, match=said):
            check(stages, held_out)
    check(["reward", "rl"], [1, 0], value_model="trunk")
    with pytest.raises(ConfigError, match=r"trunk reads the policy's hidden states.* set rl\.value_init to zero"):
        check(["reward", "rl"], [1, 0], value_model="trunk", value_init="reward")


def test_a_fully_tuned_model_beside_shared_roles_is_refused_before_anything_is_trained(tmp_path):
    run, text = object.__new__(Run), {"model": {"source": "x"}, "run": {"stages": ["reward", "rl"]}, "sft": {"tuning": "full"}}
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    run.context = SimpleNamespace(config=run.config, packing=lambda *_: None)
    run.outcomes = SimpleNamespace(check_other_runs=lambda: None)
    checks.order(run)
    run.store.save("reference", 1, {"w": jnp.float32(0)}, {})
    with pytest.raises(ConfigError, match=r"sft was tuned in full; set rl\.roles: separate"):
        checks.order(run)


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"reward": {"use_margin": True}}, r"reward\.use_margin: no pair for training has a `margin`"),
        ({"data": {"packing": True}}, r"data\.packing: the sides of a pair share so little that it takes 90 tokens"),
        ({"reward": {"kind": "labels", "linear_probe": 10}}, r"reward\.linear_probe: of the 10 rows drawn for it, fewer than two"),
        ({"reward": {"kind": "pairs-as-labels", "linear_probe": 10}}, None),
        ({}, None),
    ],
)
def test_rows_that_the_reward_stage_cannot_learn_from_are_refused_before_anything_is_trained(tmp_path, section, said):
    """Pairs without margins, whose prompts differ; of 30 labelled rows one is wrong."""
    run, text = object.__new__(Run), {"model": {"source": "x"}, "run": {"stages": ["sft", "reward"]}}
    lengths = {"max_prompt_length": 20, "max_response_length": 20}
    run.config = configuration.parse(json.dumps(text | section | {"data": lengths | section.get("data", {})}))
    run.folder, run.store = tmp_path, Store(tmp_path / "checkpoints")
    words = np.arange(45)
    rows = {
        "preference": Split([PreferenceExample(words, words + 1)] * 12, []),
        "label": Split([LabelExample(words, float(i > 0)) for i in range(30)], [LabelExample(words, float(i)) for i in (0, 1)]),
    }
    mesh = AbstractMesh((1, 1, 1), ("data", "fsdp", "tensor"))
    decoder = SimpleNamespace(config=SimpleNamespace(vision=None))
    run.context = Context(run.config, decoder, {}, None, (), SimpleNamespace(**rows), mesh)
    if said is None:
        checks.order(run)
    else:
        with pytest.raises(ConfigError, match=said):
            run.execute()
        run.store.save("reward", 1, {"w": jnp.float32(0)}, {})
        checks.order(run)  # a stage that has begun was looked at when it did


@pytest.mark.parametrize(
    ("stages", "section", "base", "said"),
    [
        (["sft", "rl"], {"rl": {"tuning": "full"}}, None, "rl.tuning full would start from an adapter on the vision tower"),
        (["rl"], {"rl": {"tuning": "full"}}, None, None),
        (["rl"], {"rl": {"tuning": "full"}}, "adapter", "rl.tuning full"),
        (["sft", "rl"], {"rl": {"tuning": "full"}, "sft": {"tuning": "full"}}, None, None),
        (["sft", "rl"], {"rl": {"tuning": "full"}, "lora": {"target_modules": "attention"}}, None, None),
        (["sft", "rl"], {"rl": {"tuning": "lora"}}, None, None),
        (["sft", "reward"], {"reward": {"tuning": "full", "start_from": "sft"}}, None, "reward.tuning full"),
        (["sft", "reward"], {"reward": {"tuning": "full"}}, None, None),
        (["sft", "reward", "rl"], {"rl": {"value_tuning": "full", "value_init": "reward"}}, None, "rl.value_tuning full"),
        (["sft", "reward", "rl"], {"rl": {"value_tuning": "full"}}, None, None),
    ],
)
def test_full_tuning_over_an_adapted_tower_is_refused_before_anything_is_trained(tmp_path, stages, section, base, said):
    run, target = object.__new__(Run), {"lora": {"target_modules": r"(vision\.)?attention\..*"}}
    text = {"model": {"source": "x"}, "run": {"stages": stages}} | target | section
    text["rl"] = {"roles": "separate", "rewards": [{"function": "math:sqrt"}], "value_init": "zero"} | section.get("rl", {})
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    decoder = SimpleNamespace(config=SimpleNamespace(vision="seen"))
    run.context = SimpleNamespace(decoder=decoder, base=Role(lora=base), reward_base=Role())
    if said is None:
        checks.towers(run)
    else:
        with pytest.raises(ConfigError, match=said):
            run.execute()
        decoder.config.vision = None  # a model of text has no tower
        checks.towers(run)


@pytest.mark.parametrize(
    ("there", "said"),
    [
        (None, "is not a run folder"),
        ({}, "no finished reward model"),
        ({"reward": {"tuning": "full"}}, "tuned in full"),
        ({"reward": {"start_from": "sft"}, "sft": {"tuning": "full"}}, "tuned in full"),
    ],
)
def test_reward_models_of_other_runs_are_looked_at_before_anything_is_trained(tmp_path, there, said):
    other = tmp_path / "other"
    if there is not None:
        other.mkdir()
        (other / "config.yaml").write_text(
            configuration.dump(configuration.parse(json.dumps({"model": {"source": "x"}, "run": {"stages": []}} | there)))
        )
    if there:
        Store(other / "checkpoints").save("reward_model", 1, {"w": jnp.float32(0)}, {})
    config = configuration.parse(json.dumps({"model": {"source": "x"}, "rl": {"rewards": [{"model": str(other)}]}}))
    outcomes = Outcomes(Store(tmp_path / "checkpoints"), SimpleNamespace(sha256="0"), SimpleNamespace(config=config))
    with pytest.raises(ConfigError, match=said):
        outcomes.check_other_runs()


@pytest.mark.parametrize(
    ("stages", "kept", "start_from", "said"),
    [
        (["rl", "sft"], [], "base", "rl begins from what sft leaves; put sft before it"),
        (["reward", "sft"], [], "sft", "reward begins from what sft leaves"),
        (["reward", "sft", "rl"], [], "base", None),
        (["rl"], ["sft"], "base", "an SFT that has not ended, and rl begins from what it leaves"),
        (["reward"], ["sft"], "base", None),
        (["sft", "rl"], ["rl"], "base", "a stage rl that began without SFT"),
        (["sft", "reward"], ["reward"], "sft", "a stage reward that began without SFT"),
        (["sft", "reward"], ["reward"], "base", None),
        (["sft", "rl"], ["sft", "reference", "rl"], "base", None),
        (["rl"], ["rl"], "base", None),
        (["evaluate"], ["rl", "policy"], "base", None),
    ],
)
def test_no_stage_begins_from_another_reference_than_sft_leaves(tmp_path, stages, kept, start_from, said):
    run = object.__new__(Run)
    text = {"model": {"source": "x"}, "run": {"stages": stages}, "reward": {"start_from": start_from}}
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    for name in kept:
        run.store.save(name, 1, {"w": jnp.float32(0)}, {})
    if said is None:
        checks.reference(run)
    else:
        with pytest.raises(ConfigError, match=said):
            run.execute()


@pytest.mark.parametrize(("tuning", "said"), [("full", "a stage reward that began without SFT"), ("lora", None)])
def test_a_finished_reward_model_keeps_the_parameters_that_it_was_trained_on(tmp_path, tuning, said):
    """A first SFT after it, in full, would leave others under its adapter."""
    run, model = object.__new__(Run), {"source": "x", "adapter": "somewhere"}
    text = {"model": model, "run": {"stages": ["sft"]}, "reward": {"start_from": "sft"}, "sft": {"tuning": tuning}}
    run.config, run.folder, run.store = configuration.parse(json.dumps(text)), tmp_path, Store(tmp_path / "checkpoints")
    for name in ("reward", "reward_model"):
        run.store.save(name, 1, {"w": jnp.float32(0)}, {})
    if said is None:
        checks.reference(run)
    else:
        with pytest.raises(ConfigError, match=said):
            run.execute()


def because(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nlong"),
            2,
            "(?s)out of memory: RESOURCE.*5 bytes.\n.*micro_batch.*max_num_seqs.*may be continued",
        ),
        (MemoryError("numpy"), 2, "out of memory: numpy"),
        (ConfigError("expected this"), 2, "error: expected this"),
        (because(CheckpointError("could not save"), ConnectionResetError("by peer")), 1, "(?s)could not save.*goes on once that can"),
        (
            because(ConfigError("cannot be used"), type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 503})()),
            1,
            "goes on",
        ),
        (
            because(ConfigError("cannot be used"), type("HttpError", (Exception,), {"__module__": "gcsfs.retry", "code": 403})()),
            2,
            "be used\n",
        ),
        (ConnectionResetError("by peer"), 1, "goes on once that can be reached"),
        (because(CheckpointError("could not save"), OSError(28, "No space left on device")), 2, "could not save\n"),
        (Stopped("SIGTERM"), 75, "Stopped by SIGTERM"),
    ],
)
def test_exit_codes(tmp_path, monkeypatch, capsys, error, code, said):
    (tmp_path / "c.yaml").write_text("model: {source: x}")

    def stopped(*_):
        raise error

    monkeypatch.setattr(main, "run", stopped)
    assert main.cli(["--config", str(tmp_path / "c.yaml")]) == code
    assert re.search(said, capsys.readouterr().out)


def test_an_error_that_nobody_foresaw_has_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("model: {source: x}")
    monkeypatch.setattr(main, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main.cli(["--config", str(tmp_path / "c.yaml")])


def test_a_terminal_that_is_not_utf8_shows_what_it_can(tmp_path, monkeypatch):
    (tmp_path / "c.yaml").write_text("model: {source: x}")
    written = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(main.sys, "stdout", written)
    monkeypatch.setattr(main, "run", lambda config, restart, console, command: console.print("\u2713 d\u00e9j\u00e0"))
    assert main.cli(["--config", str(tmp_path / "c.yaml")]) == 0
    written.flush()
    assert written.buffer.getvalue().decode("latin-1") == "? d\u00e9j\u00e0\n"


@pytest.mark.parametrize(
    ("section", "warning"),
    [
        ({}, ""),
        ({"sampling": {"top_k": 5}}, "estimates of the KL are wrong"),
        ({"sampling": {"top_p": 0.9}}, "estimates of the KL are wrong"),
        ({"length_target": 5}, "rl.length_target does nothing without rl.length_penalty"),
        ({"length_target": 5, "length_penalty": 0.1}, ""),
    ],
)
def test_options_of_rl_that_mislead_or_do_nothing_are_warned_of(tmp_path, monkeypatch, section, warning):
    run, said = object.__new__(Run), io.StringIO()
    run.config = configuration.parse(json.dumps({"model": {"source": "x"}, "rl": section}))
    run.folder, run.store, run.progress = tmp_path, Store(tmp_path / "checkpoints"), Progress(Console(file=said, width=500))
    run.context = SimpleNamespace(config=run.config, data=SimpleNamespace(prompts=None))
    run.outcomes = SimpleNamespace(reference=lambda: None, reward_models=dict, reward_model=lambda: None)
    monkeypatch.setattr(run, "_train", lambda *_: None)
    run._rl()
    assert warning in said.getvalue() and bool(warning) == bool(said.getvalue())
