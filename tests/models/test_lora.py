"""Adapters: where they sit, how they start, and that they can be left out, merged and taken out again."""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.lora import Linear, merge

TOKENS = np.array([[3, 14, 15, 9, 2, 6, 5]])
MASK = np.ones_like(TOKENS, bool)


@functools.lru_cache
def compiled(decoder: Decoder):
    return jax.jit(lambda variables: decoder.apply(variables, TOKENS, MASK)[0])


def hidden(decoder: Decoder, variables):
    return compiled(decoder)(variables)


@pytest.fixture(scope="module")
def fresh(tiny):
    return tiny.decoder.init_lora(jax.random.key(7))


def targeted(decoder: Decoder) -> set[str]:
    lora = jax.eval_shape(lambda key: decoder._init(key).get("lora", {}), jax.random.key(0))
    return {f"{block}.{name}" for block, names in lora.get("layers", {}).items() for name in names}


ATTENTION = {"attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj"}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention", ATTENTION),
        ("all-linear", ATTENTION | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        (r".*\.[qv]_proj", {"attention.q_proj", "attention.v_proj"}),
        (r"mlp\.up", set()),  # must match the whole name
    ],
)
def test_presets_and_patterns_choose_modules(tiny, target, expected):
    assert targeted(Decoder(tiny.config, LoRAConfig(target_modules=target))) == expected


def test_without_configuration_there_is_no_adapter(tiny):
    assert targeted(Decoder(tiny.config)) == set()


def test_a_text_model_has_no_projector_to_train(tiny):
    with pytest.raises(ValueError, match="a model for text has no projector to train"):
        Decoder(tiny.config, LoRAConfig(modules_to_save=("projector",))).init_lora(jax.random.key(0))


@pytest.mark.parametrize("lora", [None, LoRAConfig(target_modules="q_proj")])
def test_an_adapter_that_fits_nothing_is_an_error(tiny, lora):
    with pytest.raises(ValueError, match=r"fits no module.*attention\.q_proj.*mlp\.down_proj"):
        Decoder(tiny.config, lora).init_lora(jax.random.key(0))


def test_one_layer_by_hand():
    """x = [1, 2], W = [[1], [10]], A = [[1], [1]], B = [[0.5]]: y = 21 + scale * 3 * 0.5."""
    variables = {"params": {"kernel": jnp.array([[1.0], [10.0]])}, "lora": {"a": jnp.ones((2, 1)), "b": jnp.full((1, 1), 0.5)}}
    for config, scale in [(LoRAConfig(r=1, lora_alpha=4.0), 4.0), (LoRAConfig(r=4, lora_alpha=4.0), 1.0)]:
        layer = Linear(1, config, jnp.float32, jnp.float32)
        np.testing.assert_allclose(layer.apply(variables, jnp.array([1.0, 2.0])), [21 + 1.5 * scale])
    rslora = LoRAConfig(r=4, lora_alpha=4.0, use_rslora=True)
    np.testing.assert_allclose(Linear(1, rslora, jnp.float32, jnp.float32).apply(variables, jnp.array([1.0, 2.0])), [21 + 1.5 * 2])
    np.testing.assert_allclose(merge(variables["params"], variables["lora"], rslora)["kernel"], [[1 + 1.0], [10 + 1.0]])


def test_without_the_collection_the_decoder_is_the_base_to_the_bit(tiny):
    plain = Decoder(tiny.config, None)
    base = hidden(plain, {"params": tiny.params})
    np.testing.assert_array_equal(hidden(tiny.decoder, {"params": tiny.params}), base)
    assert np.abs(hidden(tiny.decoder, tiny.variables) - base).max() > 0.1


def test_a_fresh_adapter_is_the_base_to_the_bit(tiny, fresh):
    base = hidden(tiny.decoder, {"params": tiny.params})
    np.testing.assert_array_equal(hidden(tiny.decoder, {"params": tiny.params, "lora": fresh}), base)


def test_a_fresh_adapter_is_uniform_and_zero(fresh):
    """A within +-1/sqrt(d_in) and filling that range, every layer and module its own; B zero."""
    lora = fresh["layers"]
    first_rows, all_scaled = [], []
    for block, name, d_in in [("attention", "q_proj", 16), ("attention", "k_proj", 16), ("mlp", "up_proj", 16), ("mlp", "down_proj", 24)]:
        a, b = np.asarray(lora[block][name]["a"]), np.asarray(lora[block][name]["b"])
        assert a.shape == (2, d_in, 3) and a.dtype == b.dtype == np.float32
        scaled = a * d_in**0.5
        assert 0.9 < np.abs(scaled).max() <= 1
        assert not b.any()
        first_rows += [tuple(scaled[0, 0]), tuple(scaled[1, 0])]
        all_scaled.append(scaled.ravel())
    assert len(set(first_rows)) == len(first_rows)
    pooled = np.concatenate(all_scaled)  # 432 draws of a uniform law: standard errors 0.028 and 0.013
    assert abs(pooled.mean()) < 0.1 and abs(pooled.std() - 3**-0.5) < 0.05


