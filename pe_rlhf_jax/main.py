"""Command line and composition: configuration -> backbone, data and devices -> stages -> run folder.

    python -m pe_rlhf_jax.main --config configs/quickstart.yaml [--set section.field=value ...] [--restart]
    python -m pe_rlhf_jax.main generate --run runs/quickstart --prompt "Film review: The acting is"
    python -m pe_rlhf_jax.main report runs/quickstart

Exit codes: 0 done, 2 an error that the message explains, 75 stopped by SIGTERM or Ctrl-C with everything saved.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax import data, run_folder
from pe_rlhf_jax.checkpoint import export
from pe_rlhf_jax.checkpoint.source import Backbone, resolve
from pe_rlhf_jax.checkpoint.store import CheckpointError, Store
from pe_rlhf_jax.checkpoint.weights import WeightsError
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.data import DataError, PromptExample, pad_prompts
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.package import PackageError, cache_folder
from pe_rlhf_jax.report import html, samples
from pe_rlhf_jax.report.metrics import MetricsLog
from pe_rlhf_jax.report.progress import Progress
from pe_rlhf_jax.sharding import make_mesh, row_multiple, shardings
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.context import Context, peak_memory_gib
from pe_rlhf_jax.training.functions import load_function
from pe_rlhf_jax.training.step import NonFiniteError
from pe_rlhf_jax.types import PyTree

STOPPED = 75
"""Exit code of a run that was stopped and can be continued (EX_TEMPFAIL)."""

ROLE_OF = {sft.STAGE: "reference", reward.STAGE: "reward_model", rl.STAGE: "policy"}
"""Under which name the outcome of a training stage is kept among the checkpoints."""


DataKind = Literal["sft", "preference", "prompts"]


class Stopped(Exception):
    """SIGTERM or Ctrl-C was received, and the state is saved."""


class StopSignal:
    """Turns the first SIGTERM or Ctrl-C into a flag that is looked at between steps; a second Ctrl-C acts at once."""

    def __init__(self) -> None:
        self.received: str | None = None

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        self.received = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def check(self) -> None:
        if self.received:
            raise Stopped(self.received)


class Models:
    """What the finished training stages of a run folder left, as roles on the loaded backbone."""

    def __init__(self, store: Store, backbone: Backbone, context: Context):
        self.store, self.backbone, self.context = store, backbone, context
        self._read: dict[str, Any] = {}

    def reference(self) -> Role:
        """The SFT model where there is one, else the backbone itself."""
        return self._outcome(sft.STAGE, lambda: sft.init(self.context).trainable) or Role()

    def reward_model(self) -> Role | None:
        start = self.reference()
        trained = self._outcome(reward.STAGE, lambda: reward.init(self.context, start).trainable)
        return trained and reward.whole(self.context, start, trained)

    def policy(self) -> Role | None:
        reference, reward_model = self.reference(), self.reward_model()
        if reward_model is None:
            return None
        trained = self._outcome(rl.STAGE, lambda: rl.init(self.context, reference, reward_model).train.trainable)
        return trained and rl.whole(self.context, reference, reward_model, trained)["policy"]

    def _outcome(self, stage: str, init: Callable[[], PyTree]) -> Any:
        """What a finished training stage left, read once, or None. Training works on copies, so it stays as it is."""
        if stage not in self._read:
            if self.store.latest(ROLE_OF[stage]) is None:
                return None
            outcome, meta = self.store.restore(ROLE_OF[stage], self.like(init))
            self.check(meta)
            self._read[stage] = outcome
        return self._read[stage]

    def like(self, init: Callable[[], PyTree]) -> PyTree:
        """Shapes and shardings of what `init` makes, without making it."""
        shapes = jax.eval_shape(init)
        places = shardings(shapes, self.context.mesh)
        return jax.tree.map(lambda shape, place: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place), shapes, places)

    def check(self, meta: dict[str, Any]) -> None:
        if meta["backbone"]["sha256"] != self.backbone.sha256:
            raise CheckpointError(
                f"{self.store.folder}: trained on {meta['backbone']['source']} ({meta['backbone']['sha256'][:12]}...), but model.source "
                f"{self.backbone.source} is {self.backbone.sha256[:12]}...; adapters fit only the backbone they were trained on"
            )


class Run:
    """One run: the loaded context, the run folder's state, and the stages composed over them."""

    def __init__(self, config: Config, folder: Path, progress: Progress, stop: StopSignal):
        self.config, self.folder, self.progress, self.stop = config, folder, progress, stop
        self.store = Store(folder / "checkpoints")
        self.backbone, self.context = load(config, progress, needs=_needs(config))
        self.models = Models(self.store, self.backbone, self.context)
        self.log = MetricsLog(
            folder,
            tensorboard=config.run.tensorboard,
            wandb_project=config.run.wandb_project,
            name=config.run.name,
            config=config.model_dump(mode="json"),
        )

    def execute(self) -> dict[str, Any]:
        """Runs the configured stages and returns the summary."""
        actions: dict[str, Callable[[], None]] = {
            "sft": self._sft,
            "reward": self._reward,
            "rl": self._rl,
            "evaluate": self._evaluate,
            "export": self._export,
        }
        for stage in self.config.run.stages:
            self.stop.check()
            actions[stage]()
            run_folder.write_summary(self.folder, self.summary())
        html.build(self.folder)
        return self.summary()

    def _sft(self) -> None:
        context = self.context
        self._train(sft.STAGE, lambda: sft.init(context), lambda s: sft.run(context, s), lambda s: sft.finish(context, s))

    def _reward(self) -> None:
        context, start = self.context, self.models.reference()
        self._train(
            reward.STAGE,
            lambda: reward.init(context, start),
            lambda s: reward.run(context, start, s),
            lambda s: reward.finish(context, start, s),
            select="eval/accuracy",
        )

    def _rl(self) -> None:
        context, reference, reward_model = self.context, self.models.reference(), self.models.reward_model()
        if reward_model is None:
            raise ConfigError(f"stage rl needs a reward model, and {self.folder} has none; run the stage `reward` first")
        self._train(
            rl.STAGE,
            lambda: rl.init(context, reference, reward_model),
            lambda s: rl.run(context, reference, reward_model, s),
            lambda s: rl.finish(s, context.config.rl),
        )

    def _train(
        self,
        stage: str,
        init: Callable[[], PyTree],
        advance: Callable[[PyTree], Iterator[tuple[PyTree, dict[str, float]]]],
        finish: Callable[[PyTree], tuple[PyTree, dict[str, Any]]],
        select: str | None = None,
    ) -> None:
        """Runs a training stage to its end from wherever the run folder stands, saving as configured.

        `select` names the metric whose best checkpoint is the stage's outcome; the last one is, otherwise.
        """
        if self.store.latest(ROLE_OF[stage]) is not None:
            self.progress.note(f"{stage}: finished before")
            return
        total, every = getattr(self.config, stage).steps, self.config.run.checkpoint_every
        if self.store.latest(stage) is None:
            state, meta = init(), self._meta()
        else:
            state, meta = self.store.restore(stage, self.models.like(init))
            self.models.check(meta)
        self.log.rewind(stage, int(state.step))
        before, began = meta["elapsed_s"], time.perf_counter()
        with self.progress.stage(stage, total, int(state.step)) as shown:
            for current, values in advance(state):
                state, step = current, int(current.step)
                self.log.write(stage, step, values)
                shown.update(step, values)
                metric = values.get(select) if select else None
                if step % every == 0 or step == total or metric is not None or self.stop.received:
                    meta |= {"elapsed_s": before + time.perf_counter() - began, "peak_memory_gib": self._peak(meta)}
                    self.store.save(stage, step, state, meta, metric)
                self.stop.check()
        if select:
            state, _ = self.store.restore(stage, self.models.like(init), self.store.best(stage))
        outcome, figures = finish(state)
        meta |= {"elapsed_s": before + time.perf_counter() - began, "peak_memory_gib": self._peak(meta), "figures": figures}
        self.store.save(ROLE_OF[stage], int(state.step), outcome, meta)

    def _evaluate(self) -> None:
        if self.store.latest(evaluate.STAGE) is not None:
            self.progress.note("evaluate: finished before")
            return
        began = time.perf_counter()
        figures: dict[str, Any] = {}
        found = {"reference": self.models.reference(), "policy": self.models.policy(), "reward": self.models.reward_model()}
        roles = {name: role for name, role in found.items() if role is not None}
        if "reward" in roles:
            figures["reward_model"] = evaluate.reward_model(self.context, roles["reward"])
        if "policy" in roles:
            with self.progress.stage(
                evaluate.STAGE, min(self.config.evaluate.prompts, len(self.context.split("prompts").validation))
            ) as shown:
                for done, result in evaluate.policy(self.context, roles):
                    shown.update(done, {})
                    figures |= result
                    self.stop.check()
            rows = figures.pop("samples")
            samples.write(self.folder / "samples" / "evaluation.jsonl", rows)
            samples.show(self.progress.console, rows, self.config.evaluate.samples)
        meta = self._meta() | {"elapsed_s": time.perf_counter() - began, "peak_memory_gib": peak_memory_gib(), "figures": figures}
        self.store.save(evaluate.STAGE, 0, {}, meta)

    def _export(self) -> None:
        began = time.perf_counter()
        recipe = {"run": self.config.run.name, "seed": self.config.run.seed, "stages": ", ".join(self.config.run.stages)}
        common: dict[str, Any] = {"base_model": self.backbone.source, "sha256": self.backbone.sha256, "recipe": recipe}
        roles = {"policy": self.models.policy() or self.models.reference(), "reward": self.models.reward_model()}
        for name in self.config.export.roles:
            role, folder = roles[name], self.folder / "export" / name
            if role is None or role.lora is None:
                reason = "was not trained" if role is None else "was tuned in full; only adapters are exported"
                self.progress.warn(f"export: the {name} model {reason}")
            elif name == "policy":
                export.export_policy(folder, role.lora, self.config.lora, **common)
            else:
                export.export_reward(folder, role.lora, role.head, self.config.lora, **common)
        meta = self._meta() | {"elapsed_s": time.perf_counter() - began, "peak_memory_gib": peak_memory_gib(), "figures": {}}
        self.store.save("export", 0, {}, meta)

    def summary(self) -> dict[str, Any]:
        """Everything that is known of the run so far; see the README for its names."""
        metas = {stage: self.store.meta(name) for stage, name in _OUTCOMES.items() if self.store.latest(name) is not None}
        figures = {stage: meta["figures"] for stage, meta in metas.items()}
        evaluated = figures.get("evaluate", {})
        times = {f"{stage}_s": meta["elapsed_s"] for stage, meta in metas.items()}
        rows = self.log.rows(rl.STAGE)
        parts = {f"rl_{part}_s": sum(row.get(f"time/{part}") or 0.0 for row in rows) for part in ("rollout", "score", "learn")}
        device = jax.devices()[0]
        return {
            "name": self.config.run.name,
            "versions": {name: importlib.metadata.version(name) for name in ("pe_rlhf_jax", "jax", "flax", "optax", "orbax-checkpoint")}
            | {"python": sys.version.split()[0]},
            "device": {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "cores": os.cpu_count()},
            "model": {
                "source": self.backbone.source,
                "sha256": self.backbone.sha256,
                "parameters": _size(self.context.backbone),
                "trainable_parameters": _size(self.models.reference().lora or {}),
            },
            **({"sft": figures["sft"]} if "sft" in figures else {}),
            **({"reward_model": figures["reward"] | evaluated.get("reward_model", {})} if "reward" in figures else {}),
            **({"rl": figures["rl"] | evaluated.get("rl", {})} if "rl" in figures else {}),
            **({"judge": evaluated["judge"]} if "judge" in evaluated else {}),
            "time": times | (parts if rows else {}) | {"total_s": sum(times.values())},
            "peak_memory_gib": max([meta["peak_memory_gib"] for meta in metas.values()], default=peak_memory_gib()),
        }

    def _meta(self) -> dict[str, Any]:
        return {"backbone": {"source": self.backbone.source, "sha256": self.backbone.sha256}, "elapsed_s": 0.0, "peak_memory_gib": 0.0}

    def _peak(self, meta: dict[str, Any]) -> float:
        return max(meta["peak_memory_gib"], peak_memory_gib())


