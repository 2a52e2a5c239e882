"""Adapters on models that see with the real PEFT: ours there, with the same logits, and back again to the bit."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_merged import backbone_of, tokenizer
from tiny_families import flat
from tiny_vision import TinyVision, forward

from pe_rlhf_jax.checkpoint.export import export_policy, export_reward, import_adapter
from pe_rlhf_jax.checkpoint.merged import export_merged
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import sequence_score

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.usefixtures("quick_compile"),
]
__all__ = ["tokenizer"]  # a fixture
SOURCE = {"base_model": "hf:someone/something", "sha256": "0" * 64}
BOTH = r"(vision\.)?(attention|mlp)\..*"
HEAD = {"kernel": np.random.default_rng(3).normal(0, 0.2, (16, 1)).astype(np.float32), "bias": np.array([0.75], np.float32)}
LOGITS = 1e-4  # an adapter left out moves logits by more than 0.1


def adapter(decoder: Decoder):
    fresh = decoder.init_lora(jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.3 * np.random.default_rng(x.size).standard_normal(x.shape), jnp.float32), fresh)


def run_readme(folder, **names):
    """The model that the lines of the folder's README load."""
    (lines,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    exec(lines.replace('"this folder"', repr(str(folder))), names)
    return names["model"].eval()


def scores(tiny: TinyVision, decoder: Decoder, params, lora) -> np.ndarray:
    """Ours of the rows with two, one and no pictures."""
    tokens, mask, prompt, pictures = tiny.batch((0, 0, 0))
    role = Role(lora=lora, head=HEAD)
    features = decoder.encode_images(role.variables(params), pictures)
    return np.asarray(sequence_score(decoder, params, role, tokens, mask, prompt=prompt, features=features))


def torch_scores(tiny: TinyVision, model) -> np.ndarray:
    torch, theirs = pytest.importorskip("torch"), pytest.importorskip("torch_vision")
    with torch.no_grad():
        return np.array([model(**theirs.inputs(tiny, count)).logits[0, 0].item() for count in (2, 1, 0)])


@pytest.mark.parametrize("name", ["llava", "paligemma", "paligemma2", "gemma3", "idefics3", "smolvlm"])
def test_rewards_in_peft_and_merged(tmp_path, tokenizer, name):
    """As the folders' READMEs say, word by word: adapters on decoder and tower, a trained projector, and the score."""
    theirs, _ = pytest.importorskip("torch_vision"), pytest.importorskip("peft")
    tiny, config = TinyVision(name), LoRAConfig(r=3, lora_alpha=5, target_modules=BOTH, modules_to_save=("projector",))
    decoder = Decoder(tiny.architecture, config, remat="none")
    params, lora = load_params(tiny, tiny.family, tiny.architecture, jnp.float32), adapter(decoder)
    theirs.torch_model(tiny).save_pretrained(tmp_path / "backbone")
    common = {"weights": tiny.family.weights(tiny.architecture), "backbone": params, "family": tiny.family}
    export_reward(tmp_path / "reward", lora, HEAD, config, **SOURCE, **common)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, config, head=HEAD, dtype="float32")
    ours = scores(tiny, decoder, params, lora)
    for folder in ("reward", "merged"):
        model = run_readme(tmp_path / folder, backbone=str(tmp_path / "backbone"))
        expected = torch_scores(tiny, model) + HEAD["bias"][0]
        print(f"{name} {folder}: {np.abs(ours - expected).max():.1e}")
        np.testing.assert_allclose(ours, expected, atol=LOGITS, rtol=0)
    factors = scores(tiny, decoder, params, {part: tree for part, tree in lora.items() if part != "projector"})
    # The row without a picture is not moved by the projector; the others are, and the adapters move all.
    assert np.abs(ours - factors)[:2].min() > 10 * LOGITS and ours[2] == factors[2]
    assert np.abs(ours - scores(tiny, decoder, params, None)).min() > 10 * LOGITS


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "smolvlm"])
def test_pefts_own_with_a_projector_here(tmp_path, name):
    """An adapter that PEFT made, with the projector among its `modules_to_save`."""
    theirs, peft, torch = (pytest.importorskip(module) for module in ("torch_vision", "peft", "torch"))
    tiny, config = TinyVision(name), LoRAConfig(r=3, lora_alpha=5, target_modules="attention", modules_to_save=("projector",))
    modules = r".*(language|text)_model\.layers\.\d+\.self_attn\..*_proj"
    module = "modality_projection" if name == "smolvlm" else "multi_modal_projector"
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5, target_modules=modules, modules_to_save=[module])
    adapted = peft.get_peft_model(theirs.torch_model(tiny), settings).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name or "modules_to_save" in parameter_name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(tmp_path / "theirs")
    decoder = Decoder(tiny.architecture, config, remat="none")
    params = load_params(tiny, tiny.family, tiny.architecture, jnp.float32)
    weights = tiny.family.weights(tiny.architecture)
    lora, head = import_adapter(tmp_path / "theirs", adapter(decoder), config, weights=weights, backbone=params)
    expected = theirs.torch_logits(tiny, adapted, 2)
    found = jax.jit(lambda variables: forward(decoder, variables, tiny.batch((0, 0, 0))))({"params": params, "lora": lora})[0]
    print(f"{name} import: {np.abs(found[: len(expected)] - expected).max():.1e}")
    assert head is None
    np.testing.assert_allclose(found[: len(expected)], expected, atol=LOGITS, rtol=0)


