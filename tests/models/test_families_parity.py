"""Every family against transformers and torch: logits and gradients of random tiny models that switch each feature on and off."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import CASES, Tiny, flat, loss, tokens

from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.models.decoder import Decoder

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore::FutureWarning"), pytest.mark.usefixtures("quick_compile")]

# Logits are of order 1 to 10 and both sides compute in float32. A feature left out moves logits by more than 1e-3, which
# `test_every_feature_matters` holds.
LOGITS = 1e-4
GRADIENTS = 2e-5  # of order 0.01 to 1


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_torchs(name, record_property):
    families = pytest.importorskip("torch_families")
    tiny = Tiny(name)
    model = families.torch_model(tiny)
    expected = families.torch_logits(model, tokens())
    gradients = families.torch_loss_gradients(tiny, model, tokens())
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder = Decoder(tiny.architecture, remat="none")
    mask = np.ones_like(tokens(), bool)
    (_, logits), found = jax.jit(jax.value_and_grad(lambda p: loss(decoder, p, tokens(), mask), has_aux=True))(params)
    error = np.abs(logits - expected).max()
    worst = {leaf: np.abs(found[leaf] - gradients[leaf]).max() for found in [flat(found)] for leaf in gradients}
    record_property("error", float(error))
    print(f"{name}: logits {error:.1e} of {np.abs(expected).max():.1f}, gradients {max(worst.values()):.1e}")
    assert error < LOGITS
    assert max(worst.values()) < GRADIENTS, worst
    if tiny.architecture.learned_positions:  # without rotations a key's bias adds the same to all scores of a query
        gradients.pop("layers/attention/k_proj/bias")
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients.values())
