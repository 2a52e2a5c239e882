"""Time and peak host memory of loading a sharded checkpoint of 1.1 billion parameters, beside transformers' own loader.

    python benchmarks/load_weights.py            # needs the extra `parity` (torch), 2.2 GB of disk and 6 GB of memory; a minute

The checkpoint is synthetic (TinyLlama's shapes, bfloat16, five shards). The loaders run by turns, each time in a process of its own, on
the CPU; peak memory is the process's own (VmHWM) less what it held before loading. After loading, the maximum of each parameter is taken,
which counts: transformers maps the files into memory and reads nothing until then. The parameters themselves are 2.05 GiB.

Processor time (user and system) is what to compare where others use the machine too. Most of ours is the system's, for fresh memory:
weights are stacked and transposed, while transformers keeps the files' pages.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "dtype": "bfloat16",
}
RUNS = 5
LOADERS = ("pe_rlhf_jax", "transformers")


def make(folder: Path) -> None:
    """The checkpoint; values repeat, as only their number matters."""
    import jax.numpy as jnp
    import numpy as np

    from pe_rlhf_jax.checkpoint.safetensors_writer import write_safetensors
    from pe_rlhf_jax.checkpoint.weights import leaf_shapes
    from pe_rlhf_jax.models.families import family_of

    family = family_of(CONFIG)
    architecture = family.config_from_hf(CONFIG)
    leaves, shapes = leaf_shapes(architecture), {}
    for weight in family.weights(architecture):
        shape = leaves[weight.leaf][1:] if weight.per_layer else leaves[weight.leaf]
        shapes |= dict.fromkeys(weight.names(architecture.num_layers), weight.file_shape(shape))
    noise = np.random.default_rng(0).standard_normal(1_000_003).astype(jnp.bfloat16) * jnp.bfloat16(0.02)
    makers = [(name, lambda shape=shape: np.resize(noise, shape)) for name, shape in shapes.items()]
    write_safetensors(folder, shapes, "bfloat16", makers, 500_000_000)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def load(loader: str, folder: Path) -> None:
    """Loads once, and prints seconds, the processor's seconds and GiB as JSON."""
    if loader == "pe_rlhf_jax":
        import jax

        from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
        from pe_rlhf_jax.checkpoint.weights import load_params
        from pe_rlhf_jax.models.families import family_of

        def loading() -> list[float]:
            reader = SafetensorsFolder(folder)
            family = family_of(reader.config)
            params = load_params(reader, family, family.config_from_hf(reader.config), "bfloat16")
            return [float(leaf.max()) for leaf in jax.tree.leaves(params)]

        jax.block_until_ready(jax.numpy.ones(()) + 1)  # the device is started
    else:
        import torch
        import transformers

        def loading() -> list[float]:
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
            return [float(parameter.max()) for parameter in model.parameters()]

    before, start, used = peak(), time.perf_counter(), sum(os.times()[:2])
    largest = loading()
    seconds, processor = time.perf_counter() - start, sum(os.times()[:2]) - used
    assert all(abs(value) < 1 for value in largest)
    print(json.dumps({"seconds": seconds, "processor": processor, "GiB": (peak() - before) / 2**20}))


def peak() -> int:
    """Peak resident memory so far, KiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--load", nargs=2, metavar=("LOADER", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        return load(arguments.load[0], Path(arguments.load[1]))
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        runs: dict[str, list[dict[str, float]]] = {loader: [] for loader in LOADERS}
        for _ in range(RUNS):
            for loader in LOADERS:
                command = [sys.executable, __file__, "--load", loader, folder]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                runs[loader].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"| loader | seconds: median of {RUNS} (best, worst) | processor seconds | peak memory, GiB |\n|---|---|---|---|")
    for loader in LOADERS:
        seconds, processor, memory = ([run[key] for run in runs[loader]] for key in ("seconds", "processor", "GiB"))
        cells = [f"{statistics.median(x):.1f} ({min(x):.1f}, {max(x):.1f})" for x in (seconds, processor)]
        print(f"| {loader} | {' | '.join(cells)} | {max(memory):.2f} |")


if __name__ == "__main__":
    main()