_OUTCOMES = {**ROLE_OF, "evaluate": "evaluate", "export": "export"}


def load(config: Config, progress: Progress, needs: set[DataKind]) -> tuple[Backbone, Context]:
    """Backbone, data and devices. Raises one of this package's errors, with what to do, before anything is trained."""
    mesh = make_mesh(config.mesh)
    _check_batches(config, row_multiple(mesh))
    if config.evaluate.judge and "evaluate" in config.run.stages:
        load_function(config.evaluate.judge)
    backbone = resolve(config.model)
    _check_lengths(config, backbone.config.max_position_embeddings)
    dtype = {"auto": jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16}.get(config.model.dtype, config.model.dtype)
    dtype = jnp.dtype(dtype)
    decoder = Decoder(backbone.config, config.lora, dtype, dtype, config.model.remat)
    places = shardings(jax.eval_shape(decoder.init_params, jax.random.key(0)), mesh)
    params = backbone.load_params(dtype, places)
    progress.note(
        f"{backbone.source}: {_size(params) / 1e6:.1f}M parameters, {dtype.name}, on {jax.device_count()} {jax.default_backend()}"
    )
    loaded = data.load(config.data, backbone.tokenizer, needs=needs)
    for note in loaded.notes:
        progress.note(f"data: {note}")
    return backbone, Context(config, decoder, params, backbone.tokenizer, backbone.eos_token_ids, loaded, mesh)


