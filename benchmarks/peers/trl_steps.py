"""Steps of TRL's own trainers, PyTorch on a CPU: one line of JSON.

    python3 -m venv VENV && VENV/bin/pip install -r benchmarks/peers/requirements-trl.txt
    VENV/bin/python benchmarks/peers/trl_steps.py --what reward_lora [--steps 3] [--recompute]

1.12.0 is the last release with PPO. How its work differs from ours:

- PPO: policy and reference are one backbone, value and reward model have one each (ours: all four share one). TRL's own example tunes
  the value model fully; here it has an adapter and a head like ours. Old log-probabilities are those of sampling, as ours, but the logits
  of all steps are kept for them. Its models compute the logits of the prompt as well, and keep all hidden states. The
  gradient's norm is not clipped. Gradient checkpointing never comes on, whatever is asked: --recompute changes nothing.
- RLOO reads a prompt once for each of its responses, in sampling and for all log-probabilities; ours once for all, where that pays. It
  makes a pass for the old log-probabilities; ours are those of sampling.
- Gradient checkpointing, TRL's default, is off without --recompute: it would only take time.
- A step of PPO is timed from the end of the one before, of the others from `on_step_begin` to `on_step_end`, without reading data; ours
  with all that the stage does.
"""

from __future__ import annotations

import argparse
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


class Watch(TrainerCallback):
    """Tells the clock of the trainer's steps."""

    def __init__(self) -> None:
        self.clock, self.updates = work.Clock(), 0
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
        return work.Done(self.clock.steps, trained, self.updates, generated, note)


def policy() -> Any:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**work.SHAPE), dtype=torch.float32)


def scorer() -> Any:
    """A backbone with a score head."""
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(**work.SHAPE, num_labels=1), dtype=torch.float32)
    model.config.pad_token_id = work.PAD
    return model


def lora(task: str) -> LoraConfig:
    return LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, lora_dropout=0.0, target_modules=list(work.LINEAR), task_type=task)


def settings(a: argparse.Namespace) -> dict[str, Any]:
    """What the trainers' configurations have in common."""
    return {
        "output_dir": tempfile.mkdtemp(),
        "use_cpu": True,
        "bf16": False,
        "max_steps": a.total,
        "gradient_checkpointing": a.recompute,
        "learning_rate": work.LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


def batches(a: argparse.Namespace, rows: int) -> dict[str, int]:
    """A batch at once, or gradients accumulated over so many at a time."""
    at_once = a.micro_batch or rows
    if rows % at_once:
        raise SystemExit(f"--micro-batch {at_once} does not divide {rows}")
    return {"per_device_train_batch_size": at_once, "gradient_accumulation_steps": rows // at_once}


def reward(a: argparse.Namespace) -> work.Done:
    watch, (chosen, rejected) = Watch(), work.pairs(a.what)
    trainer = RewardTrainer(
        model=scorer(),
        args=RewardConfig(**settings(a), **batches(a, work.PAIRS)),
        train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
        processing_class=work.tokenizer(),
        peft_config=None if a.what == "reward_full" else lora("SEQ_CLS"),
        callbacks=[watch],
    )
    trainer.train()
    return watch.done(trainer.model, note="16 rows")


def ppo(a: argparse.Namespace) -> work.Done:
    watch, generated = Watch(), 0
    config = PPOConfig(
        **settings(a),
        per_device_train_batch_size=work.ROWS,
        total_episodes=a.total * work.ROWS,
        num_ppo_epochs=1,
        num_mini_batches=1,
        num_sample_generations=0,
        response_length=work.RESPONSE,
        temperature=1.0,
        kl_coef=work.KL_COEF,
    )
    trainer = PPOTrainer(
        args=config,
        processing_class=work.tokenizer(),
        model=policy(),
        ref_model=None,
        reward_model=scorer(),
        value_model=get_peft_model(scorer(), lora("SEQ_CLS")),
        train_dataset=Dataset.from_dict({"input_ids": work.rows(work.ROWS, work.PROMPT)}),
        peft_config=lora("CAUSAL_LM"),
        callbacks=[watch],
    )

    def count(result: Any) -> Any:
        nonlocal generated
        generated += int((result[0][:, work.PROMPT :] < work.END).sum())
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


def rloo(a: argparse.Namespace) -> work.Done:
    watch, generated = Watch(), 0

    def score(completion_ids: list[list[int]], **named: Any) -> list[float]:
        nonlocal generated
        generated += sum(map(len, completion_ids))
        return work.reward(**named)

    config = RLOOConfig(
        **settings(a),
        **batches(a, work.ROWS),
        num_generations=work.GROUP,
        max_completion_length=work.RESPONSE,
        beta=work.KL_COEF,
    )
    trainer = RLOOTrainer(
        model=policy(),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": work.texts(work.rows(work.ROWS // work.GROUP, work.PROMPT))}),
        processing_class=work.tokenizer(),
        peft_config=lora("CAUSAL_LM"),
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
