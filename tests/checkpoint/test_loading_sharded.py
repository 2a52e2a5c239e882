"""Weights straight into their shards on eight devices, with one tensor of the file on the host at a time. In a process of its own: JAX
fixes the number of CPU devices at its start."""

from __future__ import annotations

from pathlib import Path

from processes import same_on_eight_devices

SCRIPT = """
import sys
sys.path[:0] = [{tests!r}, {tests!r} + "/checkpoint"]

import pathlib
import tempfile
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
from tiny_families import Tiny

from pe_rlhf_jax.checkpoint import assembly, weights
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.safetensors_writer import write_safetensors
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import MeshConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.sharding import make_mesh, shardings

assert jax.device_count() == 8
jax.config.update("jax_disable_most_optimizations", True)
mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))


def wanted(architecture):
    return shardings(jax.eval_shape(Decoder(architecture).init_params, jax.random.key(0)), mesh)


plains = {{}}
for name in ("gemma3", "gpt_neox", "gpt2"):
    tiny = Tiny(name)
    plain = plains[name] = load_params(tiny, tiny.family, tiny.architecture, "float32")
    split = load_params(tiny, tiny.family, tiny.architecture, "float32", wanted(tiny.architecture))
    jax.tree.map(np.testing.assert_array_equal, plain, split)
    assert jax.tree.map(lambda leaf: leaf.sharding, split) == wanted(tiny.architecture)
    assert len(split["layers"]["attention"]["q_proj"]["kernel"].sharding.device_set) == 8

# A stack of layers is larger than the largest tensor, and the whole is much larger than both. What JAX takes as it is, is the devices'
# memory; with devices that have memory of their own, the host holds one tensor.
size = {{"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12, "num_attention_heads": 4}}
big = Tiny("llama", {{"model_type": "llama", **size, "tie_word_embeddings": True}})
folder = pathlib.Path(tempfile.mkdtemp())
shapes = {{name: x.shape for name, x in big.tensors.items()}}
makers = [(name, lambda x=x: x.astype(jnp.bfloat16)) for name, x in big.tensors.items()]
write_safetensors(folder, shapes, "bfloat16", makers, 4_000_000)
(folder / "config.json").write_text('{{"model_type": "llama"}}')
tensors, big.tensors = big.tensors, {{}}


def traced(shape, dtype):
    # In place of `assembly.pages`, whose memory is not counted.
    size = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    room = np.empty(size + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + size].view(jnp.dtype(dtype)).reshape(shape)


def peak_of_loading():
    reader = SafetensorsFolder(folder)
    tracemalloc.start()
    params = load_params(reader, big.family, big.architecture, "bfloat16", wanted(big.architecture))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return params, peak


largest = 2 * 4096 * 256
stack = 2 * 12 * 256 * 512
whole = sum(2 * x.size for x in tensors.values())
assert whole > 5 * stack > 7 * largest
assembly.pages = traced
params, _ = peak_of_loading()  # the first time, Python loads modules
params, peak = peak_of_loading()
assert whole < peak < whole + 1.5 * largest, (peak, whole, largest)
weights._host_is_device = lambda: False
device_put = jax.device_put
jax.device_put = lambda x, device: jnp.copy(device_put(x, device))  # as to a memory of its own
sent, _ = peak_of_loading()  # the first time compiles
sent, peak = peak_of_loading()
jax.device_put = device_put
assert peak < 2.5 * largest, (peak, largest)  # the tensor, a part on its way, and what Python holds
jax.tree.map(np.testing.assert_array_equal, params, sent)
assert jax.tree.map(lambda leaf: leaf.sharding, sent) == wanted(big.architecture)
for name, plain in plains.items():
    tiny = Tiny(name)
    again = load_params(tiny, tiny.family, tiny.architecture, "float32", wanted(tiny.architecture))
    jax.tree.map(np.testing.assert_array_equal, again, plain)
last = tensors["model.layers.11.mlp.up_proj.weight"].T.astype(jnp.bfloat16)
np.testing.assert_array_equal(params["layers"]["mlp"]["up_proj"]["kernel"][11], last)
print("same")
"""


def test_eight_devices_hold_the_parameters_of_one():
    script = SCRIPT.format(tests=str(Path(__file__).parents[1]))
    same_on_eight_devices(script)
