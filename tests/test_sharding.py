"""Where every leaf of every family lives, and which meshes and batches fit together."""

from __future__ import annotations

import dataclasses
import itertools
import re

import jax
import numpy as np
import pytest
import yaml
from jax.sharding import AbstractMesh
from stand_in_devices import StandIn, TPUStandIn
from tiny_families import CASES, Tiny

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.config import ConfigError, LoRAConfig, MeshConfig, OptimizerConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.sharding import AXES, check_batches, make_mesh, parameter_spec, shardings
from pe_rlhf_jax.training.optimizer import make_optimizer

MESH = AbstractMesh((1, 2, 2), AXES)


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


# Layers are stacked in front. Of an adapter, `a` is split as its matrix's inputs are and `b` as its outputs; the rank is whole.
EXACT = {
    "params/embed": ("tensor", "fsdp"),
    "params/lm_head": ("tensor", "fsdp"),
    "params/layers/attention/q_proj/kernel": (None, "fsdp", "tensor"),
    "lora/layers/attention/q_proj/a": (None, "fsdp", None),
    "lora/layers/attention/q_proj/b": (None, None, "tensor"),
    "params/layers/attention/o_proj/kernel": (None, "tensor", "fsdp"),
    "lora/layers/attention/o_proj/a": (None, "tensor", None),
    "lora/layers/attention/o_proj/b": (None, None, "fsdp"),
    "params/layers/mlp/up_proj/kernel": (None, "fsdp", "tensor"),
    "lora/layers/mlp/up_proj/a": (None, "fsdp", None),
    "lora/layers/mlp/up_proj/b": (None, None, "tensor"),
    "params/layers/mlp/down_proj/kernel": (None, "tensor", "fsdp"),
    "lora/layers/mlp/down_proj/a": (None, "tensor", None),
    "lora/layers/mlp/down_proj/b": (None, None, "fsdp"),
}


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_adapters_and_adams_moments_follow_their_matrix(tuning):
    architecture = dataclasses.replace(Tiny("llama").architecture, vocab_size=32)
    tree = jax.eval_shape(Decoder(architecture, LoRAConfig(r=2))._init, jax.random.key(0))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), 1, tuning)
    places = {"": tree, "moments": jax.eval_shape(optimizer.init, tree)}
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(place.spec)
        for path, place in jax.tree_util.tree_leaves_with_path(shardings(places, MESH))
    }
    for name, expected in EXACT.items():
        assert found["/" + name] == expected, name
        if name.startswith("lora" if tuning == "lora" else "params"):
            moments = [path for path in found if path.startswith("moments/") and path.endswith("/" + name)]
            assert len(moments) == 2, (name, moments)  # mu and nu
            assert {found[path] for path in moments} == {expected}, name


@pytest.mark.parametrize(
    ("axes", "count", "expected"),
    [
        ({}, 1, (1, 1, 1)),
        ({}, 8, (8, 1, 1)),
        ({"tensor": 4}, 8, (2, 1, 4)),
        ({"fsdp": 2, "tensor": 4}, 8, (1, 2, 4)),
        ({"data": 2, "fsdp": -1}, 12, (2, 6, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 4}, 16, (1, 4, 4)),
        ({"data": 2, "fsdp": 2, "tensor": -1}, 8, (2, 2, 2)),
        ({"data": 2, "fsdp": 3, "tensor": 2}, 12, (2, 3, 2)),
    ],
)
def test_a_free_axis_takes_what_the_others_leave(axes, count, expected):
    mesh = make_mesh(MeshConfig(**axes), [StandIn(i) for i in range(count)])
    assert mesh.axis_names == AXES and mesh.axis_sizes == expected


@pytest.mark.parametrize(
    ("axes", "count", "expected"),
    [
        (
            {"fsdp": 3},
            8,
            "mesh: the given axes take 3 devices, which does not divide the 8 that are present; let them take one of 1, 2, 4, 8",
        ),
        ({"fsdp": 2, "tensor": 8}, 8, "mesh: the given axes take 16 devices, which does not divide the 8 .* take one of 1, 2, 4, 8"),
        (
            {"data": 2, "fsdp": 1, "tensor": 2},
            6,
            "mesh: data 2, fsdp 1, tensor 2 makes 4 devices, but 6 are present; set one axis to -1 and let the others together "
            "take one of 1, 2, 3, 6",
        ),
        ({"data": 4, "fsdp": 4, "tensor": 1}, 8, "makes 16 devices, but 8 are present; .* take one of 1, 2, 4, 8"),
    ],
)
def test_a_mesh_that_does_not_fit_names_what_would(axes, count, expected):
    with pytest.raises(ConfigError, match=f"^.*{expected}$"):
        make_mesh(MeshConfig(**axes), [StandIn(i) for i in range(count)])


