"""Quantized backbones: close to the matrices they stand for, frozen, small, and the same in every place that uses them."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
from deep_backbone import BACKBONE
from jax.sharding import PartitionSpec as P
from memory import figures, size

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.quantization import QuantizedMatrix, count, product, quantize, quantize_layers
from pe_rlhf_jax.plan.programs import abstract_context
from pe_rlhf_jax.sharding import make_mesh, shardings

FORMATS = ("int8", "int4", "nf4")
# QLoRA's appendix E: the quantiles of a normal distribution, with a zero, as bitsandbytes has them.
NF4_BELOW = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.09105)
NF4 = np.array((*NF4_BELOW, 0.0, 0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.562617, 0.7229568, 1.0))


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("how", FORMATS)
def test_each_weight_is_stored_as_the_nearest_value_of_its_block(how):
    kernel = normal(128, 24)
    stored = quantize(jnp.asarray(kernel), how)
    assert stored.shape == kernel.shape and stored.values.dtype.itemsize == 1
    assert stored.values.size == kernel.size // (1 if how == "int8" else 2)
    blocks = kernel.astype(np.float64).reshape(1 if how == "int8" else 2, -1, 24)
    largest = np.abs(blocks).max(axis=1)
    # Integers reach half a step beyond the last one, so that all of them are used.
    top, values = {"int8": (127.5, np.arange(-128, 128)), "int4": (7.5, np.arange(-8, 8)), "nf4": (1.0, NF4)}[how]
    np.testing.assert_allclose(stored.scale, largest / top, rtol=1e-6)
    scale = (largest / top)[:, None]
    nearest = np.abs(values * scale[..., None] - blocks[..., None]).min(axis=-1)
    found = np.abs(np.asarray(stored.expand(jnp.float32), np.float64).reshape(blocks.shape) - blocks)
    np.testing.assert_allclose(found, nearest, rtol=0, atol=1e-5)


@pytest.mark.parametrize("how", FORMATS)
def test_matrices_are_expanded_as_qwix_does_it(how):
    stored = jax.vmap(functools.partial(quantize, how=how))(jnp.asarray(normal(2, 128, 24)))
    values = stored.values
    if how != "int8":
        values = jax.lax.bitcast_convert_type(values, jnp.int4 if how == "int4" else jnp.uint4).reshape(2, 128, 24)
    expected = [qwix.dequantize(qwix.QArray(*parts, qtype=how)) for parts in zip(values, stored.scale, strict=True)]
    np.testing.assert_array_equal(stored.expand(jnp.float32), expected)


def test_more_bits_are_closer_and_nf4_beats_int4_on_normal_weights():
    kernel = jnp.asarray(normal(256, 64))
    error = {how: float(jnp.sqrt(jnp.mean((quantize(kernel, how).expand(jnp.float32) - kernel) ** 2))) for how in FORMATS}
    assert error["int8"] < 0.01 < error["nf4"] < error["int4"] < 0.12


def test_an_odd_number_of_inputs_has_shorter_blocks():
    assert quantize(jnp.asarray(normal(96, 8)), "nf4").scale.shape == (3, 8)  # 32 a block
    with pytest.raises(ValueError, match="even number of outputs, found one of 64 x 7; use int8"):
        quantize(jnp.asarray(normal(64, 7)), "int4")


@pytest.mark.parametrize("how", FORMATS)
def test_product_and_its_gradient_are_those_of_the_expanded_matrix(how):
    kernel, x = quantize(jnp.asarray(normal(64, 16)), how), jnp.asarray(normal(5, 64, seed=1))
    expanded = kernel.expand(jnp.float32)
    np.testing.assert_allclose(product(x, kernel, jnp.float32), x @ expanded, rtol=1e-6, atol=1e-6)
    gradient = jax.grad(lambda x: jnp.sum(product(x, kernel, jnp.float32) ** 2))(x)
    np.testing.assert_allclose(gradient, jax.grad(lambda x: jnp.sum((x @ expanded) ** 2))(x), rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("how", FORMATS)
def test_decoder_computes_with_the_expanded_matrices(tiny, how):
    """Adapters, gradients of adapters and frozen storage: as if the backbone had been rounded once."""
    tokens = np.array([[3, 14, 15, 9, 2, 6, 5]])
    quantized = dataclasses.replace(tiny.decoder, config=dataclasses.replace(tiny.config, quantization=how))

    def store(path, leaf):
        return quantize_layers(leaf, how) if path[-1].key == "kernel" else leaf

    params = jax.tree_util.tree_map_with_path(store, tiny.params)
    shapes = jax.eval_shape(quantized.init_params, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert count(params) == count(tiny.params)
    is_stored = lambda node: isinstance(node, QuantizedMatrix)  # noqa: E731
    rounded = jax.tree.map(lambda x: x.expand(jnp.float32) if is_stored(x) else x, params, is_leaf=is_stored)

    def run(decoder: Decoder, params):
        def loss(lora):
            hidden = decoder.apply({"params": params, "lora": lora}, tokens, np.ones_like(tokens, bool))[0]
            return jnp.sum(hidden[..., 0] ** 2), hidden

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(tiny.lora)

    found, expected = run(quantized, params), run(tiny.decoder, rounded)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5), found, expected)
    plain = run(tiny.decoder, tiny.params)
    assert float(jnp.max(jnp.abs(plain[0][1] - found[0][1]))) > 1e-3  # it is another function than the one not rounded


@pytest.mark.usefixtures("quick_compile")
@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_of_a_step_is_that_of_few_bits(remat):
    """Neither pass keeps expanded matrices of more than a layer: the residuals of a step are the stored ones."""

    def of(quantization: str) -> tuple[dict[str, int], int]:
        config = configuration.parse(
            f"model: {{source: unused, remat: {remat}, quantization: {quantization}}}\nlora: {{r: 4}}\n"
            "data: {max_prompt_length: 8, max_response_length: 8, length_multiple: 8}\nreward: {batch_size: 2}\n"
        )
        context = abstract_context(config, BACKBONE, jnp.dtype("float32"))
        return figures(context, "reward", "lora"), size(context.backbone)

    (plain, whole), (nf4, small) = of("null"), of("nf4")
    assert small < 0.16 * whole  # 4.5 bits (scales are float32 here) of 32
    assert nf4["arguments"] < plain["arguments"] - 0.8 * whole
    layer = whole / BACKBONE.num_layers
    assert nf4["temporaries"] < plain["temporaries"] + layer


def test_values_and_scales_lie_where_the_matrix_would():
    mesh = make_mesh(configuration.MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    quantized = Decoder(dataclasses.replace(BACKBONE, quantization="nf4"))
    places = shardings(jax.eval_shape(quantized.init_params, jax.random.key(0)), mesh)
    attention = places["layers"]["attention"]
    assert attention["q_proj"]["kernel"].values.spec == attention["q_proj"]["kernel"].scale.spec == P(None, "fsdp", "tensor")
    assert attention["o_proj"]["kernel"].values.spec == P(None, "tensor", "fsdp")
