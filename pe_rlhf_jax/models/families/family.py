"""What a family of models must say about itself, so that its published weights can be read into the decoder and written again."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Shaped

from pe_rlhf_jax.image_prompt import ImagePrompt
from pe_rlhf_jax.models.architecture import DecoderConfig


class UnsupportedModelError(ValueError):
    """A model, or a feature of one, that the decoder does not compute; the message names it."""


@dataclass(frozen=True)
class Part:
    """Which part of a fused tensor (query, key and value in one) a leaf is.

    The parts lie along the outputs: one after the other, or with `heads` one after the other within each head.
    """

    index: int
    count: int = 3
    heads: int = 1


@dataclass(frozen=True)
class Weight:
    """One tensor of the published model, or with `{layer}` in its name one per layer, and the leaf that it fills.

    `transposed`: the file holds [out, in] (PyTorch's linear layers), the leaf [in, out]; of more axes, all are reversed. Per-layer
    tensors are stacked on the leaf's first axis. With `part`, the tensor fills several leaves, and each has an entry of its own.
    """

    name: str
    leaf: tuple[str, ...]
    transposed: bool = False
    part: Part | None = None
    layers: int | None = None
    """How many layers it has one in, where these are not the decoder's but a vision tower's."""
    ones: int = 0
    """Axes of length one that the file's tensor has before the leaf's."""

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.name

    def names(self, num_layers: int) -> list[str]:
        """The tensors' names in the file, in the order of the layers; `num_layers` is the decoder's."""
        count = num_layers if self.layers is None else self.layers
        return [self.name.format(layer=i) for i in range(count)] if self.per_layer else [self.name]

    def file_shape(self, leaf_shape: Sequence[int]) -> tuple[int, ...]:
        """The tensor's shape in the file, by the leaf's of one layer."""
        shape = list(leaf_shape)
        if self.part is not None:
            shape[-1] *= self.part.count
        return (1,) * self.ones + tuple(reversed(shape) if self.transposed else shape)

    def take(self, tensor: Shaped[np.ndarray, "*file"]) -> Shaped[np.ndarray, "*leaf"]:
        """The leaf (of one layer) out of the file's tensor."""
        tensor = tensor.reshape(tensor.shape[self.ones :])
        if self.part is not None:
            # Before it is turned, when the parts are rows.
            part, axis = self.part, 0 if self.transposed else tensor.ndim - 1
            before, after = tensor.shape[:axis], tensor.shape[axis + 1 :]
            tensor = tensor.reshape(*before, part.heads, part.count, -1, *after)
            tensor = tensor.take(part.index, axis + 1).reshape(*before, -1, *after)
        return tensor.T if self.transposed else tensor


def join(weights: Sequence[Weight], leaves: Sequence[Shaped[np.ndarray, "*leaf"]]) -> Shaped[np.ndarray, "*file"]:
    """The file's tensor of the weights that share a name, given their leaves (of one layer); the inverse of `take`."""
    first = weights[0]
    if first.part is None:
        [leaf] = leaves
    else:
        ordered = [leaf for _, leaf in sorted(zip(weights, leaves, strict=True), key=lambda pair: pair[0].part.index)]  # type: ignore[union-attr]
        lead = ordered[0].shape[:-1]
        leaf = np.stack([x.reshape(*lead, first.part.heads, -1) for x in ordered], axis=-2).reshape(*lead, -1)
    leaf = leaf.T if first.transposed else leaf
    return leaf.reshape((1,) * first.ones + leaf.shape)


@dataclass(frozen=True)
class Family:
    """A family's translation from Hugging Face's terms to ours."""

    model_type: str
    class_prefix: str
    """Of transformers' classes: `Llama` in `LlamaForCausalLM`."""
    config_from_hf: Callable[[Mapping[str, Any]], DecoderConfig]
    """Architecture out of `config.json`; raises UnsupportedModelError."""
    weights: Callable[[DecoderConfig], tuple[Weight, ...]]
    """Every tensor that fills a leaf."""
    ignorable: Callable[[DecoderConfig], tuple[str, ...]]
    """Regular expressions for tensors that files carry although they follow from the configuration."""
    renamed: tuple[tuple[str, str], ...] = ()
    """Other names that files have for the same tensors: (regular expression at the start of a name, what to write there)."""
    image_prompt: Callable[[DecoderConfig], ImagePrompt] | None = None
    """How pictures are written in its prompts; None for text only."""
    classifier_prefix: str | None = None
    """Of the sequence classifier's class, where it is not `class_prefix`."""
    has_classifier: bool = True
    """Whether transformers has that class."""
    causal: str | None = None
    """transformers' class for a language model, where it is not `class_prefix` and `ForCausalLM`."""
    published: tuple[tuple[str, str], ...] = ()
    """How files are written, which programs of any age read, where that is not as the table has it; as `renamed`."""

    @property
    def classifier(self) -> str:
        """transformers' class for a model with a score in place of the logits."""
        return f"{self.classifier_prefix or self.class_prefix}ForSequenceClassification"

    @property
    def architecture(self) -> str:
        """transformers' class for the model as it is published."""
        return self.causal or self.class_prefix + ("ForCausalLM" if self.image_prompt is None else "ForConditionalGeneration")

    def canonical(self, name: str) -> str:
        """A tensor's name as the table of weights has it."""
        return _renamed(name, self.renamed)

    def written(self, name: str) -> str:
        """A tensor's name as files are written, by its name in the table of weights."""
        return _renamed(name, self.published)


def _renamed(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(rf"\A(?:{pattern})", replacement, name)
    return name
