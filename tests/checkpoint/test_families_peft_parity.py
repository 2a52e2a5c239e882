"""Every family's adapters with the real PEFT: ours there, PEFT's own here, with the same logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_adapters_of_families import FAMILIES, SOURCE, adapter, table
from test_merged import backbone_of, tokenizer
from tiny_families import LENGTH, Tiny, tokens

from pe_rlhf_jax.checkpoint.export import export_policy, export_reward, import_adapter
from pe_rlhf_jax.checkpoint.merged import export_merged
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig, SamplingConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.rollout.score import sequence_score
from pe_rlhf_jax.types import PromptBatch

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),  # of PEFT, about Conv1D
    pytest.mark.usefixtures("quick_compile"),
]

__all__ = ["tokenizer"]  # a fixture
LOGITS = 1e-4  # both compute in float32; an adapter left out moves logits by more than 0.1


def our_logits(tiny: Tiny, config: LoRAConfig | None, lora) -> np.ndarray:
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder = Decoder(tiny.architecture, config, remat="none")
    variables = {"params": params} | ({} if lora is None else {"lora": lora})
    hidden, _ = decoder.apply(variables, jnp.asarray(tokens()), jnp.ones(tokens().shape, bool))
    return np.asarray(decoder.unembed(params, hidden))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(("target", "rslora"), [("all-linear", False), ("attention", True), (r"attention\.[qv]_proj", False)])
def test_ours_in_peft(tmp_path, name, target, rslora):
    families, peft = pytest.importorskip("torch_families"), pytest.importorskip("peft")
    tiny, config = Tiny(name), LoRAConfig(r=3, lora_alpha=5, use_rslora=rslora, target_modules=target)
    lora = adapter(tiny, config)
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=table(tiny))
    adapted = peft.PeftModel.from_pretrained(families.torch_model(tiny), tmp_path / "policy").eval()
    expected, found = families.torch_logits(adapted, tokens()), our_logits(tiny, config, lora)
    print(f"{name} {target}: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)
    assert np.abs(found - our_logits(tiny, None, None)).max() > 0.1
    merged = families.torch_logits(adapted.merge_and_unload(), tokens())
    np.testing.assert_allclose(found, merged, atol=LOGITS, rtol=0)


THEIRS = {
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "gpt2": ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_pefts_own_here(tmp_path, name):
    families, peft, torch = pytest.importorskip("torch_families"), pytest.importorskip("peft"), pytest.importorskip("torch")
    tiny = Tiny(name)
    modules = THEIRS.get(name, [f"{x}_proj" for x in ("q", "k", "v", "o", "gate", "up", "down")])
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=modules)
    adapted = peft.get_peft_model(families.torch_model(tiny), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "theirs")
    config = LoRAConfig(r=3, lora_alpha=5)
    lora, head = import_adapter(tmp_path / "theirs", adapter(tiny, config), config, weights=table(tiny))
    assert head is None
    found, expected = our_logits(tiny, config, lora), families.torch_logits(adapted, tokens())
    print(f"{name} import: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_rewards_in_peft(tmp_path, name):
    families, peft, torch = pytest.importorskip("torch_families"), pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tiny, config = Tiny(name), LoRAConfig(r=2, lora_alpha=3)
    tiny.config["num_labels"] = 1
    lora = adapter(tiny, config)
    head = {"kernel": jnp.asarray(np.random.default_rng(3).normal(0, 0.2, (16, 1)), jnp.float32), "bias": jnp.array([0.75])}
    export_reward(tmp_path / "reward", lora, head, config, **SOURCE, weights=table(tiny))
    model = families.torch_model(tiny, transformers.AutoModelForSequenceClassification)
    adapted = peft.PeftModel.from_pretrained(model, tmp_path / "reward").eval()
    rows = np.maximum(tokens(), 1)  # 0 pads
    with torch.no_grad():
        expected = adapted(torch.tensor(rows)).logits[:, 0].numpy()
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder = Decoder(tiny.architecture, config, remat="none")
    score = sequence_score(decoder, params, Role(lora=lora, head=head), jnp.asarray(rows), jnp.ones(rows.shape, bool))
    np.testing.assert_allclose(np.asarray(score) - 0.75, expected, atol=LOGITS, rtol=0)
    assert np.abs(expected).max() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_models_in_transformers(tmp_path, tokenizer, name):
    """The same logits, and the same greedy text."""
    transformers, torch, families = (pytest.importorskip(x) for x in ("transformers", "torch", "torch_families"))
    tiny, config = Tiny(name), LoRAConfig(r=3, lora_alpha=5)
    lora = adapter(tiny, config)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, config, dtype="float32", shard_bytes=9_000)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.float32
    found, expected = our_logits(tiny, config, lora), families.torch_logits(model.eval(), tokens())
    print(f"{name} merged: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)
    rows = torch.tensor(tokens())
    theirs = model.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=8, do_sample=False)[:, LENGTH:].numpy()
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder = Decoder(tiny.architecture, config, remat="none")
    prompts = PromptBatch(jnp.asarray(tokens()), jnp.ones(tokens().shape, bool))
    sampling = SamplingConfig(temperature=0.0, max_new_tokens=8)
    ours = generate(Sampler(decoder, sampling, (2, 0), 4), {"params": params, "lora": lora}, prompts, jax.random.key(0))
    np.testing.assert_array_equal(np.asarray(ours.response)[:, : theirs.shape[1]], theirs)


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_reward_models_in_transformers(tmp_path, tokenizer, name):
    """The same scores, less the bias; with padding on the right, which the classifier looks for."""
    transformers, torch = (pytest.importorskip(x) for x in ("transformers", "torch"))
    tiny, config = Tiny(name), LoRAConfig(r=2, lora_alpha=3)
    lora = adapter(tiny, config)
    head = {"kernel": jnp.asarray(np.random.default_rng(3).normal(0, 0.2, (16, 1)), jnp.float32), "bias": jnp.array([0.75])}
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, config, head=head, dtype="float32", shard_bytes=9_000)
    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.num_labels == 1 and type(model).__name__ == tiny.family.classifier
    pad = tokenizer.pad_token_id
    rows = np.where(tokens() == pad, pad + 1, tokens())
    mask = np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 4]])
    rows = np.where(mask, rows, pad)
    with torch.no_grad():
        expected = model.eval()(torch.tensor(rows), attention_mask=torch.tensor(mask.astype(int))).logits[:, 0].numpy()
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    decoder = Decoder(tiny.architecture, config, remat="none")
    score = sequence_score(decoder, params, Role(lora=lora, head=head), jnp.asarray(rows), jnp.asarray(mask))
    print(f"{name} merged reward: {np.abs(np.asarray(score) - model.config.score_bias - expected).max():.1e}")
    np.testing.assert_allclose(np.asarray(score) - 0.75, expected, atol=LOGITS, rtol=0)
    assert np.abs(expected).max() > 0.05
