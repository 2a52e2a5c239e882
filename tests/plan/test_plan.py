"""Plans on this machine's device: what is added up, what fits, what is suggested, and what is printed."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from rich.console import Console

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import main
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.plan.chips import CHIPS
from pe_rlhf_jax.plan.command import TRIES
from pe_rlhf_jax.plan.plan import GIB, _notes, plan
from pe_rlhf_jax.plan.suggest import _gathering, candidates, changed, same_results, suggest
from pe_rlhf_jax.plan.table import show
from pe_rlhf_jax.plan.topology import Topology, _memory, describe

CONFIG = """
model: {source: unused, logprob_chunk: 16, dtype: float32}
lora: {r: 2}
mesh: {data: 1, fsdp: 1, tensor: 1}
data: {max_prompt_length: 8, max_response_length: 8, length_multiple: 8}
run: {stages: [reward]}
reward: {batch_size: 32}
rl: {batch_size: 4, sampling: {max_new_tokens: 6}}
"""
SHAPE = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
OFF = "rl.sampling.gather_weights=false"
EIGHT = {"data": 1, "fsdp": 8, "tensor": 1}


@pytest.fixture
def on_a_chip(tiny, quick_compile):
    """on_a_chip(hbm in bytes, "a.b=c", ...) -> configuration, architecture, topology."""

    def of(hbm: float, *overrides: str) -> tuple[Config, object, Topology]:
        chip = dataclasses.replace(CHIPS["v5e"], usable=hbm / GIB)
        return configuration.parse(CONFIG, overrides), tiny.config, Topology("one", jax.devices()[:1], chip, chip.usable)

    return of


def test_what_it_takes_is_what_the_stage_keeps_and_what_its_fullest_program_adds(on_a_chip):
    found = plan(*on_a_chip(GIB, "run.stages=[sft, rl]", "rl.value_init=zero", "rl.roles=shared"))
    assert [stage.stage for stage in found.stages] == ["sft", "rl"]
    rl = found.stages[1]
    assert [timed.program.name for timed in rl.programs] == ["rollout", "score", "experience", "update"]
    kept = sum(rl.resident.values())
    for timed in rl.programs:
        program = timed.program
        assert program.peak == program.arguments + program.temporaries + program.outputs - program.reused
        assert program.staying <= kept and timed.hbm == program.peak + kept - program.staying
        # A CPU pads nothing; what jit drops is not read: the score head in policies' programs, and for experience, which in float32 has the
        # sampler's log-probabilities, the policy.
        read = sum(program.parts.values()) - (program.parts["policy"] if program.name == "experience" else 0)
        assert 0.9 * read <= program.arguments <= read
    rollout = rl.programs[0]
    assert rollout.hbm - rollout.program.peak > rl.resident["training state"] / 2  # Adam's moments wait meanwhile
    assert found.hbm == max(timed.hbm for stage in found.stages for timed in stage.programs)
    assert rl.fullest.hbm == rl.hbm


def test_an_evaluation_of_the_policy_is_planned_too(on_a_chip):
    """With what RL left: no optimizer, but the value model."""
    stages = ["run.stages=[rl, evaluate]", "rl.value_init=zero", "rl.rewards=[{function: 'math:sqrt'}]"]
    found = plan(*on_a_chip(GIB, *stages, "evaluate.batch_size=8"))
    rl, evaluation = found.stages
    assert evaluation.stage == "evaluate"
    assert [(timed.program.name, timed.program.repeats) for timed in evaluation.programs] == [("rollout", 2), ("log-ratio", 1)]
    assert evaluation.resident["backbone"] == rl.resident["backbone"]
    # Adam has two moments; and there is a counter or two.
    assert rl.resident["training state"] == pytest.approx(3 * evaluation.resident["policy and value model"], rel=0.01)
    rollouts = [stage.programs[0].program.temporaries for stage in found.stages]
    assert 1.3 < rollouts[1] / rollouts[0] < 2.1  # of twice as many rows
    costs = [stage.programs[0].flops for stage in found.stages]
    assert costs[1] == 2 * costs[0]
    with pytest.raises(ConfigError, match="nothing to plan"):
        plan(*on_a_chip(GIB, "run.stages=[reward, evaluate]"), only=["evaluate"])


def test_an_evaluation_that_does_not_fit_is_given_fewer_prompts_at_once(on_a_chip):
    stages = ["run.stages=[rl, evaluate]", "rl.value_init=zero", "rl.rewards=[{function: 'math:sqrt'}]"]
    half = plan(*on_a_chip(GIB, *stages, "evaluate.batch_size=64"))
    assert half.stages[1].hbm > 2 * half.stages[0].hbm
    config, shape, topology = on_a_chip(half.hbm + 1, *stages, "evaluate.batch_size=128")
    (found,) = suggest(config, shape, topology, plan(config, shape, topology), limit=1)
    assert found.overrides == ("evaluate.batch_size=64",) and found.same_results  # and nothing of RL, which fits
    assert same_results(configuration.parse(CONFIG, ["lora.lora_dropout=0.1"]), found.overrides)


def test_a_backbone_that_full_tuning_does_not_read_stays_in_memory_all_the_same(on_a_chip):
    """The trained copy is read; the frozen one, which RL will want as its reference, is dropped from the program, not from the chip."""
    found = plan(*on_a_chip(GIB, "reward.tuning=full", "rl.roles=separate"))
    (stage,) = found.stages
    (update,) = stage.programs
    assert update.program.arguments < sum(update.program.parts.values()) - 0.9 * stage.resident["frozen"]
    assert update.hbm - update.program.peak == pytest.approx(stage.resident["frozen"], abs=64)  # and a counter or two


def test_fits_is_a_matter_of_the_chip(on_a_chip):
    need = plan(*on_a_chip(GIB)).hbm
    assert plan(*on_a_chip(need + 1)).fits is True
    assert plan(*on_a_chip(need - 1)).fits is False


def test_a_smaller_micro_batch_is_found_where_the_whole_one_does_not_fit(on_a_chip):
    small = plan(*on_a_chip(GIB, "reward.micro_batch_size=16")).hbm
    assert small < 0.8 * plan(*on_a_chip(GIB)).hbm
    config, shape, topology = on_a_chip(small + 1)
    first = plan(config, shape, topology)
    assert first.fits is False
    (found,) = suggest(config, shape, topology, first, limit=1)
    assert found.overrides == ("reward.micro_batch_size=16",) and found.same_results
    assert found.plan.hbm == small
    assert suggest(*on_a_chip(1), plan(*on_a_chip(1)), limit=3) == []


def test_candidates_divide_heads_and_batches(tiny):
    config = configuration.parse(CONFIG, ["mesh.fsdp=8", "reward.tuning=full", "rl.roles=separate", "model.remat=none"])
    tried = list(candidates(config, tiny.config, EIGHT, fits=False))
    meshes = {one for one in tried if all(override.startswith("mesh.") for override in one)}
    assert ("mesh.data=1", "mesh.fsdp=4", "mesh.tensor=2") in meshes
    assert not [one for one in meshes if "mesh.tensor=4" in one]  # 2 key-value heads
    assert [one for one in tried if "reward.tuning=lora" in one] and [one for one in tried if "model.remat=full" in one]
    for one in tried:
        assert changed(config, one) != config


def test_a_stage_that_cannot_be_halved_leaves_the_others_their_halves(tiny):
    text = "{model: {source: x, remat: full}, sft: {batch_size: 8}, reward: {batch_size: 8}, rl: {batch_size: 64, num_mini_batches: 4}}"
    config = configuration.parse(text, ["mesh.fsdp=8"])
    tried = list(candidates(config, tiny.config, EIGHT, fits=False, only=["sft", "reward", "rl"]))
    assert tried[0] == ("reward.micro_batch_size=4", "rl.micro_batch_size=8")  # pairs are two rows; 4 of 8 rows are no multiple of 8
    packed = configuration.parse(text, ["mesh.fsdp=8", "data.packing=true"])
    assert next(candidates(packed, tiny.config, EIGHT, fits=False, only=["sft", "reward", "rl"])) == ("rl.micro_batch_size=8",)
    for one in tried:
        changed(configuration.parse(text, ["mesh.fsdp=8", "run.name='1e-4'"]), one)


def test_few_bits_are_tried_after_what_changes_no_result_and_where_nothing_is_tuned_in_full(tiny):
    text = CONFIG.replace("stages: [reward]", "stages: [reward, rl]")
    copies = {"data": 4, "fsdp": 2, "tensor": 1}

    def tried(*overrides: str, **named) -> list[tuple[str, ...]]:
        found = list(candidates(configuration.parse(text, ["rl.batch_size=32", *overrides]), tiny.config, copies, fits=False, **named))
        assert len(set(found)) == len(found)
        return found

    def first(found: list[tuple[str, ...]], override: str) -> int:
        return next(index for index, one in enumerate(found) if override in one)

    found = tried("rl.roles=separate", "model.remat=dots")
    dropping = configuration.parse(text, ["lora.lora_dropout=0.1"])
    assert {one for one in found if same_results(dropping, one)} <= {("model.remat=full",)}  # else it is drawn for other rows
    exact = [same_results(configuration.parse(text), one) for one in found]
    assert exact == sorted(exact, reverse=True) and not all(exact)
    kinds = [first(found, override) for override in ("rl.roles=shared", "model.quantization=int8", "model.quantization=nf4")]
    assert exact.index(False) == kinds[0] < kinds[1] < kinds[2]
    assert all("mesh.data=1" in one for one in found[kinds[0] :])  # where most of what stays is shared out
    found = tried()
    assert first(found, "model.quantization=nf4") < TRIES
    assert first(tried("rl.roles=separate", "model.remat=dots"), "model.quantization=nf4") < TRIES
    of_rl = tried("sft.micro_batch_size=8", only=["rl"])
    assert not any(override.startswith(("sft.", "reward.")) for one in of_rl for override in one)  # which are not compiled
    # No row fewer makes room where what stays in memory is too much: not on this mesh, and not on others with as many copies.
    crowded = tried(crowded=True)
    assert crowded[0] == ("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1") and set(crowded) < set(found)
    assert all("mesh.data=1" in one or "mesh.data=2" in one for one in crowded)
    full = tried("rl.tuning=full", "rl.roles=separate", "reward.tuning=full")
    assert all({"rl.tuning=lora", "reward.tuning=lora"} <= set(one) for one in full if any("quantization" in override for override in one))
    assert not [one for one in full if "rl.value_tuning=lora" in one]  # which goes with the policy's, unless it is set
    assert tried("rl.value_tuning=full", "rl.roles=separate")[-1][3:6] == (
        "rl.value_tuning=lora",
        "rl.roles=shared",
        "model.quantization=nf4",
    )
    assert not any("quantization" in override for one in tried("model.quantization=int4") for override in one)


@pytest.mark.parametrize(("roles", "few_bits"), [("separate", True), ("shared", False)])
def test_nothing_is_suggested_that_another_runs_reward_model_may_not_stand_on(tiny, roles, few_bits):
    """It shares roles with this run's backbone alone, in the same few bits; apart, each may have its own."""

    def tried(name: str) -> set[str]:
        named = [f"rl.roles={roles}", "run.stages=[reward, rl]", f"rl.rewards=[{{function: 'math:sqrt'}}, {{model: {name}}}]"]
        found = candidates(configuration.parse(CONFIG, named), tiny.config, {"data": 1, "fsdp": 1, "tensor": 1}, fits=False)
        return {override for one in found for override in one}

    shares, bits = {"rl.roles=shared"} if roles == "separate" else set(), {"model.quantization=int8", "model.quantization=nf4"}
    assert tried("run") >= shares | bits
    assert tried("runs/another") == tried("run") - shares - (set() if few_bits else bits)


