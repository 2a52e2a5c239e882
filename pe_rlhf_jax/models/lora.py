"""Low-rank adaptation (Hu et al. 2021, arXiv 2106.09685) as a Flax collection.

A linear layer owns its frozen kernel in `params` and, where it is targeted, its factors in the collection `lora`. Applied without the
collection it is the base layer, so a reference policy costs no memory. A module that is trained whole (PEFT's `modules_to_save`) has in
the collection what is added to each of its parameters, zero at first: so that holds for it too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pe_rlhf_jax.config import LoRAConfig, Quantization
from pe_rlhf_jax.models.matmul import matmul
from pe_rlhf_jax.models.quantization import product, quantize
from pe_rlhf_jax.types import PyTree

MODULES = (*(f"attention.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
VISION = "vision."
"""Before the names of the same modules in a vision tower."""
PRESET_PATTERNS = {
    "attention": r"attention\.[qkvo]_proj",
    "all-linear": r"attention\.[qkvo]_proj|mlp\.(gate|up|down)_proj",
}


def is_target(module: str, config: LoRAConfig | None) -> bool:
    """Whether the linear layer with this name, such as `attention.q_proj`, gets an adapter."""
    if config is None:
        return False
    return re.fullmatch(PRESET_PATTERNS.get(config.target_modules, config.target_modules), module) is not None


def _uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / jnp.sqrt(jnp.asarray(shape[0], dtype))


class Linear(nn.Module):
    """y = x W + bias + scale (dropout(x) A) B. A is uniform in +-1/sqrt(d_in), B is zero, so a fresh adapter changes nothing.

    `lora` is None where this layer is not targeted. Factors are stored in `lora.dtype` and computed in `dtype`.
    """

    features: int
    lora: LoRAConfig | None
    dtype: Any
    param_dtype: Any
    use_bias: bool = False
    quantization: Quantization | None = None
    """How the kernel is stored."""
    whole: bool = False
    """See `parameter`."""

    @nn.compact
    def __call__(self, x: Float[Array, "*batch d_in"], deterministic: bool = True) -> Float[Array, "*batch d_out"]:
        d_in = x.shape[-1]
        kernel = parameter(self, "kernel", self._init_kernel, (d_in, self.features), whole=self.whole)
        y = product(x, kernel, self.dtype, self.name or "")
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, (self.features,), self.param_dtype, whole=self.whole)
            y = y + bias.astype(self.dtype)
        if self.lora is None or not (self.has_variable("lora", "a") or self.is_mutable_collection("lora")):
            return y
        r, dtype = self.lora.r, self.lora.dtype
        a = self.variable("lora", "a", lambda: _uniform_fan_in(self.make_rng("lora"), (d_in, r), jnp.float32).astype(dtype)).value
        b = self.variable("lora", "b", lambda: jnp.zeros((r, self.features), dtype)).value
        x = nn.Dropout(self.lora.lora_dropout)(x, deterministic=deterministic)
        return y + matmul(matmul(x, a.astype(self.dtype)), (b.astype(jnp.float32) * self.lora.scale).astype(self.dtype))

    def _init_kernel(self, key: jax.Array, shape: tuple[int, int]) -> PyTree:
        kernel = nn.initializers.lecun_normal()(key, shape, self.param_dtype)
        return kernel if self.quantization is None else quantize(kernel, self.quantization)


def parameter(module: nn.Module, name: str, start: Callable[..., Any], shape: tuple[int, ...], *dtype: Any, whole: bool) -> Any:
    """A parameter of a module, plus, where the module is trained whole and has one, what the adapter adds to it (float32)."""
    value = module.param(name, start, shape, *dtype)
    if not whole or not (module.has_variable("lora", name) or module.is_mutable_collection("lora")):
        return value
    return value.astype(jnp.float32) + module.variable("lora", name, lambda: jnp.zeros(shape, jnp.float32)).value


def merge(params: PyTree, lora: PyTree, config: LoRAConfig, sign: float = 1.0) -> PyTree:
    """Parameters with the adapter added to each targeted kernel, computed in float32 and stored in the kernel's dtype.

    Kernels are [..., d_in, d_out], factors [..., d_in, r] and [..., r, d_out]; what is trained whole is added as it is. `sign=-1` takes an
    adapter out again, exact to rounding.
    """
    if isinstance(lora, Mapping) and "a" in lora and "b" in lora:
        kernel = params["kernel"]
        a, b = (lora[name].astype(jnp.float32) for name in "ab")
        update = sign * config.scale * jnp.matmul(a, b, precision="highest")
        return {**params, "kernel": (kernel.astype(jnp.float32) + update).astype(kernel.dtype)}
    if not isinstance(lora, Mapping):
        return (params.astype(jnp.float32) + sign * lora).astype(params.dtype)
    return {**params, **{name: merge(params[name], lora[name], config, sign) for name in lora}}
