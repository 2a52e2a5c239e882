"""Sampling of several responses to each prompt: the prompt read once for all of them, beside once for each.

    python benchmarks/group_sampling.py [--prompts 1] [--responses 8] [--prompt 256] [--answer 32] [--rows N] [--turns 5]

Weights are random, in the shape of SmolLM2-135M (`--model-config` takes another `config.json`), without adapters; no response ends
before `--answer` tokens. Both ways draw from the same keys. They take turns, so that other work on the machine meets both, and the ratio
is taken within each turn. With `--rows`, so many responses are sampled at once (`sampling.max_num_seqs`). Prints one line of JSON:

    seconds   once and each, in each turn
    ratio     each over once: median, least and greatest of the turns
    processor the same ratio of the seconds that a processor worked on it, which other work lengthens less; for a CPU
    flops     the same ratio by formula, as `pe-rlhf plan` counts
    memory    MiB of temporaries, once and each, as the compiler reports them
    differ    samples that are not the same both ways: prompts are summed in another order, which may turn a near tie
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from shared_prefix import SHAPE, seconds, spread

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.types import PromptBatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-config", type=Path, default=SHAPE, help="Hugging Face's config.json of the shape")
    parser.add_argument("--prompts", type=int, default=1, help="different ones")
    parser.add_argument("--responses", type=int, default=8, help="to each prompt")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--answer", type=int, default=32, help="tokens of each response")
    parser.add_argument("--rows", type=int, help="responses at once; all by default")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a quick look")
    a = parser.parse_args()
    config = configuration.parse("model: {source: none}")
    shape = architecture(config.model, a.model_config)
    shape = dataclasses.replace(shape, num_layers=a.layers or shape.num_layers)
    dtype = jnp.dtype(config.model.dtype_on(jax.default_backend()))
    decoder = Decoder(shape, dtype=dtype, param_dtype=dtype)
    variables = {"params": jax.jit(decoder.init_params)(jax.random.key(0))}
    asked = np.random.default_rng(0).integers(0, shape.vocab_size, (a.prompts, a.prompt))
    tokens = jnp.asarray(np.repeat(asked, a.responses, axis=0), jnp.int32)
    prompts = PromptBatch(tokens, jnp.ones(tokens.shape, bool))
    sampling = config.rl.sampling.model_copy(update={"max_new_tokens": a.answer, "max_num_seqs": a.rows})

    def compiled(answers: int) -> Any:
        sampler = Sampler(decoder, sampling, (), 0, answers)
        return jax.jit(lambda *arguments: generate(sampler, *arguments)).lower(variables, prompts, jax.random.key(0)).compile()

    programs = [compiled(a.responses), compiled(1)]

    one, other = jax.block_until_ready([program(variables, prompts, jax.random.key(0)) for program in programs])
    turns = [[seconds(program, variables, prompts, jax.random.key(turn)) for program in programs] for turn in range(a.turns)]
    costs, rows = Costs(config, shape), len(tokens)
    once, each = (costs.generate(rows, a.prompt, a.answer, answers) for answers in (a.responses, 1))
    result = {
        "device": jax.devices()[0].device_kind,
        "seconds": [[round(x, 3) for x, _ in turn] for turn in turns],
        "ratio": spread([each / once for (once, _), (each, _) in turns]),
        "processor": spread([each / once for (_, once), (_, each) in turns]),
        "flops": round(each / once, 3),
        "memory": [round(program.memory_analysis().temp_size_in_bytes / 2**20) for program in programs],
        "differ": int(jnp.sum(jnp.any(one.response != other.response, axis=1))),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