def test_few_bits_are_found_where_the_backbone_is_what_takes_the_room(on_a_chip):
    wide = dataclasses.replace(on_a_chip(1)[1], intermediate_size=2048)
    config, _, topology = on_a_chip(GIB, "model.quantization=int8", "reward.batch_size=1")
    room = plan(config, wide, topology).hbm + 1
    config, _, topology = on_a_chip(room, "reward.batch_size=1")
    first = plan(config, wide, topology)
    told: list[str] = []
    found = suggest(config, wide, topology, first, 1, told.append)
    assert [one.overrides for one in found] == [("model.quantization=int8",)] and not found[0].same_results
    assert first.hbm > room == found[0].plan.hbm + 1
    assert told == ["loading: quantize, with model.quantization=int8", "reward: update, with model.quantization=int8"]


@pytest.mark.parametrize("how", ["int8", "nf4"])
def test_matrices_are_in_floating_point_until_they_are_in_few_bits(on_a_chip, how):
    """All layers of the largest kind, beside its own few bits and all of the rest."""
    sets = "reward.batch_size=2", "lora.target_modules=attention"
    config, shape, topology = on_a_chip(GIB, f"model.quantization={how}", *sets)
    shape = dataclasses.replace(shape, intermediate_size=2048, num_layers=100)
    found = plan(config, shape, topology)
    loading, reward = found.stages
    (timed,) = loading.programs
    matrices = shape.num_layers * shape.hidden_size * 2048
    few = matrices if how == "int8" else matrices // 2
    assert loading.stage == "loading" and timed.program.arguments == 4 * matrices
    assert few < timed.program.outputs < 1.3 * few  # with scales
    rest = loading.resident["rest of the backbone"]
    assert rest == pytest.approx(reward.resident["frozen"] - timed.program.outputs, abs=64)  # which are a pair, with its pointers
    assert timed.hbm == timed.program.peak + rest > 4 * matrices + reward.resident["frozen"]
    assert found.hbm == loading.hbm > reward.hbm and (timed.flops, timed.time.most) == (0, 0)
    assert any(note.startswith("loading comes before all stages: ") for note in found.notes)
    refused = dataclasses.replace(found, usable=(loading.hbm - 1) / GIB)
    told: list[str] = []
    assert refused.fits is False
    keeping = changed(config, ("model.remat=none",))
    assert suggest(keeping, shape, topology, refused, TRIES, told.append) == [] and told == []  # recomputation would not help


