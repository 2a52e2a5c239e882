"""Configuration: strict, typed, and honest about what is wrong."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pe_rlhf_jax import config as c
from pe_rlhf_jax.config.reading import section_type

MODEL = "model:\n  source: local\n"


def problem(text: str, *overrides: str) -> str:
    with pytest.raises(c.ConfigError) as caught:
        c.parse(text, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rl: {kl_coeff: 0.1}", "rl.kl_coeff: no such key; did you mean 'kl_coef'?"),
        ("modle: {}", "modle: no such key; did you mean 'model'?"),
        ("sft: {optimizer: {learning_rat: 1e-4}}", "sft.optimizer.learning_rat: no such key; did you mean 'learning_rate'?"),
        ("data: {sft: {trian: [a.jsonl]}}", "data.sft.trian: no such key; did you mean 'train'?"),
        ("data: {sft: {validation: []}}", "data.sft.train: required, but missing"),
        ("mesh: {zzz: 1}", "mesh.zzz: no such key; expected one of data, fsdp, tensor"),
    ],
)
def test_unknown_and_missing_keys_are_named(text, expected):
    assert f"\n  {expected}" in problem(MODEL + text)


def test_every_problem_is_reported_at_once_with_its_origin():
    message = problem("rl: {kl_coef: -1, bogus_key: 1}")
    assert message.startswith("configuration cannot be used:\n")
    for part in ("model: required, but missing", "rl.kl_coef: ", "found -1", "rl.bogus_key: no such key"):
        assert part in message


@pytest.mark.parametrize(
    "text",
    [
        'rl: {steps: "3"}',
        "rl: {steps: 3.0}",
        "rl: {steps: true}",
        'rl: {whiten_rewards: "true"}',
        "rl: {whiten_rewards: 1}",
        'rl: {kl_coef: "0.1"}',
        "rl: {kl_coef: true}",
        "rl: {kl_coef: .inf}",
        "rl: {missing_eos_penalty: .nan}",
        "rl: {missing_eos_penalty: 1.0}",
        "run: {name: 7}",
        "run: {stages: rl}",
        "run: {stages: [rl, walk]}",
        "rl: {algorithm: sarsa}",
        "rl:",
        "rl: [1]",
    ],
)
def test_nothing_is_converted_silently(text):
    found = problem(MODEL + text)
    where = re.match(r"(\w+):(?: \{(\w+):)?", text)
    assert "\n  " + ".".join(filter(None, where.groups())) in found and "found" in found


def test_floats_may_be_written_as_people_write_them():
    for written, value in [("1e-4", 1e-4), ("1E-4", 1e-4), ("1.e-4", 1e-4), (".5e-3", 5e-4), ("2.5e+0", 2.5), ("1", 1.0), ("3e-4", 3e-4)]:
        found = c.parse(MODEL + f"sft: {{optimizer: {{learning_rate: {written}}}}}").sft.optimizer.learning_rate
        assert found == value and isinstance(found, float)


def test_text_that_looks_like_an_exponent_without_digits_stays_text():
    assert c.parse("model: {source: e-4}").model.source == "e-4"


def test_a_key_given_twice_is_an_error_with_its_line():
    message = problem(MODEL + "rl:\n  steps: 1\n  steps: 2\n")
    assert "'steps' is given twice" in message and "line 5" in message


def test_yaml_merge_keys_work_and_odd_keys_are_explained():
    text = MODEL + "sft:\n  optimizer: &o {learning_rate: 1e-3}\nreward:\n  optimizer:\n    <<: *o\n    b1: 0.8\n"
    optimizer = c.parse(text).reward.optimizer
    assert (optimizer.learning_rate, optimizer.b1) == (1e-3, 0.8)
    assert "not valid YAML" in problem("{[a]: 1}")


def test_an_override_changes_one_of_the_sections_that_an_anchor_makes_alike():
    text = MODEL + "sft: &s\n  optimizer: &o {learning_rate: 1e-3}\n  steps: 5\nrl: {optimizer: *o}\nreward: *s\n"
    found = c.parse(text, ["reward.steps=7", "rl.optimizer.learning_rate=1e-5", "reward.optimizer.learning_rate=1e-6"])
    assert (found.sft.steps, found.reward.steps) == (5, 7)
    assert [section.optimizer.learning_rate for section in (found.sft, found.rl, found.reward)] == [1e-3, 1e-5, 1e-6]


@pytest.mark.parametrize("changes", [{}, {"eps": 1e-8}, {"schedule": "cosine", "b1": 0.8}])
def test_rls_own_learning_rate_stays_where_other_fields_are_set(changes):
    found = c.parse(MODEL, [f"rl.optimizer.{name}={value}" for name, value in changes.items()]).rl.optimizer
    assert found == c.OptimizerConfig(learning_rate=1e-4, **changes)
    assert c.RLConfig(optimizer=changes).optimizer == found and c.SFTConfig(optimizer=changes).optimizer.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("text", "expected"),
    [("- a", "expected sections such as `model:`, found list"), ("a: [", "not valid YAML"), ("", "model: required")],
)
def test_text_that_is_no_configuration(text, expected):
    assert expected in problem(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("reward: {kind: pairs-as-labels, use_margin: true}", "reward.use_margin belongs to reward.kind pairs and would do nothing with"),
        ("reward: {kind: labels, center_rewards_coefficient: 0.1}", "reward.center_rewards_coefficient belongs to reward.kind pairs"),
        ("reward: {adapter: x, start_from: sft}", "reward.adapter and reward.start_from sft both say where the adapter starts"),
        ("data: {group_by_prefix: true}", "data.group_by_prefix would do nothing without data.packing"),
        ("data: {group_by_prefix: true, packing: true, group_by_length: true}", "group_by_length both say which examples make a batch"),
        ("sft: {optimizer: {head_learning_rate: 1e-4}}", "sft.optimizer.head_learning_rate would do nothing: no head is trained there"),
        ("rl: {algorithm: grpo, optimizer: {head_learning_rate: 1e-4}}", "rl.optimizer.head_learning_rate would do nothing"),
        ("reward: {balance_classes: true}", "reward.balance_classes belongs to reward.kind labels and would do nothing with pairs"),
        ("rl: {rewards: [{function: 'a:b'}]}\nevaluate: {judge: 'a:b'}", "evaluate.judge a:b is one of rl.rewards"),
    ],
)
def test_options_that_would_say_nothing_are_refused(text, expected):
    assert expected in problem(MODEL + text)
    c.parse(MODEL + "rl: {algorithm: ppo, optimizer: {head_learning_rate: 1e-4}}")
    c.parse(MODEL + "rl: {rewards: [{model: run}, {function: 'a:b', weight: 0}]}\nevaluate: {judge: 'a:b'}")


def test_overrides_reach_nested_fields_and_new_sections():
    found = c.parse(
        MODEL + "rl: {steps: 5}",
        [
            "rl.steps=7",
            "rl.optimizer.learning_rate=1e-4",
            "data.sft.train=[a.jsonl, b.jsonl]",
            "model.source=package:x==1.2",
            "rl.kl_target=null",
        ],
    )
    assert (found.rl.steps, found.rl.optimizer.learning_rate, found.rl.kl_target) == (7, 1e-4, None)
    assert found.data.sft.train == ["a.jsonl", "b.jsonl"] and found.model.source == "package:x==1.2"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rl.steps", "--set expects a.b=value, found 'rl.steps'"),
        ("=3", "--set expects a.b=value"),
        ("rl.steps.more=3", "steps is a value, not a section"),
        ("rl.steps=[", "the value is not valid YAML"),
        ("rl.step=3", "rl.step: no such key; did you mean 'steps'?"),
        ("rl.steps='3'", "rl.steps: "),
    ],
)
def test_overrides_are_as_strict_as_the_file(override, expected):
    assert expected in problem(MODEL + "rl: {steps: 5}", override)


def test_what_is_dumped_is_read_back_equal():
    rich = c.parse(
        MODEL + "run: {name: a.b-c, seed: 3, stages: [rl]}",
        [
            "rl.optimizer.eps=1e-12",
            "rl.optimizer.max_grad_norm=null",
            "data.prompts.train=[ü.jsonl]",
            "rl.kl_target=6",
            "lora.lora_alpha=16",
        ],
    )
    named = c.parse(MODEL, ["run.name='1e-4'", "run.folder='1E3'", "model.adapter='.5e2'", "data.group_by='yes'"])
    for config in (rich, named, c.parse(MODEL)):
        assert c.parse(c.dump(config)) == config
        assert c.differences(config, c.parse(c.dump(config))) == []


def test_differences_name_each_field_once():
    old = c.parse(MODEL)
    new = c.parse(MODEL, ["rl.sampling.top_k=5", "data.sft.train=[a.jsonl]", "run.name=other"])
    assert c.differences(old, new) == [
        "data.sft.train: (none) -> ['a.jsonl']",
        "data.sft.validation: (none) -> []",
        "rl.sampling.top_k: 0 -> 5",
        "run.name: run -> other",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["sft.micro_batch_size=3"], "sft.micro_batch_size 3 does not divide the update's 16 rows"),
        (["reward.micro_batch_size=5"], "reward.micro_batch_size 5 does not divide"),
        (["rl.num_mini_batches=4", "rl.micro_batch_size=16"], "rl.micro_batch_size 16 does not divide the update's 8 rows"),
        (["rl.num_mini_batches=3"], "num_mini_batches 3 does not divide batch_size 32"),
        (["rl.sampling.temperature=0"], "temperature must be above 0"),
        (["rl.kl_target=6", "rl.kl_coef=0"], "kl_target steers by multiplying kl_coef"),
        (["run.seed=4294967296"], "run.seed: Input should be less than 4294967296"),
        (["data.source=movie-review"], "data.source: Input should be 'movie-reviews' or 'easy-vqa'; found 'movie-review'"),
        (["rl.rewards=[{model: a/f}, {function: 'x:f'}]"], "called alike: f, f; each is logged under its function's or its folder's name"),
        (
            ["run.folder=gc://bucket/runs"],
            "run.folder: gc://bucket/runs is neither a path nor a place that begins with gs://, s3://, az://",
        ),
        (["rl.rewards=[{model: 'ftp://runs/x'}]"], "rl.rewards.0: ftp://runs/x is neither a path"),
        (["mesh.fsdp=-1"], "only one of data, fsdp, tensor may be -1"),
        (["mesh.tensor=0"], "axis sizes must be positive"),
        (["lora.target_modules='(q'"], "nor a regular expression"),
        (["run.name=../up"], "run.name: "),
    ],
)
def test_values_that_do_not_fit_together(overrides, expected):
    assert expected in problem(MODEL, *overrides)


def test_micro_batches_count_the_minibatch_for_ppo_only():
    assert c.parse(MODEL, ["rl.num_mini_batches=4", "rl.micro_batch_size=8"]).rl.micro_batch_size == 8
    assert c.parse(MODEL, ["rl.algorithm=reinforce", "rl.num_mini_batches=4", "rl.micro_batch_size=16"]).rl.micro_batch_size == 16


def test_sections_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        c.parse(MODEL).rl.steps = 3


def test_lora_scale():
    assert c.LoRAConfig(r=16, lora_alpha=32.0).scale == 2
    assert c.LoRAConfig(r=16, lora_alpha=32.0, use_rslora=True).scale == 8


def test_files_are_read_and_unreadable_ones_explained(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(MODEL + "run: {folder: ~/x, name: y}")
    assert c.load(path, ["rl.steps=2"]).rl.steps == 2
    assert c.load(path).run_folder == Path.home() / "x" / "y"
    path.write_bytes(b"\xff\xfe\x00")
    for bad in (path, tmp_path / "missing.yaml"):
        with pytest.raises(c.ConfigError, match=re.escape(f"cannot read the configuration {bad}")):
            c.load(bad)
    with pytest.raises(c.ConfigError, match=r"http://x/c.yaml is neither a path nor a place that begins with gs://"):
        c.load("http://x/c.yaml")


def fields(section: type[c.Section]) -> set[str]:
    inner = {section_type(field.annotation) for field in section.model_fields.values()} - {None}
    return set(section.model_fields).union(*map(fields, inner))


def test_the_reference_page_is_current_and_complete():
    page = subprocess.run([sys.executable, "-m", "pe_rlhf_jax.config"], capture_output=True, text=True, check=True).stdout
    kept = Path(__file__).parents[1] / "configs" / "REFERENCE.md"
    assert kept.read_text(encoding="utf-8") == page, "run `python -m pe_rlhf_jax.config > configs/REFERENCE.md`"
    for name in fields(c.Config):
        assert re.search(rf"`(\w+\.)?{name}`|## {name}", page), f"{name} is not documented"
    for shared in ("OptimizerConfig", "SamplingConfig", "FilesConfig"):
        assert page.count(f"## {shared}\n") == 1 and f"(#{shared.lower()})" in page
    assert page.count("Peak learning rate") == 1


def test_every_kept_configuration_is_valid():
    for path in sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml")):
        assert c.load(path).model.source


def paper_configurations() -> dict[str, c.Config]:
    return {path.stem: c.load(path) for path in sorted((Path(__file__).parents[1] / "configs" / "paper").glob("*.yaml"))}


def test_the_papers_configurations_keep_what_the_paper_states():
    found = paper_configurations()
    #        reward's and policy's learning rate, RL temperature
    stated = {
        "tldr": (1e-4, 1e-5, 0.7),
        "bolt": (1e-4, 1e-5, 0.7),
        "harmless": (2e-4, 1e-5, 0.9),
        "shp": (1e-4, 1e-5, 0.9),
        "taskmaster_coffee": (1e-4, 1e-5, 0.9),
        "taskmaster_tickets": (1e-4, 1e-5, 0.9),
        "vqa": (1e-4, 1e-8, 0.9),
        "ui_automation": (1e-4, 1e-5, 0.9),
    }
    assert {
        name: (config.reward.optimizer.learning_rate, config.rl.optimizer.learning_rate, config.rl.sampling.temperature)
        for name, config in found.items()
    } == stated
    assert found["harmless"].reward.steps == 5000
    assert (found["vqa"].sft.batch_size, found["vqa"].sft.optimizer.learning_rate) == (64, 1e-7)
    for name, config in found.items():
        assert (config.rl.algorithm, config.rl.kl_coef, config.rl.gamma) == ("reinforce", 0.05, 1.0), name
        assert (config.reward.batch_size, config.rl.batch_size) == (128, 32 if name == "vqa" else 128), name
        assert config.lora.target_modules == "attention" and config.lora.r in (1, 4, 8, 16), name
        assert {config.sft.optimizer.name, config.reward.optimizer.name, config.rl.optimizer.name} == {"adafactor"}, name
        assert config.run.stages == list(c.STAGES) and config.run.name == "paper-" + name.replace("_", "-"), name


def test_the_papers_configurations_have_data_for_their_stages():
    from pe_rlhf_jax.data.converters import FORMATS

    for name, config in paper_configurations().items():
        data = config.data
        judged = "label" if name.startswith(("taskmaster", "vqa", "ui")) else "preference"
        assert (config.reward.kind == "labels") == (judged == "label"), name
        assert getattr(data, judged) and data.sft and data.prompts, name
        for kind in ("sft", judged, "prompts"):
            files = getattr(data, kind)
            assert kind in FORMATS[files.format], f"{name}: {files.format} has no rows of data.{kind}"
            assert files.validation or data.group_by or kind == "sft", f"{name}: nothing says what data.{kind} holds out"


def test_the_papers_configurations_say_how_to_run_them_and_what_is_not_measured():
    folder = Path(__file__).parents[1] / "configs" / "paper"
    for path in sorted(folder.glob("*.yaml")):
        header = "\n".join(line for line in path.read_text(encoding="utf-8").split("\nrun:")[0].splitlines())
        assert f"--config configs/paper/{path.name}" in header and "not measured" in header and "Hardware:" in header
