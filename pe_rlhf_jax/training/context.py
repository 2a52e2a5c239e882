"""What every stage works with."""

from __future__ import annotations

import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Any, Literal

import jax
from transformers import PreTrainedTokenizerBase

from pe_rlhf_jax.config import Config, ConfigError
from pe_rlhf_jax.data import Data, Split, Vision
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role, Tuning
from pe_rlhf_jax.sharding import place, place_rows, row_multiple
from pe_rlhf_jax.training.images import ImageEncoder
from pe_rlhf_jax.training.step import stage_key
from pe_rlhf_jax.types import PyTree


@dataclasses.dataclass(frozen=True)
class Context:
    """The loaded backbone, data and devices of a run."""

    config: Config
    decoder: Decoder
    backbone: PyTree
    tokenizer: PreTrainedTokenizerBase
    end_tokens: tuple[int, ...]
    data: Data
    mesh: jax.sharding.Mesh
    base: Role = dataclasses.field(default_factory=Role)
    """What training starts from: the backbone itself, or with the adapter that `model.adapter` names."""
    reward_base: Role = dataclasses.field(default_factory=Role)
    """The same for the reward model, by `reward.adapter`, perhaps with a head."""
    encoder: ImageEncoder | None = None
    """What makes of rows' pictures what the decoder takes; None for models of text."""
    vision: Vision | None = None
    """How pictures are written in prompts, and how their pixels are prepared."""

    @property
    def pad_token(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def split(self, kind: Literal["sft", "preference", "label", "prompts"]) -> Split:
        """The training and held-out rows of one kind. Raises ConfigError if the configuration names none."""
        split = getattr(self.data, kind)
        if split is None:
            raise ConfigError(f"data: this stage needs `data.{kind}` (or `data.source`), and neither is given")
        return split

    def evaluated_at_once(self, stage: Literal["sft", "reward"]) -> int:
        """Rows, or pairs, of a batch of held-out ones: as many as an update computes at once, so that it needs no more memory.

        Rounded up to what the mesh can split: micro-batches of pairs may be half of that.
        """
        section, multiple = getattr(self.config, stage), row_multiple(self.mesh)
        return -(-(section.micro_batch_size or section.batch_size) // multiple) * multiple

    def key(self, stage: str) -> jax.Array:
        return stage_key(self.config.run.seed, stage)

    def start(self, role: Role, tuning: Tuning, stage: str) -> Role:
        """A copy of a role to be trained, with a fresh adapter where it has none, placed on the mesh."""
        fresh = self.decoder.init_lora(self.key(f"{stage}/lora")) if tuning == "lora" and role.lora is None else None
        return place(role.tuned(tuning, self.backbone, fresh, self.config.lora), self.mesh)

    def seen(self, batch: PyTree, examples: Sequence[Any]) -> PyTree:
        """A host batch, with the pictures of its examples where the model sees.

        Fewer examples than rows: the others are copies of the first, as the padding functions fill a batch.
        """
        return batch if self.encoder is None else self.encoder.add(batch, examples)

    def rows(self, batch: PyTree, examples: Sequence[Any] = ()) -> PyTree:
        """A host batch on the devices, split by row, as `seen` where there are examples."""
        return place_rows(self.seen(batch, examples) if examples else batch, self.mesh)


def peak_memory_gib() -> float:
    """Peak memory so far: of the fullest accelerator, or of this process on CPU."""
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in jax.local_devices()]
    if any(peaks):
        return max(peaks) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
