"""Which matrices a chip has whole, read off programs that were compiled for eight devices, in a process of its own."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
from processes import same_on_eight_devices

from pe_rlhf_jax.models.quantization import QuantizedMatrix
from pe_rlhf_jax.plan.compiled import kept_whole

WHOLE = P()
SCRIPT = """
import sys
sys.path.insert(0, {tests!r})

import dataclasses
import tiny_decoder
import jax

jax.config.update("jax_disable_most_optimizations", True)  # what is gathered is decided before them

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.plan.plan import plan
from pe_rlhf_jax.plan.topology import describe

TEXT = '''
model: {{source: unused, dtype: float32}}
lora: {{r: 2}}
data: {{max_prompt_length: 8, max_response_length: 8, length_multiple: 8}}
run: {{stages: [sft]}}
sft: {{batch_size: 8}}
'''
# Sizes that eight divides, and that nothing else has: 8 heads of 4 are 32 of 48 hidden units, the MLP's are 80.
shape = dataclasses.replace(tiny_decoder.TINY, vocab_size=96, hidden_size=48, intermediate_size=80, num_heads=8, num_kv_heads=8)
layers = ["q_proj [48, 32]", "k_proj [48, 32]", "v_proj [48, 32]", "o_proj [32, 48]"]
layers += ["gate_proj [48, 80]", "up_proj [48, 80]", "down_proj [80, 48]"]
stacked = ["all layers' " + name.replace("[", "[2, ") for name in layers]


def whole(**axes):
    config = configuration.parse(TEXT, [f"mesh.{{axis}}={{size}}" for axis, size in (dict(data=1, fsdp=1, tensor=1) | axes).items()])
    (timed,) = plan(config, shape, describe("local")).stages[0].programs
    print(axes, timed.program.whole, file=sys.stderr)
    return set(timed.program.whole)


gathered = whole(fsdp=8)
assert not any("kept whole" in name for name in gathered) and set(layers) <= gathered
kept = {{name for name in whole(data=8) if "kept whole" in name}}
assert kept == {{name + ", kept whole" for name in ["embedding [96, 48]", *stacked]}}
assert whole(tensor=8) == set()
print("same")
"""


def test_arguments_are_told_by_name_shape_and_place():
    mesh = AbstractMesh((2, 4), ("fsdp", "tensor"))

    def array(*shape: int, spec: P = WHOLE, dtype=jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    def few_bits(spec: P) -> QuantizedMatrix:
        return QuantizedMatrix(array(3, 64, 24, spec=spec, dtype=jnp.uint8), array(3, 1, 48, spec=spec), "nf4")

    layer = ("q_proj", "k_proj", "v_proj")
    matrices = {"embedding": (96, 64)} | dict.fromkeys(layer, (64, 48)) | {f"all layers' {name}": (3, 64, 48) for name in layer}
    attention = {
        "q_proj": {"kernel": few_bits(WHOLE)},
        "k_proj": {"kernel": few_bits(P(None, "fsdp", None))},
        "v_proj": {"kernel": array(3, 64, 48, spec=P(None, None, "tensor")), "bias": array(3, 48)},
        "gate_proj": {"kernel": array(3, 64, 48)},  # no matrix of this model
    }
    backbone = {"embed": array(96, 64), "lm_head": array(96, 64), "final_norm": {"scale": array(64)}, "layers": {"attention": attention}}
    adapter = {"v_proj": {"a": array(3, 64, 48), "b": array(3, 48, 48)}}  # of a matrix's shape
    found = kept_whole({"backbone": backbone, "policy": adapter}, matrices)
    assert set(found) == {"embedding [96, 64], kept whole", "lm_head [96, 64], kept whole", "all layers' q_proj [3, 64, 48], kept whole"}


def test_what_is_gathered_what_is_kept_and_what_is_shared():
    same_on_eight_devices(SCRIPT.format(tests=str(Path(__file__).parents[1])))
