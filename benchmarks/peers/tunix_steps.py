"""Steps of tunix's own PPO learner, JAX on a CPU: one line of JSON.

    python3 -m venv VENV && VENV/bin/pip install -r benchmarks/peers/requirements-tunix.txt
    VENV/bin/python benchmarks/peers/tunix_steps.py --what ppo_function [--steps 3]

tunix trains no reward model and has no RLOO. How its PPO differs from ours:

- Policy and reference are one backbone, the value model has one of its own (ours: all share one). Policy and value model are updated one
  after the other, each with an optimizer of its own.
- The value model is made by tunix's `create_critic_model` of an untied Llama, since it replaces `lm_head`, and takes and ignores an
  argument that tunix's Llama does not know and its scoring passes. Its head would stay as it is beside adapters; it is declared one.
- It makes a pass for the old log-probabilities; ours are those of sampling, as in float32 they are the same.
- Sampling makes one decode step more than there are tokens, and the same random numbers at every step. Layers are not scanned.
- Nothing is recomputed in the backward pass; `RematConfig.DECODER` fails in tunix's sampler ("Cannot mutate Param from a different trace
  level").
- The reward array has the integer type of tokens, so rewards are cut to whole numbers; the work is the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import optax
import qwix
import work
from flax import nnx
from tunix.models.llama3 import model as llama
from tunix.rl import reshard, rl_cluster, utils
from tunix.rl.ppo import ppo_learner
from tunix.rl.rollout import base_rollout


class Llama(llama.Llama3):
    """Ignores `segment_ids`, which a value model is called with."""

    def __call__(self, *arguments: Any, segment_ids: Any = None, **named: Any) -> Any:
        return super().__call__(*arguments, **named)


def backbone(mesh: jax.sharding.Mesh, tied: bool) -> Llama:
    """With random weights; tunix's own has layers of zeros. Roles share it only if it lies on their mesh before it has an adapter."""
    shape = work.SHAPE
    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=shape["hidden_size"] // shape["num_attention_heads"],
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        weight_tying=tied,
    )
    model = Llama(config, rngs=nnx.Rngs(0))
    draw = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    random = jax.tree.map(lambda x: x if x.ndim == 1 else 0.02 * jax.numpy.asarray(draw.standard_normal(x.shape, np.float32)), state)
    nnx.update(model, random)
    return reshard.reshard_model_to_mesh(model, mesh)


def adapted(model: Llama) -> Any:
    provider = qwix.LoraProvider(module_path=f".*({'|'.join(work.LINEAR)})", rank=work.RANK, alpha=work.ALPHA)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def value_model(mesh: jax.sharding.Mesh) -> Any:
    model = adapted(utils.create_critic_model(backbone(mesh, tied=False)))
    model.lm_head.kernel = nnx.LoRAParam(model.lm_head.kernel[...])
    return model


def trained(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def ppo(a: argparse.Namespace) -> work.Done:
    if a.recompute:
        raise SystemExit("tunix does not sample from a model that recomputes; leave --recompute out")
    mesh, role = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")), rl_cluster.Role
    endless = 10**6
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(work.LEARNING_RATE, weight_decay=0.0),
        critic_optimizer=optax.adamw(work.LEARNING_RATE, weight_decay=0.0),
        eval_every_n_steps=endless,
        max_steps=endless,
        mini_batch_size=work.ROWS,
        train_micro_batch_size=a.micro_batch or work.ROWS,
        rollout_micro_batch_size=work.ROWS,  # else it samples no more rows at a time than it learns from
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=work.RESPONSE,
        max_prompt_length=work.PROMPT,
        kv_cache_size=work.PROMPT + work.RESPONSE,
        temperature=1.0,
    )
    generated, clock = 0, work.Clock()

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        nonlocal generated
        generated += sum(len(text.split()) for text in completions)
        return work.reward(prompts, completions)

    with mesh:
        reference = backbone(mesh, tied=True)
        actor, critic = adapted(reference), value_model(mesh)
        cluster = rl_cluster.RLCluster(
            actor=actor,
            critic=critic,
            reference=reference,
            tokenizer=work.tokenizer(),
            cluster_config=rl_cluster.ClusterConfig(
                role_to_mesh=dict.fromkeys((role.ACTOR, role.CRITIC, role.REFERENCE, role.ROLLOUT), mesh),
                training_config=training,
                rollout_config=rollout,
            ),
        )
        learner = ppo_learner.PPOLearner(cluster, ppo_learner.PPOConfig(beta=work.KL_COEF, kl_method="kl"), reward_fns=score)
        cluster.generate = clock.part("rollout", cluster.generate)
        for name in ("get_ref_per_token_logps", "get_old_per_token_logps", "get_values"):
            setattr(cluster, name, clock.part("score", getattr(cluster, name), wait=jax.block_until_ready))

        def batches() -> Iterator[dict[str, np.ndarray]]:
            """The learner asks for the next batch when a step is done."""
            prompts = np.array(work.texts(work.rows(work.ROWS, work.PROMPT)))
            for _ in range(a.total):
                clock.start()
                yield {"prompts": prompts}
                clock.stop()

        learner.train(batches())
    updates = {trainer.train_steps for trainer in (cluster.actor_trainer, cluster.critic_trainer)}
    assert len(updates) == 1, f"updates of policy and value model: {updates}"
    return work.Done(clock.steps, trained(actor) + trained(critic), updates.pop(), generated, "policy and value on two backbones")


if __name__ == "__main__":
    work.main("tunix", "google-tunix", {"ppo_function": ppo})