def _needs(config: Config) -> set[DataKind]:
    needs: dict[str, set[DataKind]] = {"sft": {"sft"}, "reward": {"preference"}, "rl": {"prompts"}, "evaluate": {"prompts", "preference"}}
    return set().union(*(needs.get(stage, set()) for stage in config.run.stages))


def _check_batches(config: Config, multiple: int) -> None:
    for section in ("sft", "reward", "rl", "evaluate"):
        size = getattr(config, section).batch_size
        if size % multiple:
            raise ConfigError(f"{section}.batch_size {size} must be a multiple of {multiple}, the devices along mesh axes data and fsdp")


def _check_lengths(config: Config, positions: int) -> None:
    response = max(config.data.max_response_length, config.rl.sampling.max_new_tokens)
    if config.data.max_prompt_length + response > positions:
        raise ConfigError(
            f"data.max_prompt_length {config.data.max_prompt_length} and the longest response, {response} tokens "
            f"(data.max_response_length, rl.sampling.max_new_tokens), exceed the model's {positions} positions"
        )


def _size(tree: PyTree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def run(config: Config, restart: bool = False, console: Console | None = None) -> dict[str, Any]:
    """Runs or continues a configuration; returns its summary. Raises Stopped if SIGTERM or Ctrl-C ended it early."""
    if config.run.compilation_cache and not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "compiled"))
    progress = Progress(console)
    with StopSignal() as stop, run_folder.opened(config, restart) as folder:
        this = Run(config, folder, progress, stop)
        try:
            with jax.set_mesh(this.context.mesh):
                summary = this.execute()
        finally:
            this.log.close()
        progress.note(f"report: {folder / 'report.html'}")
        return summary


