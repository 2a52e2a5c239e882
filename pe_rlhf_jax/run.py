"""One run: the stages composed over a loaded context and a run folder's state."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import jax

from pe_rlhf_jax import checks, hosts, run_folder
from pe_rlhf_jax.checkpoint import card, export, merged
from pe_rlhf_jax.checkpoint.peft_layout import WHOLE
from pe_rlhf_jax.checkpoint.store import Store
from pe_rlhf_jax.config import Config
from pe_rlhf_jax.loading import load, needed, rows_of
from pe_rlhf_jax.models.quantization import count
from pe_rlhf_jax.outcomes import ROLE_OF, Outcomes, without_spent_adapters
from pe_rlhf_jax.report import headline, health, html, samples
from pe_rlhf_jax.report.metrics import MetricsLog
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.sharding import row_multiple
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.context import peak_memory_gib
from pe_rlhf_jax.training.rewards import Rewards
from pe_rlhf_jax.types import PyTree

_OUTCOMES = {**ROLE_OF, "evaluate": "evaluate", "export": "export"}


class Stopped(Exception):
    """The run was asked to stop, by the signal named, and its state is saved."""


class Stop(Protocol):
    """Whether somebody asked for the run to stop."""

    def asked(self) -> str | None:
        """By which signal; the same answer on every host, which all ask at the same time."""


class Run:
    """One run. `execute` continues it from wherever its folder stands.

    On several hosts all of them do the same; what is written once, and what is decided by what was written, is the first one's part
    (`hosts.once`). Only it has a `log`.
    """

    def __init__(self, config: Config, folder: Path, progress: Progress, stop: Stop, command: str | None = None):
        self.config, self.folder, self.progress, self.stop, self.command = config, folder, progress, stop, command
        self.store = Store(folder / "checkpoints")
        self.backbone, self.context = load(without_spent_adapters(config, self.store), progress, needs=needed(config))
        self.outcomes = Outcomes(self.store, self.backbone, self.context)
        hosts.once(self._open_log)

    def execute(self) -> dict[str, Any]:
        """Runs the configured stages and returns the summary."""
        actions: dict[str, Callable[[], None]] = {
            "sft": self._sft,
            "reward": self._reward,
            "rl": self._rl,
            "evaluate": self._evaluate,
            "export": self._export,
        }
        checks.order(self)
        summary: dict[str, Any] = {}
        for stage in self.config.run.stages:
            self._stop_if_asked()
            actions[stage]()
            summary = self.summary()
            hosts.once(functools.partial(run_folder.write_summary, self.folder, summary))
        for note in self.context.data.damaged.notes() if self.context.data.damaged else ():
            self.progress.note(f"data: {note}")
        hosts.once(lambda: html.build(self.folder))
        return summary

    def close(self) -> None:
        """Ends the log."""
        if hosts.first():
            self.log.close()

    def _open_log(self) -> None:
        self.log = MetricsLog(
            self.folder,
            tensorboard=self.config.run.tensorboard,
            wandb_project=self.config.run.wandb_project,
            name=self.config.run.name,
            config=self.config.model_dump(mode="json"),
        )

    def _stop_if_asked(self) -> None:
        if signal := self.stop.asked():
            raise Stopped(signal)

    def _sft(self) -> None:
        context = self.context
        self._train(sft.STAGE, lambda: sft.init(context), lambda s: sft.run(context, s), lambda s: sft.finish(context, s))

    def _reward(self) -> None:
        if self._finished(reward.STAGE):
            return
        context, start, config = self.context, self.outcomes.reference(), self.config.reward
        fresh = self.store.latest(reward.STAGE) is None
        if fresh and config.linear_probe is not None:
            examples = min(config.linear_probe, len(context.split(reward.kind_of(config).data).train))
            self.progress.note(f"reward: fits a head to {examples} examples before the first update")
        self._train(
            reward.STAGE,
            lambda: reward.init(context, start),
            lambda s: reward.run(context, start, s, fresh),
            lambda s: reward.finish(context, start, s),
            select=f"eval/{reward.kind_of(config).select}",
            patience=config.early_stopping,
        )

    def _rl(self) -> None:
        if self._finished(rl.STAGE):
            return
        context, config, reference = self.context, self.config.rl, self.outcomes.reference()
        rewards, model = Rewards(context, self.outcomes.reward_models()), self.outcomes.reward_model()
        if config.sampling.truncates:
            self.progress.warn(
                "rl.sampling.top_k or top_p: responses come from a part of the policy's distribution, but log-probabilities are those of "
                "all of it, so estimates of the KL are wrong, and may be below 0; sample from all of it, at a lower temperature if need be"
            )
        if config.length_target and not config.length_penalty:
            self.progress.warn("rl.length_target does nothing without rl.length_penalty, which is taken off beyond it")
        self._train(
            rl.STAGE,
            lambda: rl.init(context, reference, model),
            lambda s: rl.run(context, reference, model, rewards, s),
            lambda s: rl.finish(s, config),
        )

    def _finished(self, stage: str) -> bool:
        done = self.store.latest(_OUTCOMES[stage]) is not None
        if done:
            self.progress.note(f"{stage}: finished before")
        return done

    def _train(
        self,
        stage: str,
        init: Callable[[], PyTree],
        advance: Callable[[PyTree], Iterator[tuple[PyTree, dict[str, float]]]],
        finish: Callable[[PyTree], tuple[PyTree, dict[str, Any]]],
        select: str | None = None,
        patience: int | None = None,
    ) -> None:
        """Runs a training stage to its end from wherever the run folder stands, saving as configured.

        `select` names the metric whose best checkpoint is the stage's outcome; the last one is, otherwise. The stage ends early when
        the metric has not risen `patience` times in a row.
        """
        if self._finished(stage):
            return
        total, every, rows = getattr(self.config, stage).steps, self.config.run.checkpoint_every, self._rows(stage)
        portions = [row_multiple(self.context.mesh), getattr(self.config, stage).micro_batch_size]
        saved = self.store.latest(stage) is not None
        if not saved:
            state, meta = init(), self._meta()
        else:
            state, meta = self.store.restore(stage, self.outcomes.like(init))
            self.outcomes.check(meta)
            if meta.get("rows", rows) != rows:
                self.progress.warn(
                    f"{stage} began with other rows of data, or held out others: from here on it goes by these, in another order"
                )
            if meta.get("portions", portions) != portions and stage != rl.STAGE and self.config.lora.lora_dropout:
                self.progress.warn(f"{stage} began on another mesh or with other micro-batches: from here on dropout draws otherwise")
        given = self.outcomes.given(stage)
        self._warn_of_changed(stage, meta, given)
        meta |= {"rows": rows, "portions": portions, "given": meta.get("given", {}) | given}
        start = int(state.step)
        hosts.once(lambda: self.log.rewind(stage, start if saved else -1))
        before, began = meta["elapsed_s"], time.perf_counter()
        watch = health.Watch(self.config, self.log.rows(stage)) if stage == rl.STAGE and hosts.first() else None
        with self.progress.stage(stage, total, start) as shown:
            # What was seen before a kill counts as well: a continued run stops where an undisturbed one does.
            updates = iter(()) if self._stalled(stage, select, patience) else advance(state)
            while (update := next(updates, None)) is not None:
                state, values = update
                step = int(state.step)
                if hosts.first():
                    self.log.write(stage, step, values)
                shown.update(step, values)
                for warning in watch.after(values) if watch else ():
                    self.progress.warn(warning)
                metric = values.get(select) if select else None
                signal = self.stop.asked()
                if step % every == 0 or step == total or metric is not None or signal:
                    meta |= {"elapsed_s": before + time.perf_counter() - began, "peak_memory_gib": self._peak(meta)}
                    if hosts.first():
                        self.log.flush()
                    self.store.save(stage, step, state, meta, metric)
                if signal:
                    raise Stopped(signal)
                if metric is not None and self._stalled(stage, select, patience):
                    self.progress.note(f"{stage}: stopped at step {step}, {select} has not risen in {patience} evaluations")
                    break
        del updates
        if select and (best := self.store.best(stage)) != int(state.step):
            update = state = None  # one state at a time is in memory
            state, _ = self.store.restore(stage, self.outcomes.like(init), best)
        outcome, figures = finish(state)
        meta |= {"elapsed_s": before + time.perf_counter() - began, "peak_memory_gib": self._peak(meta), "figures": figures}
        self.store.save(ROLE_OF[stage], int(state.step), outcome, meta)

    def _warn_of_changed(self, stage: str, meta: dict[str, Any], given: dict[str, str]) -> None:
        """Says which of what a stage was given are no longer as its meta has them, if it has them."""
        for name, sha256 in given.items():
            if meta.get("given", {}).get(name, sha256) != sha256:
                self.progress.warn(f"{stage} began with another {name}, whose files have changed since: its results mix both")

    def _rows(self, stage: str) -> str:
        """What tells the rows that a stage learns from apart from others."""
        kinds = {sft.STAGE: "sft", reward.STAGE: reward.kind_of(self.config.reward).data, rl.STAGE: "prompts"}
        return rows_of(getattr(self.context.data, kinds[stage])).hex()

    def _stalled(self, stage: str, select: str | None, patience: int | None) -> bool:
        if select is None or patience is None:
            return False
        seen = hosts.once(lambda: [row[select] for row in self.log.rows(stage) if row.get(select) is not None])
        return len(seen) > patience and max(seen[-patience:]) <= max(seen[:-patience])

    def _evaluate(self) -> None:
        if self.evaluated():
            self.progress.note(f"{evaluate.STAGE}: finished before")
            return
        began = time.perf_counter()
        figures: dict[str, Any] = {}
        reward_model, policy, data = self.outcomes.reward_model(), self.outcomes.policy(), self.context.data
        if reward_model is not None and getattr(data, reward.kind_of(self.config.reward).data) is not None:
            figures["reward_model"] = reward.evaluate(self.context, reward_model)
        if policy is not None and data.prompts is not None:
            roles = {"reference": self.outcomes.reference(), "policy": policy}
            self._warn_of_changed(rl.STAGE, self.store.meta(ROLE_OF[rl.STAGE]), self.outcomes.given(evaluate.STAGE))
            rewards = Rewards(self.context, self.outcomes.reward_models())
            with self.progress.stage(evaluate.STAGE, min(self.config.evaluate.prompts, len(data.prompts.validation))) as shown:
                for done, result in evaluate.policy(self.context, roles, rewards, html.SAMPLES_SHOWN):
                    shown.update(done, {})
                    figures |= result
                    self._stop_if_asked()
            rows = figures.pop("samples")
            hosts.once(lambda: samples.write(self.folder / "samples" / "evaluation.jsonl", rows))
            samples.show(self.progress.console, rows, self.config.evaluate.samples)
        meta = self._meta()
        meta |= {"elapsed_s": time.perf_counter() - began, "peak_memory_gib": self._peak(meta), "figures": figures}
        self.store.save(evaluate.STAGE, 0, {}, meta | {"of": self._of()})

    def _of(self) -> dict[str, Any]:
        """What an evaluation is of, and how it is made."""
        steps, settings = {name: self.store.latest(name) for name in ROLE_OF.values()}, self.config.evaluate.model_dump(mode="json")
        return steps | {"settings": settings, "given": self.outcomes.given(evaluate.STAGE)}

    def evaluated(self) -> bool:
        """Whether what is there now was evaluated so; an evaluation of what stood there before, such as no policy, does not count."""
        if self.store.latest(evaluate.STAGE) is None:
            return False
        kept, now = self.store.meta(evaluate.STAGE).get("of", {}), self._of()
        shown = {"samples": now["settings"]["samples"]}  # what the terminal shows changes no figure
        changed = any(now["given"].get(name, sha256) != sha256 for name, sha256 in kept.get("given", {}).items())
        return not changed and kept | {"settings": kept.get("settings", {}) | shown, "given": now["given"]} == now

    def _export(self) -> None:
        began = time.perf_counter()
        common: dict[str, Any] = {"base_model": self.backbone.source, "sha256": self.backbone.sha256}
        common["revision"] = self.config.model.revision
        common["weights"] = self.backbone.family.weights(self.backbone.config)
        roles = {"policy": self.outcomes.policy() or self.outcomes.reference(), "reward": self.outcomes.reward_model()}
        config, summary = self.config.export, self.summary()
        for name in config.roles:
            role, folder = roles[name], self.folder / "export" / name
            told = self._training(name, summary)
            if role is None or (role.lora is None and role.params is None):
                self.progress.warn(f"export: the {name} model was not trained")
                continue
            if role.lora is None or role.params is not None:
                other = "" if config.merged else "; export.merged writes it whole"
                self.progress.warn(f"export: the {name} model has weights of its own, to which no adapter of the backbone belongs{other}")
            else:
                # What it trains whole is written as a sum.
                whole = hosts.fetch({name: self.context.backbone[name] for name in role.lora if name == WHOLE})
                lora, head = hosts.fetch((role.lora, role.head))
                settings = {"config": self.config.lora, "training": told, "backbone": whole, **common}
                if name == "policy":
                    write = functools.partial(export.export_policy, folder, lora, **settings)
                else:
                    write = functools.partial(export.export_reward, folder, lora, head, family=self.backbone.family, **settings)
                hosts.once(write)
            if config.merged:
                target, head = self.folder / "export" / "merged" / name, role.head if name == "reward" else None
                lora, head = hosts.fetch((role.lora, head))
                merged.export_merged(
                    target,
                    self.backbone,
                    lora,
                    self.config.lora,
                    params=role.params,
                    head=head,
                    dtype=config.merged_dtype,
                    training=told,
                )
        meta = self._meta()
        meta |= {"elapsed_s": time.perf_counter() - began, "peak_memory_gib": self._peak(meta), "figures": {}}
        self.store.save("export", 0, {}, meta)

    def _training(self, name: card.Kind, summary: dict[str, Any]) -> card.Training:
        """What the model card of the policy or reward model tells."""
        figures = [card.Figure(tile.label, tile.value, tile.interval, tile.reading) for tile in headline.tiles(summary, {}, name)]
        stages = [stage for stage, outcome in ROLE_OF.items() if self.store.latest(outcome) is not None]
        return card.training(
            name, self.config, stages, figures, self.command, self.backbone.license, self.backbone.config.vision is not None
        )

    def summary(self) -> dict[str, Any]:
        """Everything that is known of the run so far; see the README for its names."""
        metas = {stage: self.store.meta(name) for stage, name in _OUTCOMES.items() if self.store.latest(name) is not None}
        figures = {stage: meta["figures"] for stage, meta in metas.items()}
        evaluated = figures.get("evaluate", {})
        times = {f"{stage}_s": meta["elapsed_s"] for stage, meta in metas.items()}
        device = jax.devices()[0]
        return {
            "name": self.config.run.name,
            "versions": {name: importlib.metadata.version(name) for name in ("pe_rlhf_jax", "jax", "flax", "optax", "orbax-checkpoint")}
            | {"python": sys.version.split()[0]},
            "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "cores": os.cpu_count()}
            | ({"hosts": jax.process_count()} if hosts.several() else {}),
            "model": {
                "source": self.backbone.source,
                "sha256": self.backbone.sha256,
                "parameters": count(self.context.backbone),
                "trainable_parameters": self._trainable(),
                "quantization": self.config.model.quantization,
            },
            **({"sft": figures["sft"]} if "sft" in figures else {}),
            **({"reward_model": figures["reward"] | evaluated.get("reward_model", {})} if "reward" in figures else {}),
            **({"rl": figures["rl"] | evaluated.get("rl", {})} if "rl" in figures else {}),
            **({"judge": evaluated["judge"]} if "judge" in evaluated else {}),
            "time": times | hosts.once(self._parts_of_rl) | {"total_s": sum(times.values())},
            "peak_memory_gib": max([meta["peak_memory_gib"] for meta in metas.values()], default=peak_memory_gib()),
        }

    def _parts_of_rl(self) -> dict[str, float]:
        """What the seconds of RL went into."""
        rows = self.log.rows(rl.STAGE)
        parts = {f"rl_{part}_s": sum(row.get(f"time/{part}") or 0.0 for row in rows) for part in ("rollout", "score", "learn")}
        return parts if rows else {}

    def _trainable(self) -> int:
        """Numbers that training changes in one model: the policy, or what has been trained so far."""
        policy, reward_model = self.outcomes.policy(), self.outcomes.reward_model()
        role = policy or reward_model or self.outcomes.reference()
        return count(role.params if role.lora is None and role.params is not None else role.lora)

    def _meta(self) -> dict[str, Any]:
        return {"backbone": {"source": self.backbone.source, "sha256": self.backbone.sha256}, "elapsed_s": 0.0, "peak_memory_gib": 0.0}

    def _peak(self, meta: dict[str, Any]) -> float:
        """Peak memory so far, on the fullest host."""
        return max(meta["peak_memory_gib"], hosts.largest(peak_memory_gib()))
