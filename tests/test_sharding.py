"""Where every leaf of every family lives."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from tiny_families import CASES, Tiny

from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.sharding import parameter_spec

MESH = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))


def specs(architecture) -> dict[str, tuple]:
    tree = jax.eval_shape(Decoder(architecture, LoRAConfig(r=2))._init, jax.random.key(0))
    paths = [(tuple(k.key for k in path), leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]
    found = {"/".join(path): tuple(parameter_spec(path, shape, MESH)) for path, shape in paths}
    assert all(np.ndim(shape) == 1 and len(found["/".join(path)]) in (0, len(shape)) for path, shape in paths)
    return found


@pytest.mark.parametrize("name", [name for name in CASES if "-" not in name])
def test_every_matrix_is_split_both_ways_and_no_norm_is(name):
    for path, spec in specs(Tiny(name).architecture).items():
        leaf = path.split("/")[-1]
        if leaf in ("kernel", "embed", "lm_head"):
            # 37 tokens cannot be halved
            assert set(spec) - {None} == ({"fsdp"} if leaf in ("embed", "lm_head") else {"fsdp", "tensor"}), path
        elif leaf in ("a", "b", "position_embed"):
            assert len(set(spec) - {None}) == 1, path
        elif leaf == "scale" or "norm" in path:
            assert not any(spec), path
        else:
            assert leaf == "bias", path


def test_biases_lie_with_the_outputs_of_their_matrix():
    found = specs(Tiny("gpt_neox").architecture)
    for module, expected in [
        ("attention/q_proj", (None, "tensor")),
        ("mlp/up_proj", (None, "tensor")),
        ("attention/o_proj", (None, None)),
        ("mlp/down_proj", (None, None)),
    ]:
        assert found[f"params/layers/{module}/bias"] == expected
    assert specs(Tiny("gpt2").architecture)["params/position_embed"] == (None, "fsdp")
    assert found["params/layers/attention/o_proj/kernel"] == (None, "tensor", "fsdp")
    assert found["params/layers/attention/q_proj/kernel"] == (None, "fsdp", "tensor")
