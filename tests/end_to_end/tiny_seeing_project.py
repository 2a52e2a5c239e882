"""A tiny project with pictures: a LLaVA of 20 thousand parameters in Hugging Face's layout, drawn colours, and the question which it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
from tiny_project import jsonl
from tiny_vision_folder import COLOURS, write_model

PROMPT = "<image>\nWhich colour is this ?"
PICTURES = 60


def seeing_project(folder: Path) -> dict:
    """Configuration values; rows and pictures lie in `folder`."""
    rows = []
    for number in range(PICTURES):
        colour = list(COLOURS)[number % 3]
        noise = np.random.default_rng(number).integers(-25, 26, (8, 10, 3))
        PIL.Image.fromarray((np.asarray(COLOURS[colour]) + noise).astype(np.uint8)).save(folder / f"{number}.png")
        rows.append({"prompt": PROMPT, "image": f"{number}.png", "answer": colour})
    names = list(COLOURS)
    sft = [{**row, "completion": f" {row.pop('answer')}"} for row in map(dict, rows)]
    labels = [
        {"prompt": PROMPT, "image": row["image"], "completion": f" {answer}", "label": int(answer == row["answer"])}
        for i, row in enumerate(rows)
        for answer in (row["answer"], names[(names.index(row["answer"]) + 1 + i % 2) % 3])
    ]
    files = {name: jsonl(folder / f"{name}.jsonl", rows) for name, rows in (("sft", sft), ("label", labels), ("prompts", rows))}
    rates = {"sft": 1e-2, "reward": 1e-2, "rl": 3e-3}
    return {
        "run": {"checkpoint_every": 4, "tensorboard": False, "compilation_cache": False},
        "model": {"source": str(write_model(folder / "llava")), "remat": "none"},
        "lora": {"r": 4, "lora_alpha": 8.0, "modules_to_save": ["projector"]},
        "data": {name: {"train": [file]} for name, file in files.items()}
        | {"validation_share": 0.25, "length_multiple": 16, "max_prompt_length": 32, "max_response_length": 4},
        "sft": {"steps": 20, "batch_size": 8, "evaluate_every": 6, "optimizer": {"learning_rate": rates["sft"]}},
        "reward": {"kind": "labels", "steps": 30, "batch_size": 16, "evaluate_every": 30, "optimizer": {"learning_rate": rates["reward"]}},
        "rl": {
            "steps": 60,
            "batch_size": 16,
            "num_ppo_epochs": 2,
            "num_mini_batches": 2,
            "micro_batch_size": 4,
            "kl_coef": 0.01,
            "missing_eos_penalty": -5.0,
            "sampling": {"max_new_tokens": 2},
            "optimizer": {"learning_rate": rates["rl"]},
        },
        "evaluate": {
            "prompts": 16,
            "batch_size": 8,
            "bootstrap": 100,
            "samples": 2,
            "judge": "pe_rlhf_jax.data.easy_vqa:answer_accuracy",
        },
    }
