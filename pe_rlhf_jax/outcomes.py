"""What the finished stages of a run folder left, as roles on a loaded backbone; and the reward models that RL is given."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from pe_rlhf_jax import hosts, run_folder
from pe_rlhf_jax.checkpoint.peft_import import WEIGHTS_FILE
from pe_rlhf_jax.checkpoint.preprocessing import vision_of
from pe_rlhf_jax.checkpoint.source import Backbone, resolve
from pe_rlhf_jax.checkpoint.store import CheckpointError, Store
from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.files import path_of
from pe_rlhf_jax.loading import adapted, decoder_of, load_decoder
from pe_rlhf_jax.models.lora import merge
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.models.vlm import adapts_tower
from pe_rlhf_jax.package import sha256_of
from pe_rlhf_jax.sharding import placed_shapes
from pe_rlhf_jax.training import evaluate, reward, rl, sft
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.images import ImageEncoder
from pe_rlhf_jax.training.rewards import RewardModel
from pe_rlhf_jax.types import PyTree

ROLE_OF = {sft.STAGE: "reference", reward.STAGE: "reward_model", rl.STAGE: "policy"}
"""Under which name the outcome of a training stage is kept among the checkpoints."""


def without_spent_adapters(config: Config, store: Store) -> Config:
    """The configuration without the adapters that stages started from and nothing reads any more: their folders may be gone."""
    model, of_reward = config.model, config.reward
    if store.latest(ROLE_OF[sft.STAGE]) is not None:
        model = model.model_copy(update={"adapter": None})
    if any(store.latest(name) is not None for name in (reward.STAGE, ROLE_OF[reward.STAGE])):
        of_reward = of_reward.model_copy(update={"adapter": None})
    return config.model_copy(update={"model": model, "reward": of_reward})


class Outcomes:
    """The roles that a run folder's finished stages left, each read once."""

    def __init__(self, store: Store, backbone: Backbone, context: Context):
        self.store, self.backbone, self.context = store, backbone, context
        self._read: dict[str, Any] = {}

    def reference(self) -> Role:
        """The SFT model where there is one, else the backbone itself, with `model.adapter` where one is named."""
        return self._outcome(sft.STAGE, lambda: sft.init(self.context).trainable) or self.context.base

    def reward_model(self) -> Role | None:
        """This run's reward model."""
        start = self.reference()
        trained = self._outcome(reward.STAGE, lambda: reward.init(self.context, start).trainable)
        return trained and reward.whole(self.context, start, trained)

    def policy(self) -> Role | None:
        """The policy that RL left."""
        reference, model = self.reference(), self.reward_model()
        trained = self._outcome(rl.STAGE, lambda: rl.init(self.context, reference, model).train.trainable)
        return trained and rl.whole(self.context, reference, model, trained)["policy"]

    def reward_models(self) -> dict[str, RewardModel]:
        """The reward models that `rl.rewards` names, ready to score.

        Raises:
            ConfigError: one is missing, does not fit, or needs `rl.roles: separate`.
            CheckpointError: its checkpoint cannot be used.
        """
        names = {term.model for term in self.context.config.rl.rewards if term.model is not None}
        return {name: self._own() if name == "run" else self._of_another_run(path_of(name)) for name in sorted(names)}

    def _own(self) -> RewardModel:
        role, context = self.reward_model(), self.context
        if role is None:
            raise ConfigError(f"stage rl needs a reward model, and {self.store.folder.parent} has none; run the stage `reward` first")
        if context.config.rl.roles == "separate":
            return _merged(context, role)
        return RewardModel(context.decoder, context.backbone, role)

    def check_other_runs(self) -> None:
        """Raises what `reward_models` does of other runs' reward models, as far as it can be told without loading them."""
        for name in sorted({term.model for term in self.context.config.rl.rewards if term.model not in (None, "run")}):
            self._another_run(path_of(name))

    def _another_run(self, folder: Path) -> tuple[Config, Backbone, Store, bool]:
        """Configuration, backbone and checkpoints of another run with a reward model, and whether it stands on this run's backbone."""
        config, mine, store = run_folder.read_config(folder), self.context, Store(folder / "checkpoints")
        if store.latest(ROLE_OF[reward.STAGE]) is None:
            raise ConfigError(f"rl.rewards: {folder} has no finished reward model; run its stage `reward` first")
        if mine.config.rl.roles == "shared" and "full" in (config.reward.tuning, config.reward.start_from == "sft" and config.sft.tuning):
            raise ConfigError(f"rl.rewards: the reward model of {folder} was tuned in full, a second backbone; set rl.roles: separate")
        backbone = resolve(config.model)
        ours = (backbone.sha256, config.model.quantization) == (self.backbone.sha256, mine.config.model.quantization)
        if not ours:
            if mine.config.rl.roles == "shared":
                stands, here = (_described(b, c) for b, c in ((backbone, config), (self.backbone, mine.config)))
                raise ConfigError(
                    f"rl.rewards: the reward model of {folder} stands on {stands}, this run on {here}; "
                    "set rl.roles: separate to load that backbone too"
                )
            if backbone.tokenizer.get_vocab() != self.backbone.tokenizer.get_vocab():
                raise ConfigError(
                    f"rl.rewards: the reward model of {folder} reads other tokens than this run's model writes "
                    f"({backbone.source}, {self.backbone.source}); their vocabularies must be the same"
                )
            text, positions = (
                mine.config.data.max_prompt_length + mine.config.rl.sampling.max_new_tokens,
                backbone.config.max_position_embeddings,
            )
            if text > positions:
                raise ConfigError(
                    f"rl.rewards: the reward model of {folder} has {positions} positions, and prompt and response take up to {text} "
                    "(data.max_prompt_length, rl.sampling.max_new_tokens)"
                )
        return config, backbone, store, ours

    def _of_another_run(self, folder: Path) -> RewardModel:
        (config, backbone, store, ours), mine = self._another_run(folder), self.context
        if ours:
            decoder, params = dataclasses.replace(mine.decoder, lora=config.lora), mine.backbone
        else:
            decoder, params = load_decoder(decoder_of(config, backbone), config.model.quantization, backbone, mine.mesh)
        # Where its training began is not needed, but for a reference that is no outcome of its own.
        start = None if store.latest(ROLE_OF[sft.STAGE]) is not None else config.model.adapter
        base = adapted(config, start, backbone, decoder, params).replace(head=None)
        theirs = dataclasses.replace(mine, config=config, decoder=decoder, backbone=params, base=base, reward_base=Role())
        role = Outcomes(store, backbone, theirs).reward_model()
        assert role is not None
        model = _merged(theirs, role) if mine.config.rl.roles == "separate" else RewardModel(decoder, params, role)
        return model._replace(encoder=self._sight(folder, backbone, theirs))

    def _sight(self, folder: Path, backbone: Backbone, theirs: Context) -> ImageEncoder | None:
        """What encodes pictures for another run's reward model; None where it sees what this run's policy sees."""
        mine = self.context
        if mine.encoder is None or backbone.config.vision is None:
            return None
        if vision_of(backbone) != mine.vision:
            raise ConfigError(
                f"rl.rewards: the reward model of {folder} has pictures written or prepared in another way than this run's model "
                f"({backbone.source}, {self.backbone.source}); both must be the same"
            )
        if theirs.backbone is mine.backbone and adapts_tower(theirs.decoder.lora) == mine.encoder.adapted:
            return None
        return ImageEncoder(theirs.decoder, theirs.backbone, mine.mesh, mine.encoder.read, mine.encoder.cached_bytes)

    def given(self, stage: str) -> dict[str, str]:
        """What a stage uses and this run did not make, by the field that names it, with a SHA-256: of the weights of the adapter that is
        the reference, and of the `SHA256SUMS` of other runs' reward models. What cannot be read is left out.
        """
        config, found = self.context.config, {}
        adapter = config.model.adapter if self.store.latest(ROLE_OF[sft.STAGE]) is None else None
        policy = self.store.latest(ROLE_OF[rl.STAGE]) is not None
        of_reward = stage == reward.STAGE or (stage == evaluate.STAGE and not policy)
        if adapter is not None and (not of_reward or config.reward.start_from == "sft"):
            found["model.adapter"] = hosts.once(lambda: _sha256(Path(adapter).expanduser() / WEIGHTS_FILE))
        if stage == rl.STAGE or (stage == evaluate.STAGE and policy):
            for name in sorted({term.model for term in config.rl.rewards if term.model not in (None, "run")}):
                found[f"rl.rewards {name}"] = Store(path_of(name) / "checkpoints").fingerprint(ROLE_OF[reward.STAGE])
        return {name: sha256 for name, sha256 in found.items() if sha256 is not None}

    def trained(self) -> dict[str, PyTree]:
        """What each finished training stage trained, by the name of its outcome."""
        return {ROLE_OF[stage]: self._read[stage] for stage in ROLE_OF if stage in self._read}

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
        return placed_shapes(jax.eval_shape(init), self.context.mesh)

    def check(self, meta: dict[str, Any]) -> None:
        """Raises CheckpointError if a checkpoint was made on another backbone, unless `model.any_backbone` allows it."""
        if meta["backbone"]["sha256"] != self.backbone.sha256 and not self.context.config.model.any_backbone:
            raise CheckpointError(
                f"{self.store.folder}: trained on {meta['backbone']['source']} ({meta['backbone']['sha256'][:12]}...), but model.source "
                f"{self.backbone.source} is {self.backbone.sha256[:12]}...; adapters fit only the backbone they were trained on. "
                "If you know better, set model.any_backbone: true"
            )


def _sha256(file: Path) -> str | None:
    with contextlib.suppress(OSError):
        return sha256_of(file)
    return None


def _described(backbone: Backbone, config: Config) -> str:
    return backbone.source + (f" in {config.model.quantization}" if config.model.quantization else "")


def _merged(context: Context, role: Role) -> RewardModel:
    """A reward model on a backbone of its own, its adapter merged in: more memory, and scoring without the adapter's cost.

    A quantized backbone stays as it is, with the adapter on top: rounding the sum to few bits again would change the scores.
    """
    if role.lora is None or context.config.model.quantization is not None:
        return RewardModel(context.decoder, context.backbone, role)
    base = role.variables(context.backbone)["params"]  # its own, with the backbone's vision tower
    params = jax.jit(lambda params, lora: merge(params, lora, context.config.lora))(base, role.lora)
    return RewardModel(context.decoder, params, Role(head=role.head))
