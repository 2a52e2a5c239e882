"""The same tiny models that see in transformers and torch."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from tiny_vision import ANSWER, IMAGE, TinyVision

from pe_rlhf_jax.checkpoint.weights import grouped


def torch_model(tiny: TinyVision):
    """The case as transformers builds it, with the case's tensors; every tensor has its place, or is one that is not computed with."""
    import re

    config = transformers.AutoConfig.for_model(**tiny.config)
    model = transformers.AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    names = {tiny.family.canonical(name): name for name in model.state_dict()}
    ignored = tiny.family.ignorable(tiny.architecture)
    missing = {name for name in names if name not in tiny.tensors and not any(re.fullmatch(pattern, name) for pattern in ignored)}
    assert not missing and set(tiny.tensors) <= set(names), (missing, set(tiny.tensors) - set(names))
    if tiny.architecture.tie_word_embeddings:
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.load_state_dict({names[name]: torch.tensor(tensor) for name, tensor in tiny.tensors.items()}, strict=False)
    return model


def inputs(tiny: TinyVision, count: int) -> dict[str, torch.Tensor]:
    """The row with so many pictures alone, unpadded, as a processor would give it."""
    row = tiny.row(count)
    found = {"input_ids": torch.tensor(row)[None], "attention_mask": torch.ones(1, len(row), dtype=torch.long)}
    pictures = tiny.pictures()[{0: [], 1: [1], 2: [0, 1]}[count]]
    if count:
        pixels = torch.tensor(pictures).permute(0, 3, 1, 2)
        found["pixel_values"] = pixels[None] if tiny.config["model_type"] in ("idefics3", "smolvlm") else pixels
    if tiny.vision.attention == "prefix":
        found["token_type_ids"] = torch.tensor([[0] * (len(row) - ANSWER) + [1] * ANSWER])
    if tiny.vision.attention == "images":
        found["token_type_ids"] = torch.tensor(row == IMAGE)[None].long()
    return found


def torch_logits(tiny: TinyVision, model, count: int) -> np.ndarray:
    """Logits [T, V] of the row with so many pictures."""
    with torch.no_grad():
        return model(**inputs(tiny, count)).logits[0].numpy()


def torch_features(tiny: TinyVision, model) -> np.ndarray:
    """Both pictures' features after the projector, [2, F, D]."""
    pixels = inputs(tiny, 2)["pixel_values"]
    with torch.no_grad():
        found = model.get_image_features(pixels, return_dict=True).pooler_output
    found = found if isinstance(found, torch.Tensor) else torch.cat([part.reshape(-1, part.shape[-1]) for part in found])
    return found.reshape(2, tiny.vision.tokens_per_image, -1).numpy()


def torch_gradients(tiny: TinyVision, model) -> dict[str, np.ndarray]:
    """Gradients of the answer's mean loss in the row with two pictures, per leaf of ours; leaves that get none are left out."""
    model.zero_grad()
    row = inputs(tiny, 2)
    logits = model(**row).logits[0, -ANSWER - 1 : -1]
    torch.nn.functional.cross_entropy(logits, row["input_ids"][0, -ANSWER:]).backward()
    found = {tiny.family.canonical(name): p.grad.numpy() for name, p in model.named_parameters() if p.grad is not None}
    gradients = {}
    for weights in grouped(tiny.family.weights(tiny.architecture)):
        for weight in weights:
            names = weight.names(tiny.architecture.num_layers)
            if any(name in found for name in names):  # no features are taken after the last layers: zero there
                layers = [weight.take(found.get(name, np.zeros_like(tiny.tensors[name]))) for name in names]
                gradients["/".join(weight.leaf)] = np.stack(layers) if weight.per_layer else layers[0]
    return gradients