def test_where_it_fits_fewer_and_larger_micro_batches_and_other_meshes_are_tried(tiny):
    def tried(*overrides: str) -> list[tuple[str, ...]]:
        return list(candidates(configuration.parse(CONFIG, ["run.stages=[reward, rl]", *overrides]), tiny.config, EIGHT, fits=True))

    none, both = tried("rl.batch_size=64"), tried("rl.batch_size=64", "reward.micro_batch_size=8", "rl.micro_batch_size=32")
    assert none and all(override.startswith("mesh.") for one in none for override in one)
    assert ("mesh.data=1", "mesh.fsdp=8", "mesh.tensor=1") not in none  # its own
    assert both == [
        ("reward.micro_batch_size=null", "rl.micro_batch_size=null"),
        ("reward.micro_batch_size=16", "rl.micro_batch_size=null"),
        *none,
    ]
    assert tried("reward.micro_batch_size=32", "rl.batch_size=64") == none  # all rows already
    assert tried("reward.micro_batch_size=16", "rl.batch_size=64")[1:] == none  # twice is all


@pytest.mark.parametrize(
    ("gathers", "fsdp", "rollout", "update", "expected"),
    [
        (False, 8, 4, 6, [("rl.sampling.gather_weights=true",), ("a=1",), ("b=2",)]),
        (False, 1, 4, 6, [("a=1",), ("b=2",)]),
        (True, 8, 4, 6, [("a=1",), ("b=2",)]),
        # What does not fit is an update: rollouts stay fast.
        (True, 8, 4, 9, [("a=1",), ("b=2",)]),
        (False, 8, 9, 4, [("a=1",), ("b=2",)]),
        (True, 8, 9, 4, [(OFF,), ("a=1", OFF), ("b=2", OFF)]),
        # Nothing to gather here, but on the meshes that are tried.
        (True, 1, 9, 9, [("a=1", OFF), ("b=2", OFF)]),
    ],
)
def test_weights_are_gathered_at_once_where_there_is_room(gathers, fsdp, rollout, update, expected):
    """Sizes in GiB, of 8."""
    config = configuration.parse(CONFIG, [f"rl.sampling.gather_weights={gathers}".lower()])
    sizes = {"rollout": rollout, "update": update}
    timed = [SimpleNamespace(program=SimpleNamespace(name=name, refused=""), hbm=size) for name, size in sizes.items()]
    first = SimpleNamespace(mesh={"fsdp": fsdp}, stages=[SimpleNamespace(programs=timed)], fits=max(rollout, update) <= 8)
    assert list(_gathering(config, first, 8, iter([("a=1",), ("b=2",)]))) == expected


