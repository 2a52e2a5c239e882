"""The same tiny models in transformers and torch."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from tiny_families import Tiny

from pe_rlhf_jax.checkpoint.weights import grouped


def torch_model(tiny: Tiny, auto=None):
    """The case as transformers builds it, with the case's tensors; every tensor must have its place."""
    config = transformers.AutoConfig.for_model(**tiny.config)
    config._attn_implementation = "eager"  # the only one that has soft caps
    model = (auto or transformers.AutoModelForCausalLM).from_config(config).eval()
    names = {tiny.family.canonical(name): name for name in model.state_dict() if not name.startswith("score")}
    if auto is None and tiny.architecture.tie_word_embeddings:
        head = next(name for name in names if name.startswith(("lm_head", "embed_out")))
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        del names[head]
    given = {names[name]: torch.tensor(tensor) for name, tensor in tiny.tensors.items() if name in names}
    assert set(given) == set(names.values())
    if auto is None:
        assert set(names) == set(tiny.tensors)
    model.load_state_dict(given, strict=False)
    return model


def torch_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def torch_loss_gradients(tiny: Tiny, model, tokens) -> dict[str, np.ndarray]:
    """Gradients of the mean loss, per leaf of ours."""
    tokens = torch.tensor(tokens)
    logits = model(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1)).backward()
    found = {tiny.family.canonical(name): p.grad.numpy() for name, p in model.named_parameters()}
    gradients = {}
    for weights in grouped(tiny.family.weights(tiny.architecture)):
        for weight in weights:
            layers = [weight.take(found[name]) for name in weight.names(tiny.architecture.num_layers)]
            gradients["/".join(weight.leaf)] = np.stack(layers) if weight.per_layer else layers[0]
    return gradients