def generate(folder: Path, prompts: Sequence[str], console: Console) -> None:
    """Answers prompts with a run's policy beside its reference, sampled as the run's `rl.sampling` says."""
    config = run_folder.read_config(folder)
    backbone, context = load(config, Progress(console), needs=set())
    models = Models(Store(folder / "checkpoints"), backbone, context)
    rows = [PromptExample(np.asarray(backbone.tokenizer(text)["input_ids"], np.int32), text, {}) for text in prompts]
    count = -(-len(rows) // row_multiple(context.mesh)) * row_multiple(context.mesh)
    batch = pad_prompts(rows, context.pad_token, config.data.length_multiple, rows=count)
    shown: list[dict[str, Any]] = [{"prompt": text} for text in prompts]
    with jax.set_mesh(context.mesh):
        for name, role in (("reference", models.reference()), ("policy", models.policy())):
            if role is None:
                raise ConfigError(f"{folder} has no {name} yet; run its stage `rl` first")
            rollout = rl.respond(context, role, context.rows(batch), context.key("generate"))
            for row, tokens in zip(shown, rl.response_tokens(rollout), strict=False):
                row[name] = backbone.tokenizer.decode(tokens, skip_special_tokens=True)
    samples.show(console, shown, len(shown))


def cli(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit code."""
    parser = argparse.ArgumentParser(prog="pe-rlhf", description="Parameter-efficient RLHF in JAX.")
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run", help="run or continue a configuration (the default command)")
    running.add_argument("--config", required=True, type=Path, help="YAML file; configs/REFERENCE.md lists every field")
    running.add_argument("--set", action="append", default=[], metavar="A.B=C", help="override a field; may be given several times")
    running.add_argument("--restart", action="store_true", help="start anew; an existing run folder is moved aside")
    reporting = commands.add_parser("report", help="rebuild report.html of a run folder")
    reporting.add_argument("folder", type=Path)
    generating = commands.add_parser("generate", help="answer prompts with a run's policy, beside its reference")
    generating.add_argument("--run", required=True, type=Path, metavar="FOLDER", help="run folder")
    generating.add_argument("--prompt", required=True, action="append", help="may be given several times")
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0].startswith("-") and argv[0] not in ("-h", "--help"):
        argv.insert(0, "run")
    arguments = parser.parse_args(argv)
    console = Console()
    errors = (ConfigError, DataError, WeightsError, PackageError, CheckpointError, NonFiniteError)
    try:
        if arguments.command == "report":
            run_folder.read_config(arguments.folder)
            console.print(f"report: {html.build(arguments.folder)}", markup=False)
        elif arguments.command == "generate":
            generate(arguments.run, arguments.prompt, console)
        else:
            run(configuration.load(arguments.config, arguments.set), arguments.restart, console)
    except Stopped as reason:
        console.print(f"Stopped by {reason}; everything is saved. Run the same command again to continue.", markup=False)
        return STOPPED
    except errors as error:
        console.print(f"error: {error}", markup=False, style="red")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(cli())
