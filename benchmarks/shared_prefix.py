"""A step of reward training with prompts computed once for both sides of a pair, beside the same step with a row for each side.

    python benchmarks/shared_prefix.py [--prompt 256] [--answer 64] [--pairs 2] [--turns 5] [--set model.remat=none]

The step is the stage's own, adapters on all linear layers, on random weights in the shape of SmolLM2-135M (`--model-config` takes
another `config.json`). The two forms take turns, so that other work on the machine meets both, and the ratio is taken within each turn.
Prints one line of JSON:

    seconds     of a step, one row and two rows, in each turn
    ratio       two rows over one: median, least and greatest of the turns
    flops       the same ratio by formula, as `pe-rlhf plan` counts
    compiled    and as XLA counts, which takes the body of the scan over layers once in both
    loss, norm  relative difference of the first step's loss and of its gradient's norm
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.data import PreferenceExample, pad_preferences
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.plan.architecture import architecture
from pe_rlhf_jax.plan.flops import Costs
from pe_rlhf_jax.plan.programs import abstract_context
from pe_rlhf_jax.training import reward
from pe_rlhf_jax.training.context import Context
from pe_rlhf_jax.training.optimizer import make_optimizer
from pe_rlhf_jax.training.step import make_step
from pe_rlhf_jax.types import PreferenceBatch

SHAPE = Path(__file__).parent.parent / "configs" / "shapes" / "smollm2_135m.json"


def batches(vocabulary: int, pairs: int, prompt: int, answer: int) -> tuple[PreferenceBatch, PreferenceBatch]:
    """The same random pairs in one row each, and in two."""
    rng = np.random.default_rng(0)

    def words(count: int) -> np.ndarray:
        return rng.integers(0, vocabulary, count).astype(np.int32)

    examples = []
    for _ in range(pairs):
        asked = words(prompt)
        examples.append(PreferenceExample(*(np.concatenate([asked, words(answer)]) for _ in range(2)), prompt_length=prompt))
    one, two = (pad_preferences(examples, 0, 1, in_one_row=lambda *_, one=one: one) for one in (True, False))
    return one, two


class Form:
    """One of the two, compiled."""

    def __init__(self, context: Context, batch: PreferenceBatch):
        config = context.config.reward
        self.state, self.frozen, self.batch = reward.init(context, Role()), (context.backbone, Role()), batch
        optimizer, loss = make_optimizer(config.optimizer, config.steps, config.tuning), reward._loss(context, reward.kind_of(config))
        step: Any = make_step(loss, lambda b: jnp.sum(b.weight), optimizer, config.batch_size, config.micro_batch_size)
        self.step = step.lower(self.state, self.frozen, batch, jax.random.key(0)).compile()

    def __call__(self) -> tuple[float, dict[str, float]]:
        """Seconds and metrics of a step."""
        began = time.perf_counter()
        self.state, metrics = self.step(self.state, self.frozen, self.batch, jax.random.key(0))
        found = {name: float(value) for name, value in metrics.items()}
        return time.perf_counter() - began, found

    @property
    def compiled_flops(self) -> float:
        return float(self.step.cost_analysis()["flops"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model-config", type=Path, default=SHAPE, help="Hugging Face's config.json of the shape")
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--answer", type=int, default=64, help="tokens of each side")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--layers", type=int, help="fewer than the model's, for a quick look")
    parser.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="overrides", help="override a field")
    a = parser.parse_args()
    config = configuration.parse(f"model: {{source: none}}\nreward: {{batch_size: {a.pairs}}}", a.overrides)
    shape = architecture(config.model, a.model_config)
    shape = dataclasses.replace(shape, num_layers=a.layers or shape.num_layers)
    context = abstract_context(config, shape, jnp.dtype(config.model.dtype_on(jax.default_backend())))
    context = dataclasses.replace(context, backbone=jax.jit(context.decoder.init_params)(jax.random.key(0)))
    forms = [Form(context, batch) for batch in batches(shape.vocab_size, a.pairs, a.prompt, a.answer)]
    first = [form()[1] for form in forms]
    seconds = [[form()[0] for form in forms] for _ in range(a.turns)]
    ratios = sorted(two / one for one, two in seconds)
    costs = Costs(config, shape)
    flops = [costs.update(n * a.pairs, t, 0, config.reward.tuning) for n, t in ((1, a.prompt + 2 * a.answer), (2, a.prompt + a.answer))]
    result = {
        "device": jax.devices()[0].device_kind,
        "seconds": [[round(x, 3) for x in turn] for turn in seconds],
        "ratio": [round(x, 3) for x in (float(np.median(ratios)), ratios[0], ratios[-1])],
        "flops": round(flops[1] / flops[0], 3),
        "compiled": round(forms[1].compiled_flops / forms[0].compiled_flops, 3),
        "loss": abs(first[0]["loss"] / first[1]["loss"] - 1),
        "norm": abs(first[0]["grad_norm"] / first[1]["grad_norm"] - 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