def torus(x: int, y: int, z: int, slice_index: int = 0) -> list[TPUStandIn]:
    places = itertools.product(range(x), range(y), range(z))
    return [TPUStandIn(number, coords=place, slice_index=slice_index) for number, place in enumerate(places)]


def test_axes_that_do_not_suit_the_torus_split_one_of_its_dimensions():
    """No subset of 8, 8 and 16 makes 256."""
    devices = torus(8, 8, 16)
    mesh = make_mesh(MeshConfig(data=-1, fsdp=256), devices)
    assert mesh.devices.shape == (4, 256, 1)
    assert {device.id for device in mesh.devices.ravel()} == set(range(1024))


def test_several_slices_are_refused():
    with pytest.raises(ConfigError, match="belong to 2 TPU slices"):
        make_mesh(MeshConfig(data=-1), [*torus(2, 2, 1), *torus(2, 2, 1, slice_index=1)])


@pytest.mark.parametrize(
    ("sections", "field", "multiple"),
    [
        ({"sft": {"batch_size": 12}}, "sft.batch_size 12", 8),
        ({"sft": {"batch_size": 48, "micro_batch_size": 12}}, "sft.micro_batch_size 12", 8),
        ({"reward": {"batch_size": 20}}, "reward.batch_size 20", 8),
        ({"reward": {"batch_size": 24, "micro_batch_size": 6}}, "reward.micro_batch_size 6", 4),  # pairs: two rows each
        ({"reward": {"batch_size": 24, "micro_batch_size": 12}, "data": {"packing": True}}, "reward.micro_batch_size 12", 8),  # but packed
        ({"reward": {"kind": "labels", "batch_size": 24, "micro_batch_size": 12}}, "reward.micro_batch_size 12", 8),
        ({"rl": {"batch_size": 20, "num_mini_batches": 1}}, "rl.batch_size 20", 8),
        ({"rl": {"batch_size": 16, "num_mini_batches": 4}}, "rl.batch_size / rl.num_mini_batches 4", 8),
        ({"rl": {"batch_size": 48, "num_mini_batches": 1, "micro_batch_size": 12}}, "rl.micro_batch_size 12", 8),
        ({"rl": {"batch_size": 32, "sampling": {"max_num_seqs": 12}}}, "rl.sampling.max_num_seqs 12", 8),
        ({"evaluate": {"batch_size": 20}}, "evaluate.batch_size 20", 8),
    ],
)
def test_a_batch_that_does_not_fit_names_one_that_does(sections, field, multiple):
    config = configuration.parse(
        yaml.safe_dump({"model": {"source": "unused"}, "run": {"stages": [*sections.keys() - {"data"}]}, **sections})
    )
    with pytest.raises(ConfigError) as caught:
        check_batches(config, AbstractMesh((2, 4, 1), AXES))
    found = re.fullmatch(
        rf"{re.escape(field)} must be a multiple of {multiple}, for the 8 devices along mesh axes data and fsdp: (\d+) is one; "
        "or let mesh.tensor take some of the devices",
        str(caught.value),
    )
    assert found, caught.value
    assert int(found[1]) % multiple == 0 and 0 < int(found[1]) - int(field.split()[-1]) < multiple
    check_batches(config, AbstractMesh((1, 1, 8), AXES))


def test_pairs_over_an_odd_number_of_devices():
    """Three pairs are six rows, two for each of three devices; two pairs are four, which do not divide."""
    text = "{{model: {{source: unused}}, run: {{stages: [reward]}}, reward: {{batch_size: 6, micro_batch_size: {}}}}}"
    check_batches(configuration.parse(text.format(3)), AbstractMesh((3, 1, 1), AXES))
    with pytest.raises(ConfigError, match="must be a multiple of 3"):
        check_batches(configuration.parse(text.format(2)), AbstractMesh((3, 1, 1), AXES))