@pytest.mark.parametrize(
    ("nvidia", "asked", "joins"), [(True, "null", True), (False, "null", False), (True, "false", False), (False, "true", True)]
)
def test_weights_stay_apart_where_joined_ones_do_not_fit(monkeypatch, nvidia, asked, joins):
    monkeypatch.setattr("pe_rlhf_jax.rollout.decode.is_nvidia", lambda: nvidia)
    config = configuration.parse(CONFIG, [f"rl.sampling.join_weights={asked}"])
    timed = [SimpleNamespace(program=SimpleNamespace(name="rollout", refused=""), hbm=9)]
    first = SimpleNamespace(mesh={"fsdp": 1}, stages=[SimpleNamespace(programs=timed)], fits=False)
    apart = "rl.sampling.join_weights=false"
    expected = [(apart,), ("a=1", apart)] if joins else [("a=1",)]
    assert list(_gathering(config, first, 8, iter([("a=1",)]))) == expected
    assert same_results(config, (apart,))


def test_nothing_of_the_model_is_allocated(on_a_chip):
    before = jax.live_arrays()
    known = {id(array) for array in before}
    new: list[tuple[int, ...]] = []

    def look(_: str) -> None:
        new.extend(array.shape for array in jax.live_arrays() if id(array) not in known)

    plan(*on_a_chip(GIB, "run.stages=[reward, rl]", "rl.num_mini_batches=2"), look, ["rl"])
    look("after")
    assert [shape for shape in new if shape] == []  # but for constants of the programs


