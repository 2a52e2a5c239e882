"""The configurations with a shape in configs/shapes: the shape is the model of that name, and the batches fit the slice of the header."""

from __future__ import annotations

import math
import re
from pathlib import Path

import jax
import pytest
from stand_in_devices import StandIn

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.sharding import check_batches, make_mesh

FOLDER = Path(__file__).parents[1] / "configs"
# Billions of parameters, as the models' pages state them. PaliGemma: 2.5087 of Gemma 2B with 257216 tokens, 0.4124 of SigLIP, 0.0024
# of the projector.
BILLIONS = {
    "llama3_1b": 1.24,
    "gemma2_2b": 2.61,
    "paligemma_3b": 2.92,
    "llama3_8b": 8.03,
    "llama3_8b_reward": 8.03,
    "llama3_70b": 70.55,
}


def command(path: Path) -> re.Match | None:
    """The shape and the slice of the header's command."""
    return re.search(
        rf"^#   pe-rlhf plan --config configs/{path.name} --model-config configs/shapes/(\S+) --topology (v\w+:([\dx]+))$",
        path.read_text(encoding="utf-8"),
        re.MULTILINE,
    )


def test_these_are_all_configurations_with_a_shape():
    assert {path.stem for path in FOLDER.glob("*.yaml") if command(path)} == set(BILLIONS)


@pytest.mark.parametrize("name", BILLIONS)
def test_a_configuration_fits_its_model_and_its_slice(name):
    path = FOLDER / f"{name}.yaml"
    shape, topology, sides = command(path).groups()
    assert f"# Hardware: TPU {topology};" in path.read_text(encoding="utf-8")
    config = configuration.load(path)
    decoder = Decoder(architecture(config.model, FOLDER / "shapes" / shape), config.lora)
    params = jax.eval_shape(decoder.init_params, jax.random.key(0))
    assert round(sum(leaf.size for leaf in jax.tree.leaves(params)) / 1e9, 2) == BILLIONS[name]
    chips = math.prod(map(int, sides.split("x")))
    mesh = make_mesh(config.mesh, [StandIn(i) for i in range(chips)])
    assert mesh.size == chips
    check_batches(config, mesh)
