"""Steps of tunix's own PPO learner, JAX: one line of JSON.

    python3 -m venv VENV && VENV/bin/pip install -r benchmarks/peers/requirements-tunix.txt
    VENV/bin/python benchmarks/peers/tunix_steps.py --what ppo_function [--steps 3] [--dtype bfloat16] [--rows 32] ...

tunix trains no reward model and has no RLOO. How its PPO differs from ours:

- Policy and reference are one backbone, the value model has one of its own (ours: all share one). Each has an optimizer of its own, as
  in ours. Ours are updated once a batch, so the value model's values are those of the pass in which it learns; tunix makes a pass before.
- The value model is made by tunix's `create_critic_model` of an untied Llama, since it replaces `lm_head`, and takes and ignores an
  argument that tunix's Llama does not know and its scoring passes. Its head would stay as it is beside adapters; it is declared one.
- It makes a pass for the old log-probabilities; ours are those of sampling in float32, in which they are the same.
- tunix's Llama has no field for its dtype: it computes in that of its weights. In bfloat16, qwix makes the adapters bfloat16 as well, so
  AdamW's moments are; the value model's head is float32. Ours has adapters, heads and moments in float32.
- Rotary embeddings are not scaled to longer contexts.
- Sampling makes one decode step more than there are tokens, and the same random numbers at every step. Layers are not scanned.
- Nothing is recomputed in the backward pass; `RematConfig.DECODER` fails in tunix's sampler ("Cannot mutate Param from a different trace
  level").
- The reward array has the integer type of tokens, so rewards are cut to whole numbers; the work is the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
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


def backbone(w: work.Work, mesh: jax.sharding.Mesh, tied: bool) -> Llama:
    """With random weights; tunix's own has layers of zeros. Roles share it only if it lies on their mesh before it has an adapter."""
    shape = w.shape
    config = llama.ModelConfig(
        num_layers=shape["num_hidden_layers"],
        vocab_size=shape["vocab_size"],
        embed_dim=shape["hidden_size"],
        hidden_dim=shape["intermediate_size"],
        num_heads=shape["num_attention_heads"],
        head_dim=w.head_dim,
        num_kv_heads=shape["num_key_value_heads"],
        rope_theta=int(shape["rope_theta"]),
        norm_eps=shape["rms_norm_eps"],
        weight_tying=tied,
    )
    model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))
    draw, dtype = nnx.Rngs(0), jnp.dtype(w.dtype)

    def weight(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.ones(x.shape, dtype) if x.ndim == 1 else 0.02 * jax.random.normal(draw(), x.shape, dtype)

    nnx.update(model, jax.tree.map(weight, nnx.state(model, nnx.Param)))
    return reshard.reshard_model_to_mesh(model, mesh)


def adapted(w: work.Work, model: Llama) -> Any:
    provider = qwix.LoraProvider(module_path=f".*({'|'.join(w.linear)})", rank=work.RANK, alpha=work.ALPHA)
    return qwix.apply_lora_to_model(model, provider, rngs=nnx.Rngs(0), **model.get_model_input())


def value_model(w: work.Work, mesh: jax.sharding.Mesh) -> Any:
    model = adapted(w, utils.create_critic_model(backbone(w, mesh, tied=False)))
    model.lm_head.kernel = nnx.LoRAParam(model.lm_head.kernel[...])
    return model


def trained(model: Any) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


def ppo(w: work.Work) -> work.Done:
    if w.recompute:
        raise SystemExit("tunix does not sample from a model that recomputes; leave --recompute out")
    mesh, role = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp")), rl_cluster.Role
    endless = 10**6
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(work.LEARNING_RATE, weight_decay=0.0),
        critic_optimizer=optax.adamw(work.LEARNING_RATE, weight_decay=0.0),
        eval_every_n_steps=endless,
        max_steps=endless,
        mini_batch_size=w.rows,
        train_micro_batch_size=w.micro_batch or w.rows,
        rollout_micro_batch_size=w.rows,  # else it samples no more rows at a time than it learns from
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=w.response,
        max_prompt_length=w.prompt,
        kv_cache_size=w.prompt + w.response,
        temperature=1.0,
    )
    generated = 0

    def score(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        nonlocal generated
        generated += sum(len(text.split()) for text in completions)
        return work.reward(prompts, completions)

    with mesh:
        reference = backbone(w, mesh, tied=w.shape["tie_word_embeddings"])
        actor, critic = adapted(w, reference), value_model(w, mesh)
        clock = work.Clock(lambda: jax.block_until_ready([nnx.state(model, nnx.LoRAParam) for model in (actor, critic)]))
        cluster = rl_cluster.RLCluster(
            actor=actor,
            critic=critic,
            reference=reference,
            tokenizer=w.tokenizer(),
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
            prompts = np.array(work.texts(w.prompts()))
            for _ in range(w.total):
                clock.start()
                yield {"prompts": prompts}
                clock.stop()

        learner.train(batches())
    updates = {trainer.train_steps for trainer in (cluster.actor_trainer, cluster.critic_trainer)}
    assert len(updates) == 1, f"updates of policy and value model: {updates}"
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    numbers, note = trained(actor) + trained(critic), "policy and value on two backbones"
    return work.Done(clock.steps, numbers, updates.pop(), device.device_kind, peak, generated, note)


if __name__ == "__main__":
    work.main("tunix", "google-tunix", {"ppo_function": ppo})