def test_heads_that_the_mesh_does_not_divide_are_named(tiny):
    config = configuration.parse(CONFIG)
    notes = _notes(config, dataclasses.replace(tiny.config, num_kv_heads=1, vocab_size=32), {"data": 1, "fsdp": 1, "tensor": 4})
    assert notes == ["1 key-value heads do not divide over mesh.tensor 4: every chip of the axis has all of them. 1 would"]
    notes = _notes(
        config, dataclasses.replace(tiny.config, num_heads=6, num_kv_heads=3, vocab_size=32), {"data": 1, "fsdp": 1, "tensor": 4}
    )
    assert [note.rpartition(". ")[2] for note in notes] == ["1, 2, 3 would", "1, 3 would"]


@pytest.mark.parametrize(("roles", "own"), [("shared", ""), ("separate", ", each with a backbone of its own that is not quantized")])
def test_what_is_taken_of_other_runs_reward_models_is_said(tiny, roles, own):
    config = configuration.parse(CONFIG, ["run.stages=[rl]", "rl.rewards=[{model: runs/another}]", f"rl.roles={roles}"])
    notes = _notes(config, tiny.config, {"data": 1, "fsdp": 1, "tensor": 1})
    assert notes == [f"reward models of other runs are taken to be as large as this run's{own}"]


def test_a_program_that_the_compiler_refuses_does_not_fit(on_a_chip, tiny):
    found = plan(*on_a_chip(GIB))
    timed = found.stages[0].programs[0]
    refused = dataclasses.replace(timed, program=dataclasses.replace(timed.program, refused="RESOURCE_EXHAUSTED: too much"))
    broken = dataclasses.replace(found, stages=(dataclasses.replace(found.stages[0], programs=(refused,)),))
    assert found.fits is True and broken.fits is False
    console = Console(file=io.StringIO(), width=120)
    show(broken, console)
    assert "RESOURCE_EXHAUSTED: too much" in console.file.getvalue() and "does not fit" in console.file.getvalue()


