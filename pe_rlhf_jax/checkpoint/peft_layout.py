"""Where our adapters lie in PEFT's terms: names, orientation, and modules that are query, key and value in one.

PEFT keeps one pair of matrices per module and layer, A [r, in] and B [out, r], whichever way the module itself is stored; ours are stacked
over layers and transposed. Our query, key and value have adapters of their own. Where the published model has one module for the k of them
that are adapted (GPT-NeoX, GPT-2), its A is theirs one above the other, and its B has their columns side by side, each zero outside its
own outputs: rank k r, and exactly the same function. PEFT is told by `rank_pattern` and by an `alpha_pattern` that keeps the scale. An
adapter of rank r that PEFT made on such a module is read as one A for all three.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from pe_rlhf_jax.checkpoint.weights import grouped
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.families import Part, Weight
from pe_rlhf_jax.types import PyTree

PREFIX = "base_model.model."
WHOLE = "projector"
"""What an adapter may train whole."""


@dataclass(frozen=True)
class Module:
    """A linear module of the published model with the weights of ours in it that are adapted."""

    name: str
    """With `{layer}`, without the last `.weight`."""
    target: str
    """As `target_modules` names it: the shortest ending that is no other module's."""
    weights: tuple[Weight, ...]
    count: int
    """Weights of ours in the module, adapted or not."""

    @property
    def fused(self) -> bool:
        return self.weights[0].part is not None

    def tensor_names(self, layer: int) -> tuple[str, str]:
        """Of A and B."""
        name = PREFIX + self.name.format(layer=layer)
        return f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    def factors(self, lora: PyTree) -> list[dict[str, Any]]:
        """The stacked factors {"a": [L, in, r], "b": [L, r, out]} of each weight."""
        return [_at(lora, weight.leaf[:-1]) for weight in self.weights]


def adapted_modules(lora: PyTree, weights: Sequence[Weight]) -> list[Module]:
    """The modules that an adapter (or its shapes) lies on, in the decoder and in a vision tower. `weights` is the family's table.

    What it trains whole (`saved_whole`) is not among them.

    Raises:
        ValueError: an adapted leaf is in no module of the family.
    """
    kernels = [weight for weight in weights if weight.per_layer and weight.leaf[-1] == "kernel"]
    groups = grouped(kernels)
    endings = [group[0].name.removesuffix(".weight").split(".{layer}.")[1] for group in groups]
    found = []
    for group, ending in zip(groups, endings, strict=True):
        short = ending.split(".")[-1]
        target = ending if sum(other.split(".")[-1] == short for other in endings) > 1 else short
        adapted = tuple(weight for weight in group if _at(lora, weight.leaf[:-1]) is not None)
        if adapted:
            found.append(Module(group[0].name.removesuffix(".weight"), target, adapted, len(group)))
    known = {weight.leaf[:-1] for weight in kernels}
    for path in _leaves({name: tree for name, tree in lora.items() if name != WHOLE}):
        if path[:-1] not in known:
            name = ".".join(path[:-1]).replace("layers.", "", 1)
            raise ValueError(f"the adapter has {name}, which the model does not; is it of the right family?")
    return found


def saved_whole(lora: PyTree, weights: Sequence[Weight]) -> list[Weight]:
    """The weights to which the adapter adds as they are (`lora.modules_to_save`)."""
    return [weight for weight in weights if weight.leaf[0] == WHOLE and _at(lora, weight.leaf) is not None]


def modules_to_save(whole: Sequence[Weight]) -> list[str]:
    """PEFT's `modules_to_save`: the one module of the published model in which these weights are."""
    paths = [weight.name.split(".")[:-1] for weight in whole]
    depth = next((i for i, parts in enumerate(zip(*paths, strict=False)) if len(set(parts)) > 1), min(map(len, paths), default=0))
    return [".".join(paths[0][:depth])] if paths else []


def target_modules(modules: Sequence[Module], weights: Sequence[Weight]) -> list[str] | str:
    """PEFT's `target_modules`: endings of names, or, as a tower's modules end alike, one regular expression for whole names."""
    if all(weight.leaf[0] != "vision" for weight in weights):
        return [module.target for module in modules]
    return "|".join(re.escape(module.name).replace(re.escape("{layer}"), r"\d+") for module in modules)


def _leaves(tree: PyTree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, part in tree.items():
        if isinstance(part, Mapping):
            yield from _leaves(part, (*path, name))
        else:
            yield (*path, name)


def patterns(modules: Sequence[Module], config: LoRAConfig) -> dict[str, dict[str, float]]:
    """PEFT's `rank_pattern` and `alpha_pattern` for modules whose rank is a multiple of `config.r`."""
    several = {module.target: len(module.weights) for module in modules if len(module.weights) > 1}
    alpha = {target: config.lora_alpha * (math.sqrt(k) if config.use_rslora else k) for target, k in several.items()}
    return {"rank_pattern": {target: k * config.r for target, k in several.items()}, "alpha_pattern": alpha}


def pack(
    module: Module, a: Sequence[Float[np.ndarray, "in r"]], b: Sequence[Float[np.ndarray, "r out"]]
) -> tuple[Float[np.ndarray, "R in"], Float[np.ndarray, "total R"]]:
    """PEFT's A and B of one layer, given the factors of each weight of the module."""
    if not module.fused:
        return a[0].T, b[0].T
    rows = [_spread(factor, weight.part) for factor, weight in zip(b, module.weights, strict=True) if weight.part is not None]
    return np.concatenate([factor.T for factor in a]), np.concatenate(rows).T


def unpack(
    module: Module, a: Float[np.ndarray, "R in"], b: Float[np.ndarray, "total R"], rank: int
) -> list[tuple[Float[np.ndarray, "in r"], Float[np.ndarray, "r out"]]]:
    """The factors of each weight of the module, given PEFT's of one layer; the inverse of `pack`.

    Raises:
        ValueError: the matrices adapt outputs that are not adapted in ours, or mix outputs in a way that ours cannot have.
    """
    if not module.fused:
        return [(a.T, b.T)]
    k, found = len(module.weights), []
    together = len(a) == rank and k == module.count > 1  # made by PEFT: one A for all
    for i, weight in enumerate(module.weights):
        assert weight.part is not None
        mine = slice(None) if together else slice(i * rank, (i + 1) * rank)
        rows = b[:, mine].T
        own = _take(rows, weight.part)
        if not together and not np.array_equal(_spread(own, weight.part), rows):
            raise ValueError(f"adapts more outputs than {'.'.join(weight.leaf[1:-1])}")
        found.append((a[mine].T, own))
    return found


def _spread(b: Float[np.ndarray, "r out"], part: Part | None) -> Float[np.ndarray, "r total"]:
    """Columns of one part among those of the whole module, which are zero elsewhere."""
    assert part is not None
    r = len(b)
    whole = np.zeros((r, part.heads, part.count, b.shape[1] // part.heads), b.dtype)
    whole[:, :, part.index] = b.reshape(r, part.heads, -1)
    return whole.reshape(r, -1)


def _take(rows: Float[np.ndarray, "r total"], part: Part) -> Float[np.ndarray, "r out"]:
    r = len(rows)
    return rows.reshape(r, part.heads, part.count, -1)[:, :, part.index].reshape(r, -1)


def _at(tree: Any, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree.get(name) if tree is not None else None
    return tree
