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
from pe_rlhf_jax.data import Data, Packing, Split, Vision
from pe_rlhf_jax.data.rows import MOST_IN_A_ROW, padded
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

    def __post_init__(self) -> None:
        if self.config.data.packing and self.decoder.config.vision is not None:
            raise ConfigError("data.packing is for models of text, and this one sees: leave it out; data.group_by_length saves padding too")
        if self.config.reward.linear_probe is not None and self.reward_base.head is not None:
            raise ConfigError("reward.linear_probe would take the place of the head of reward.adapter; leave one of them out")

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

        Rounded up to what the mesh can split: micro-batches of pairs may be half of that. Of packed rows an update without micro-batches
        may have fewer; it is planned for as many.
        """
        section, multiple = getattr(self.config, stage), row_multiple(self.mesh)
        return -(-(section.micro_batch_size or section.batch_size) // multiple) * multiple

    def packing(self, stage: Literal["sft", "reward"], kind: Literal["sft", "preference", "label"]) -> Packing | None:
        """How a stage packs batches of a kind; None where each example has rows of its own.

        Raises ConfigError for pairs that would make longer rows than a prompt and two responses.
        """
        data, section = self.config.data, getattr(self.config, stage)
        if not data.packing:
            return None
        longest = max(example.length for example in self.split(kind).train)
        limit = data.max_prompt_length + data.max_response_length * (2 if kind == "preference" else 1)
        if longest > limit:  # sides with long prompts of their own
            raise ConfigError(
                f"data.packing: the sides of a pair share so little that it takes {longest} tokens, more than one prompt and two responses "
                f"({limit}); leave packing out, or take the common beginning of both sides for the row's `prompt`"
            )
        part = section.micro_batch_size if section.micro_batch_size != section.batch_size else None
        most = longest if kind == "sft" else MOST_IN_A_ROW
        return Packing(padded(longest, data.length_multiple), part or row_multiple(self.mesh), most)

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
