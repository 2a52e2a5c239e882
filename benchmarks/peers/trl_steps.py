"""Steps of TRL's own trainers, PyTorch, on a GPU where there is one: one line of JSON.

    python3 -m venv VENV && VENV/bin/pip install -r benchmarks/peers/requirements-trl.txt
    VENV/bin/python benchmarks/peers/trl_steps.py --what reward_lora [--steps 3] [--dtype bfloat16] [--rows 32] ...

1.12.0 is the last release with PPO. How its work differs from ours:

- PPO: policy and reference are one backbone, value and reward model have one each (ours: all four share one). TRL's own example tunes
  the value model fully; here it has an adapter and a head like ours. Old log-probabilities are those of sampling, as ours in float32 (in
  bfloat16, ours make a pass for them), but the logits of all steps are kept for them. Its models compute the logits of the prompt as
  well, and keep all hidden states. It makes a pass for the values; ours, updated once a batch, are those of the pass in which the value
  model learns. The gradient's norm is not clipped. Gradient checkpointing never comes on, whatever is asked:
  --recompute changes nothing.
- RLOO reads a prompt once for each of its responses, in sampling and for all log-probabilities; ours once for all, where that pays. It
  makes a pass for the old log-probabilities; ours are those of sampling in float32.
- In bfloat16, weights of backbones and heads are bfloat16, PEFT's adapters float32, and the trainers' `bf16` computes in bfloat16 by
  autocast. PPO's trainer passes that on to nobody, so accelerate is told as `accelerate launch --mixed_precision bf16` tells it; in PPO it
  covers updates, not sampling and scoring, where adapters compute in float32. accelerate casts the logits of all updates to float32.
- In float32 on a GPU, JAX multiplies in TF32 by default, PyTorch does not.
- Full tuning in bfloat16 is that of the bfloat16 weights themselves, with AdamW's moments in bfloat16 (8 bytes a number with its
  gradient); ours trains a float32 copy with float32 moments, beside the bfloat16 backbone (18 bytes).
- Gradient checkpointing, TRL's default, is off without --recompute: it would only take time.
- A step of PPO is timed from the end of the one before, of the others from `on_step_begin` to `on_step_end`, without reading data; ours
  with all that the stage does.
"""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import work
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback
from trl import RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

GPU = torch.cuda.is_available()


class Watch(TrainerCallback):
    """Tells the clock of the trainer's steps."""

    def __init__(self) -> None:
        self.clock, self.updates = work.Clock(torch.cuda.synchronize if GPU else lambda: None), 0
        register_optimizer_step_post_hook(self._updated)

    def _updated(self, *_: Any) -> None:
        self.updates += 1

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.clock.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.clock.stop()

    def done(self, model: torch.nn.Module, generated: int = 0, note: str = "") -> work.Done:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        device = (torch.cuda.get_device_name(), torch.cuda.max_memory_allocated()) if GPU else ("cpu", None)
        return work.Done(self.clock.steps, trained, self.updates, *device, generated, note)


def made(w: work.Work, kind: Any, **more: Any) -> Any:
    """A model with random weights."""
    with torch.device("cuda" if GPU else "cpu"):
        return kind.from_config(AutoConfig.for_model(**w.shape, **more), dtype=getattr(torch, w.dtype))


def policy(w: work.Work) -> Any:
    return made(w, AutoModelForCausalLM)


def scorer(w: work.Work) -> Any:
    """A backbone with a score head."""
    model = made(w, AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = w.pad
    return model


def lora(w: work.Work, task: str) -> LoraConfig:
    return LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, lora_dropout=0.0, target_modules=list(w.linear), task_type=task)


def settings(w: work.Work) -> dict[str, Any]:
    """What the trainers' configurations have in common."""
    half = w.dtype == "bfloat16"
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if half else "no"
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": not GPU,
        "bf16": half,
        "max_steps": w.total,
        "gradient_checkpointing": w.recompute,
        "learning_rate": work.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def batches(w: work.Work, rows: int) -> dict[str, int]:
    """A batch at once, or gradients accumulated over so many at a time."""
    at_once = w.micro_batch or rows
    if rows % at_once:
        raise SystemExit(f"--micro-batch {at_once} does not divide {rows}")
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": rows // at_once}


def reward(w: work.Work) -> work.Done:
    watch, (chosen, rejected) = Watch(), w.preferences()
    trainer = RewardTrainer(
        model=scorer(w),
        args=RewardConfig(**settings(w), **batches(w, w.pairs)),
        train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
        processing_class=w.tokenizer(),
        peft_config=None if w.what == "reward_full" else lora(w, "SEQ_CLS"),
        callbacks=[watch],
    )
    trainer.train()
    return watch.done(trainer.model, note=f"{2 * w.pairs} rows of {w.length}")


def ppo(w: work.Work) -> work.Done:
    watch, generated = Watch(), 0
    config = PPOConfig(
        **settings(w),
        per_device_train_batch_size=w.rows,
        total_episodes=w.total * w.rows,
        num_ppo_epochs=1,
        num_mini_batches=1,
        num_sample_generations=0,
        response_length=w.response,
        temperature=1.0,
        kl_coef=work.KL_COEF,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=w.tokenizer(),
        model=policy(w),
        ref_model=None,
        reward_model=scorer(w),
        value_model=get_peft_model(scorer(w), lora(w, "SEQ_CLS")),
        train_dataset=Dataset.from_dict({"input_ids": w.prompts()}),
        peft_config=lora(w, "CAUSAL_LM"),
        callbacks=[watch],
    )

    def count(result: Any) -> Any:
        nonlocal generated
        generated += int((result[0][:, w.prompt :] < w.end).sum())
        return result

    part = watch.clock.part
    ppo_trainer.batch_generation = part("rollout", ppo_trainer.batch_generation, wait=count)
    ppo_trainer.get_reward = part("score", ppo_trainer.get_reward)
    ppo_trainer.forward = part("score", ppo_trainer.forward, when=lambda: not torch.is_grad_enabled())
    trainer.train()
    return watch.done(
        trainer.model,
        generated,
        "value and reward model have backbones of their own; never recomputes, nor accumulates: every part is an update of its own",
    )


def rloo(w: work.Work) -> work.Done:
    watch, generated = Watch(), 0

    def score(completion_ids: list[list[int]], **named: Any) -> list[float]:
        nonlocal generated
        generated += sum(map(len, completion_ids))
        return work.reward(**named)

    config = RLOOConfig(
        **settings(w),
        **batches(w, w.rows),
        num_generations=w.group,
        max_completion_length=w.response,
        beta=work.KL_COEF,
    )
    trainer = RLOOTrainer(
        model=policy(w),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": work.texts(w.prompts())}),
        processing_class=w.tokenizer(),
        peft_config=lora(w, "CAUSAL_LM"),
        callbacks=[watch],
    )
    part = watch.clock.part
    trainer._generate = part("rollout", trainer._generate)
    trainer._generate_and_score_completions = part("score", trainer._generate_and_score_completions)
    trainer.train()
    return watch.done(trainer.model, generated, "each response has its prompt computed for it alone")


if __name__ == "__main__":
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rewards = dict.fromkeys(("reward_lora", "reward_lora_prompt", "reward_full"), reward)
    work.main("trl", "trl", {**rewards, "ppo_model": ppo, "rloo": rloo})