CASES = [("llava", "attention"), ("llava", BOTH), ("gemma3", BOTH), ("smolvlm", BOTH), ("llava-dinov2", BOTH)]


@pytest.mark.parametrize("name", ["llava", "paligemma", "gemma3", "smolvlm"])
def test_a_projector_that_is_trained_whole_in_peft(tmp_path, name):
    theirs, peft = pytest.importorskip("torch_vision"), pytest.importorskip("peft")
    tiny, config = TinyVision(name), LoRAConfig(r=3, lora_alpha=5, modules_to_save=("projector",))
    decoder = Decoder(tiny.architecture, config, remat="none")
    params, lora = load_params(tiny, tiny.family, tiny.architecture, jnp.float32), adapter(decoder)
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=tiny.family.weights(tiny.architecture), backbone=params)
    adapted = peft.PeftModel.from_pretrained(theirs.torch_model(tiny), tmp_path / "policy").eval()
    expected = theirs.torch_logits(tiny, adapted, 2)
    logits = jax.jit(lambda variables: forward(decoder, variables, tiny.batch((0, 0, 0))))
    found, factors = (
        logits({"params": params, "lora": tree})[0][: len(expected)]
        for tree in (lora, {name: part for name, part in lora.items() if name != "projector"})
    )
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)
    assert np.abs(found - factors).max() > 0.05


@pytest.mark.parametrize(("name", "target"), CASES)
def test_ours_in_peft(tmp_path, name, target):
    theirs, peft = pytest.importorskip("torch_vision"), pytest.importorskip("peft")
    tiny, config = TinyVision(name), LoRAConfig(r=3, lora_alpha=5, target_modules=target)
    decoder = Decoder(tiny.architecture, config, remat="none")
    params, lora = load_params(tiny, tiny.family, tiny.architecture, jnp.float32), adapter(decoder)
    weights = tiny.family.weights(tiny.architecture)
    export_policy(tmp_path / "policy", lora, config, **SOURCE, weights=weights)
    adapted = peft.PeftModel.from_pretrained(theirs.torch_model(tiny), tmp_path / "policy").eval()
    # Where only the text model is adapted, no module of the tower is, though they are called alike.
    modules = {key.split(".lora_A")[0] for key in adapted.state_dict() if ".lora_A." in key}
    assert any("vision" in module for module in modules) == (target == BOTH)
    tokens, mask, prompt, pictures = tiny.batch((0, 0, 0))

    @jax.jit
    def logits(variables):
        hidden, _ = decoder.apply(variables, tokens, mask, features=decoder.encode_images(variables, pictures), prompt=prompt)
        return decoder.unembed(params, hidden)[0]

    expected = theirs.torch_logits(tiny, adapted, 2)
    found = logits({"params": params, "lora": lora})[: len(expected)]
    print(f"{name} {target}: {np.abs(found - expected).max():.1e}")
    np.testing.assert_allclose(found, expected, atol=LOGITS, rtol=0)
    assert np.abs(found - logits({"params": params})[: len(expected)]).max() > 0.1
    back, _ = import_adapter(tmp_path / "policy", jax.eval_shape(lambda: lora), config, weights=weights)
    assert flat(back).keys() == flat(lora).keys()
    for leaf, value in flat(lora).items():
        np.testing.assert_array_equal(flat(back)[leaf], value, err_msg=leaf)


@pytest.mark.parametrize("name", ["paligemma2", "gemma3", "smolvlm", "llava"])
def test_merged_models_in_transformers(tmp_path, tokenizer, name):
    """Adapters on decoder and tower and a trained projector, in one plain model."""
    theirs, transformers = pytest.importorskip("torch_vision"), pytest.importorskip("transformers")
    tiny, config = TinyVision(name), LoRAConfig(r=3, lora_alpha=5, target_modules=BOTH, modules_to_save=("projector",))
    decoder = Decoder(tiny.architecture, config, remat="none")
    lora = adapter(decoder)
    export_merged(tmp_path / "merged", backbone_of(tiny, tokenizer), lora, config, dtype="float32")
    model, info = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "merged", output_loading_info=True, attn_implementation="eager"
    )
    # The norm after CLIP's last layer is in no tiny model.
    missing = {key for key in info["missing_keys"] if "post_layernorm" not in key or name != "llava"}
    assert not missing and not info["unexpected_keys"] and not info["mismatched_keys"]
    variables = {"params": load_params(tiny, tiny.family, tiny.architecture, jnp.float32), "lora": lora}
    found = jax.jit(lambda variables: forward(decoder, variables, tiny.batch((0, 0, 0))))(variables)[0]
    expected = theirs.torch_logits(tiny, model.eval(), 2)
    print(f"{name} merged: {np.abs(found[: len(expected)] - expected).max():.1e}")
    np.testing.assert_allclose(found[: len(expected)], expected, atol=LOGITS, rtol=0)
