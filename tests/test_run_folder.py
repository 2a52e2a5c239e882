"""A run folder belongs to one process and one configuration."""

import fcntl
import json
import os

import pytest

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import run_folder
from pe_rlhf_jax.config import ConfigError


@pytest.fixture
def config(tmp_path):
    return configuration.parse(f"{{model: {{source: x}}, run: {{folder: {tmp_path}, name: one}}}}")


def test_a_folder_is_made_continued_and_remembers_its_configuration(config):
    for _ in range(2):
        with run_folder.opened(config, restart=False) as folder:
            assert run_folder.read_config(folder) == config
    run_folder.write_summary(folder, {"name": "one", "sft": {"loss": float("nan"), "ci": [0.5, float("inf")]}})
    assert json.loads((folder / "summary.json").read_text()) == {"name": "one", "sft": {"loss": None, "ci": [0.5, None]}}
    assert sorted(os.listdir(folder)) == [".lock", "config.yaml", "summary.json"]


def test_only_what_changes_no_result_may_differ(config):
    def changed(section, **fields):
        return config.model_copy(update={section: getattr(config, section).model_copy(update=fields)})

    with run_folder.opened(changed("run", seed=1), restart=False) as folder:
        pass
    with run_folder.opened(config, restart=False):  # nothing has been trained with the other
        for stage in ("sft", "rl"):
            (folder / "checkpoints" / stage).mkdir(parents=True)
    with run_folder.opened(changed("run", stages=["export"], tensorboard=False), restart=False):
        pass
    may = [("mesh", {"fsdp": 8}), ("export", {"merged": True}), ("evaluate", {"judge": "a:b"}), ("rl", {"micro_batch_size": 1})]
    may += [("rl", {"sampling": config.rl.sampling.model_copy(update={"max_num_seqs": 4, "gather_weights": True})})]
    may += [("run", {"checkpoint_every": 3, "max_nonfinite": 2}), ("model", {"remat": "full", "any_backbone": True})]
    for section, fields in [*may, ("reward", {"steps": 3})]:  # the reward model's training has not begun
        with run_folder.opened(changed(section, **fields), restart=False) as folder:
            assert run_folder.read_config(folder) == changed(section, **fields)
    with run_folder.opened(config, restart=False):
        pass
    for section, fields in [("run", {"seed": 1}), ("rl", {"kl_coef": 0.5}), ("sft", {"steps": 3})]:
        [(name, value)] = fields.items()
        with (
            pytest.raises(ConfigError, match=rf"{section}\.{name}: .* -> {value}\n.*--restart"),
            run_folder.opened(changed(section, **fields), restart=False),
        ):
            pass
    assert run_folder.read_config(folder).rl == config.rl  # a refused one is not written
    os.rename(folder, elsewhere := folder.parent / "two")
    with run_folder.opened(changed("run", folder=f"{folder.parent}/.", name="two"), restart=False) as folder:
        assert folder.samefile(elsewhere)


def test_the_data_of_a_stage_that_has_not_begun_may_still_be_named(config):
    def given(*overrides):
        return configuration.parse(configuration.dump(config), ["data.sft.train=[a]", *overrides])

    with run_folder.opened(given(), restart=False) as folder:
        (folder / "checkpoints" / "sft").mkdir(parents=True)
    for overrides in (["data.preference.train=[b]", "data.prompts.train=[c]"], ["data.preference.train=[d]"], ["reward.kind=labels"]):
        with run_folder.opened(given(*overrides), restart=False):
            pass
    (folder / "checkpoints" / "reward").mkdir()
    with run_folder.opened(given("reward.kind=labels", "data.preference.train=[b]"), restart=False):  # pairs are nobody's
        pass
    for changed in (["data.label.train=[e]"], ["data.sft.train=[e]"], ["data.too_long=error"]):
        with (
            pytest.raises(ConfigError, match=changed[0].partition("=")[0]),
            run_folder.opened(given("reward.kind=labels", *changed), restart=False),
        ):
            pass


@pytest.mark.parametrize("restart", [False, True])
def test_a_second_process_is_refused_and_moves_nothing(config, restart):
    with run_folder.opened(config, restart=False) as folder:
        with pytest.raises(ConfigError, match="another process is running there"), run_folder.opened(config, restart):
            pass
        assert os.listdir(folder.parent) == ["one"]
    with run_folder.opened(config, restart):
        pass


def test_restart_moves_the_old_folder_aside_and_keeps_it_locked(config):
    for number in range(3):
        with run_folder.opened(config, restart=True) as folder:
            (folder / "mark").write_text(str(number))
            if number:
                with open(folder.with_name(f"one.old-{number}") / ".lock") as old, pytest.raises(BlockingIOError):
                    fcntl.flock(old, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert sorted(os.listdir(folder.parent)) == ["one", "one.old-1", "one.old-2"]
    assert [(folder.with_name(name) / "mark").read_text() for name in ("one.old-1", "one.old-2", "one")] == ["0", "1", "2"]


def test_a_folder_that_is_moved_between_opening_and_locking_is_not_worked_in(config, monkeypatch):
    with run_folder.opened(config, restart=False) as folder:
        pass
    lock = fcntl.flock

    def late(file, flags):
        folder.rename(folder.with_name("moved"))
        folder.mkdir()
        lock(file, flags)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with pytest.raises(ConfigError, match="another process is running there"), run_folder.opened(config, restart=False):
        pass


def test_a_folder_that_cannot_be_made_or_written_is_said(config, monkeypatch):
    config.run_folder.write_text("a file in the way")
    with pytest.raises(ConfigError, match=r"one cannot be used as a run folder .*File exists.*run\.folder"):
        run_folder.opened(config, restart=False).__enter__()
    config.run_folder.unlink()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder, "write_atomically", full)
    with pytest.raises(ConfigError, match=r"cannot be used as a run folder .*No space left"), run_folder.opened(config, restart=False):
        pass


def test_an_error_of_the_run_itself_is_not_taken_for_one_of_the_folder(config):
    with pytest.raises(OSError, match="its own"), run_folder.opened(config, restart=False):
        raise OSError("its own")