def test_a_fresh_adapter_depends_on_its_key_and_is_stored_as_told_whatever_the_backbone(tiny, fresh):
    decoder = Decoder(tiny.config, tiny.decoder.lora, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    other = decoder.init_lora(jax.random.key(8))
    assert {x.dtype for x in jax.tree.leaves(other)} == {jnp.dtype(jnp.float32)}
    narrow = tiny.decoder.lora.model_copy(update={"dtype": "bfloat16"})
    stored = dataclasses.replace(tiny.decoder, lora=narrow).init_lora(jax.random.key(8))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y.astype(jnp.bfloat16)), stored, other)
    assert {x.dtype for x in jax.tree.leaves(stored)} == {jnp.dtype(jnp.bfloat16)}
    assert not np.array_equal(other["layers"]["mlp"]["up_proj"]["a"], fresh["layers"]["mlp"]["up_proj"]["a"])


def test_dropout_acts_on_the_adapter_only_and_only_in_training(tiny):
    config = LoRAConfig(r=3, lora_alpha=6.0, lora_dropout=0.5)
    decoder = dataclasses.replace(tiny.decoder, lora=config)
    training = jax.jit(lambda v, key: decoder.apply(v, TOKENS, MASK, deterministic=False, rngs={"dropout": key})[0])
    base, adapted = hidden(tiny.decoder, {"params": tiny.params}), hidden(tiny.decoder, tiny.variables)
    one, again, other = (training(tiny.variables, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(hidden(decoder, tiny.variables), adapted)
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - adapted).max() > 0.01 and np.abs(one - other).max() > 0.01
    np.testing.assert_array_equal(training({"params": tiny.params}, jax.random.key(0)), base)


def test_dropout_keeps_the_mean():
    """Kept inputs are scaled by 1 / (1 - p): over many rows the adapter's output has the same mean, within 5 standard errors."""
    layer = Linear(1, LoRAConfig(r=1, lora_alpha=1.0, lora_dropout=0.25), jnp.float32, jnp.float32)
    variables = {"params": {"kernel": jnp.zeros((4, 1))}, "lora": {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 1))}}
    out = layer.apply(variables, jnp.ones((4000, 4)), deterministic=False, rngs={"dropout": jax.random.key(0)})
    assert abs(out.mean() - 4) < 5 * out.std() / 4000**0.5
    assert set(np.round(np.unique(out) * 0.75).astype(int)) == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("name", ["tiny", "untied"])
def test_merged_weights_act_like_the_adapter(name, request):
    model = request.getfixturevalue(name)
    merged = merge(model.params, model.lora, model.decoder.lora)
    np.testing.assert_allclose(hidden(model.decoder, {"params": merged}), hidden(model.decoder, model.variables), atol=2e-5)
    changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), merged, model.params)
    paths = {jax.tree_util.keystr(p, simple=True, separator="."): c for p, c in jax.tree_util.tree_leaves_with_path(changed)}
    targets = {f"layers.{module}.kernel" for module in targeted(model.decoder)}
    assert {path for path, differs in paths.items() if differs} == targets


def test_unmerging_gives_the_weights_back_to_rounding(tiny):
    merged = merge(tiny.params, tiny.lora, tiny.decoder.lora)
    back = merge(merged, tiny.lora, tiny.decoder.lora, sign=-1)
    # Two roundings of numbers below 4: at most 2 * 2^-23 * 4 / 2.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=5e-7, rtol=0), back, tiny.params)


def test_merging_keeps_the_stored_dtype_and_an_empty_adapter_changes_no_bit(tiny):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.params)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if jax.tree_util.keystr(path).endswith("['b']") else x, tiny.lora
    )
    for tree in (params, tiny.params):
        jax.tree.map(np.testing.assert_array_equal, merge(tree, zero, tiny.decoder.lora), tree)
    assert {x.dtype for x in jax.tree.leaves(merge(params, tiny.lora, tiny.decoder.lora))} == {jnp.dtype(jnp.bfloat16)}


def test_modules_named_in_errors_are_the_decoders(tiny):
    from pe_rlhf_jax.models.lora import MODULES, PRESET_PATTERNS

    assert set(MODULES) == targeted(tiny.decoder)
    assert all(re.fullmatch(PRESET_PATTERNS["all-linear"], module) for module in MODULES)
