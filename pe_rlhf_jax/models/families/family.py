"""What a family of models must say about itself, so that its published weights can be read into the decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pe_rlhf_jax.models.decoder import DecoderConfig


class UnsupportedModelError(ValueError):
    """A model, or a feature of one, that the decoder does not compute; the message names it."""


@dataclass(frozen=True)
class Weight:
    """One tensor of the published model, or with `{layer}` in its name one per layer, and the leaf that it fills.

    `transposed`: the file holds [out, in] (PyTorch's linear layers), the leaf [in, out]. Per-layer tensors are stacked
    on the leaf's first axis.
    """

    name: str
    leaf: tuple[str, ...]
    transposed: bool = False

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """The tensors' names in the file, in the order of the layers."""
        return [self.name.format(layer=i) for i in range(num_layers)] if self.per_layer else [self.name]


@dataclass(frozen=True)
class Family:
    """A family's translation from Hugging Face's terms to ours."""

    model_type: str
    config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    """Architecture out of `config.json`; raises UnsupportedModelError."""
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    """Every tensor that fills a leaf."""
    ignorable: Callable[[DecoderConfig], tuple[str, ...]]
    """Regular expressions for tensors that files carry although they follow from the configuration."""