@pytest.fixture
def on_a_chip_by_command(tmp_path: Path, capsys, monkeypatch, quick_compile):
    """on_a_chip_by_command(hbm in bytes, argument, ...) -> exit code, stdout, stderr of `plan` for a chip of so much memory."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))

    def run(hbm: float, *arguments: str) -> tuple[int, str, str]:
        chip = dataclasses.replace(CHIPS["v5e"], usable=hbm / GIB)
        monkeypatch.setattr("pe_rlhf_jax.plan.command.describe", lambda name: Topology(name, jax.devices()[:1], chip, chip.usable))
        files = ["--config", str(tmp_path / "c.yaml"), "--model-config", str(tmp_path / "config.json")]
        code = main.cli(["plan", *files, "--topology", "v5e:1x1", *arguments])
        return code, *capsys.readouterr()

    return run


def test_what_makes_it_fit_is_printed_unasked(on_a_chip_by_command, monkeypatch):
    code, shown, _ = on_a_chip_by_command(GIB, "--json", "--set", "reward.micro_batch_size=16")
    small = json.loads(shown)
    assert code == 0 and "suggestions" not in small
    monkeypatch.setattr("pe_rlhf_jax.plan.command.TRIES", 1)
    code, shown, told = on_a_chip_by_command(small["hbm"] + 1)
    assert code == 1 and "does not fit: " in shown
    assert [line for line in shown.splitlines() if ": fits in " in line] == [
        f"v5e:1x1: fits in 0.00 GiB, at most {small['seconds']:.3g} s a step of each stage: --set reward.micro_batch_size=16"
    ]
    assert told.splitlines() == ["compiling reward: update", "compiling reward: update, with reward.micro_batch_size=16"]
    code, shown, told = on_a_chip_by_command(1)
    assert code == 1 and "nothing that was tried fits: take more chips, or chips with more memory" in shown
    # What stays is too much for any micro-batch.
    few = "with model.quantization=int8 reward.micro_batch_size=16"
    assert told.splitlines()[1:] == [f"compiling loading: quantize, {few}", f"compiling reward: update, {few}"]
    code, shown, told = on_a_chip_by_command(1, "--no-suggest")
    assert code == 1 and "fits:" not in shown and told.splitlines() == ["compiling reward: update"]


def test_ctrl_c_among_the_tries_leaves_what_was_found(on_a_chip, monkeypatch):
    need = plan(*on_a_chip(GIB, "reward.micro_batch_size=16")).hbm
    config, shape, topology = on_a_chip(need + 1)
    first, plans = plan(config, shape, topology), [plan(*on_a_chip(need + 1, "reward.micro_batch_size=16"))]

    def interrupted(*_):
        if plans:
            return plans.pop()
        raise KeyboardInterrupt

    monkeypatch.setattr("pe_rlhf_jax.plan.suggest.plan", interrupted)
    assert [one.overrides for one in suggest(config, shape, topology, first, limit=5)] == [("reward.micro_batch_size=16",)]


def test_what_may_be_faster_is_printed_where_it_is_asked_for(on_a_chip_by_command):
    arguments = ["--suggest", "--set", "reward.micro_batch_size=16"]
    code, shown, _ = on_a_chip_by_command(GIB, *arguments, "--json")
    result = json.loads(shown)
    (one,) = result["suggestions"]
    assert code == 0 and one["set"] == ["reward.micro_batch_size=null"] and one["same_results"] is True
    assert one["hbm"] > result["hbm"] and one["seconds"] == pytest.approx(result["seconds"])  # one device sends nothing
    code, shown, told = on_a_chip_by_command(GIB, *arguments)
    assert code == 0 and f"as it is: 0.00 GiB, at most {result['seconds']:.3g} s a step of each stage" in shown
    assert [line.partition("stage: ")[2] for line in shown.splitlines() if ": fits in " in line] == ["--set reward.micro_batch_size=null"]
    assert told.splitlines()[1:] == ["compiling reward: update, with reward.micro_batch_size=null"]
    code, shown, _ = on_a_chip_by_command(GIB, "--suggest")
    assert code == 0 and "nothing else that was tried fits" in shown


@pytest.mark.usefixtures("quick_compile")
def test_the_command_prints_a_table_and_json(tmp_path: Path, capsys):
    (tmp_path / "c.yaml").write_text(CONFIG.replace("source: unused", "source: 'hf:nobody/nothing'"))
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    arguments = ["plan", "--config", str(tmp_path / "c.yaml"), "--model-config", str(tmp_path / "config.json")]
    assert main.cli(arguments) == 0
    assert "reward" in capsys.readouterr().out
    assert main.cli([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (program,) = found["stages"][0]["programs"]
    assert found["topology"] == "local" and found["fits"] is True and found["hbm"] == program["hbm"] > 0
    assert program["program"]["name"] == "update" and program["flops"] > 0


def test_a_topology_that_is_none_and_a_model_that_is_not_there_are_explained(tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    arguments = ["plan", "--config", str(tmp_path / "c.yaml"), "--model-config"]
    for name in ("v5e", "v9:4x4", "v5e:4by4"):
        assert main.cli([*arguments, str(tmp_path / "config.json"), "--topology", name]) == 2
        assert "expected GENERATION:SHAPE such as v5e:4x4" in " ".join(capsys.readouterr().out.split())
    with monkeypatch.context() as patch:
        patch.setattr("pe_rlhf_jax.plan.topology._memory", lambda _: None)
        assert main.cli([*arguments, str(tmp_path / "config.json"), "--suggest"]) == 2
    assert "--suggest: how much memory the devices of `local` have is not known" in " ".join(capsys.readouterr().out.split())
    assert main.cli([*arguments, str(tmp_path / "missing.json")]) == 2
    assert "expected Hugging Face's config.json" in " ".join(capsys.readouterr().out.split())
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"model_type": "mamba"}))
    assert main.cli([*arguments, str(tmp_path / "config.json")]) == 2
    assert "model_type 'mamba' is not supported" in " ".join(capsys.readouterr().out.split())


@pytest.mark.usefixtures("quick_compile")
def test_this_machine_has_a_verdict_and_changes_that_fit_too(tmp_path: Path, capsys, monkeypatch):
    """Without a time, since no rates of its devices are published."""
    (tmp_path / "c.yaml").write_text(CONFIG)
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    files = ["--config", str(tmp_path / "c.yaml"), "--model-config", str(tmp_path / "config.json")]
    assert main.cli(["plan", *files, "--json", "--set", "reward.micro_batch_size=16"]) == 0
    need = json.loads(capsys.readouterr().out)["hbm"] + 1
    monkeypatch.setattr("pe_rlhf_jax.plan.topology._memory", lambda _: need / GIB)
    assert main.cli(["plan", *files]) == 1
    shown = capsys.readouterr().out
    assert "does not fit: 0.00 of 0.00 GiB (local: what programs may take of each device)" in shown
    assert "local: fits in 0.00 GiB: --set reward.micro_batch_size=16" in shown
    monkeypatch.setattr("pe_rlhf_jax.plan.topology._memory", lambda _: None)
    assert main.cli(["plan", *files]) == 0
    assert "fit" not in capsys.readouterr().out


def test_a_device_has_what_its_allocator_may_take_or_its_part_of_the_memory_that_there_is(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": 3 * GIB})
    silent = SimpleNamespace(platform="METAL", memory_stats=lambda: None)
    cpu = SimpleNamespace(platform="cpu")
    assert (_memory([gpu, gpu]), _memory([silent])) == (3, None)
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 8 * GIB // 4096}
    monkeypatch.setattr("os.sysconf", pages.__getitem__)
    files = {"/sys/fs/cgroup/memory.max": "max\n"}

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    assert (_memory([cpu]), _memory([cpu] * 4)) == (8, 2)
    files["/sys/fs/cgroup/memory.max"] = f"{2 * GIB}\n"  # a container's
    assert (_memory([cpu]), _memory([cpu] * 4)) == (2, 0.5)


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_compiled(tiny, monkeypatch):
    config = configuration.parse(CONFIG, ["reward.batch_size=6"])
    monkeypatch.setattr("pe_rlhf_jax.plan.programs.make_mesh", lambda *_: jax.sharding.AbstractMesh((4, 1, 1), ("data", "fsdp", "tensor")))
    with pytest.raises(ConfigError, match=r"reward.batch_size 6 must be a multiple of 4.*: 8 is one"):
        plan(config, tiny.config, Topology("four", jax.devices()[:1], None, None))
    config = configuration.parse(CONFIG, ["run.stages=[rl]", "rl.sampling.max_num_seqs=6"])
    with pytest.raises(ConfigError, match=r"rl.sampling.max_num_seqs 6 must be a multiple of 4.*: 8 is one"):
        plan(config, tiny.config, Topology("four", jax.devices()[:1], None, None))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("v5e:2x2", {}),
        ("v5e:1x1", {"chips_per_host_bounds": (1, 1, 1)}),
        ("v4:1x1x1", {"chip_config_name": "megacore", "chips_per_host_bounds": (1, 1, 1)}),
    ],
)
def test_a_host_of_one_chip_is_told_to_the_compiler(monkeypatch, name, options):
    """It takes a host to have 2 x 2 chips, and refuses slices that these do not divide."""
    asked = {}

    def described(**named):
        asked.update(named)
        return SimpleNamespace(devices=[])

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", described)
    for variable in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(variable, "set before")
    assert describe(name).name == name
    assert asked == {"platform": "tpu", "topology_name": name, **options}


def test_without_the_tpu_compiler_the_extra_is_named(monkeypatch):
    def none(**_):
        raise RuntimeError("JAX TPU support not installed; cannot generate TPU topology.")

    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", none)
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD", "TPU_WORKER_HOSTNAMES", "TPU_ACCELERATOR_TYPE"):
        monkeypatch.setenv(name, "set before")
    with pytest.raises(ConfigError, match=r"needs the TPU compiler; pip install 'pe_rlhf_jax\[tpu-plan\]'"):
        describe("v5e:2x2")
