"""The tokenizer out of a GGUF file's own vocabulary: byte-level BPE (SmolLM, Llama 3, Qwen, GPT-2), or SentencePiece's (Llama 2, Gemma)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.weights import WeightsError

# GGUF's token types that are not plain vocabulary.
_CONTROL, _USER_DEFINED = 3, 4
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPACE = "\u2581"


def _byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(tokenizers.Regex(pattern), behavior="isolated"), _byte_level(False)])


_PRE_TOKENIZERS: Mapping[str, Any] = {
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level(True)]),
    "gpt-2": _byte_level(True),
    "llama-bpe": _split(_LLAMA3),
    "qwen2": _split(_QWEN2),
}


def build_tokenizer(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer with the file's vocabulary, merges, special tokens and chat template.

    Raises:
        WeightsError: the file has no tokenizer, one of another kind, or a damaged one.
    """
    kind = _one_of(file, "model", ("gpt2", "llama"))
    _one_of(file, "add_eos_token", (False,), default=False)
    tokens, types = _strings(file, "tokens"), _strings(file, "token_type")
    if len(set(tokens)) != len(tokens) or len(types) != len(tokens):
        raise WeightsError(f"{file.path}: the vocabulary has duplicates, or its types do not match; the file is damaged")
    named = _special(file, tokens)
    try:
        backend = _bpe(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens, named.get("unk_token"))
        vocabulary = backend.get_vocab()
        added = [
            tokenizers.AddedToken(token, special=type_ == _CONTROL, normalized=False)
            for token, type_ in zip(tokens, types, strict=True)
            if type_ in (_CONTROL, _USER_DEFINED) and token in vocabulary
        ]
        backend.add_tokens(added)
        if _adds_bos(file, kind):
            bos = named.get("bos_token")
            if bos is None:
                raise WeightsError(f"{file.path}: texts should begin with a bos token, but the file names none; it is damaged")
            backend.post_processor = processors.TemplateProcessing(
                single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, vocabulary[bos])]
            )
    except WeightsError:
        raise
    except Exception as error:  # the Rust library raises plain Exception
        raise WeightsError(f"{file.path}: the merges do not fit the vocabulary ({error}); the file is damaged") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **named,
    )


def _bpe(file: GGUFFile, tokens: list[str]) -> tokenizers.Tokenizer:
    pre = _one_of(file, "pre", tuple(_PRE_TOKENIZERS), default="")
    pairs = [(left, right) for left, right in (merge.split(" ") for merge in _strings(file, "merges"))]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=pre == "llama-bpe"))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = _PRE_TOKENIZERS[pre]
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(file: GGUFFile, tokens: list[str], unknown: str | None) -> tokenizers.Tokenizer:
    """BPE as Hugging Face converts it, with the merges that the vocabulary implies, best first.

    Gemma's scores do not follow the order of its merges, the order of its tokens does; and its files spell runs of spaces as spaces.
    """
    gemma = file.architecture.startswith("gemma")
    if gemma:
        tokens = [_SPACE * len(token) if len(token) > 1 and not token.strip(" ") else token for token in tokens]
        rank: list[Any] = list(range(len(tokens)))
    else:
        scores = _strings(file, "scores")
        if len(scores) != len(tokens):
            raise WeightsError(f"{file.path}: {len(scores)} scores for {len(tokens)} tokens; the file is damaged")
        rank = [-score for score in scores]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    splits = []
    for token, place in zip(tokens, rank, strict=True):
        if len(token) > 256:
            continue
        for i in range(1, len(token)):
            left, right = token[:i], token[i:]
            if left in vocabulary and right in vocabulary:
                splits.append(((place, -i, i - len(token), vocabulary[left], vocabulary[right]), left, right))
    pairs = [(left, right) for _, left, right in sorted(splits)]
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces, back = normalizers.Replace(" ", _SPACE), [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    prefixed = _one_of(file, "add_space_prefix", (True, False), default=not gemma)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces]) if prefixed else spaces
    backend.decoder = decoders.Sequence([*back, decoders.Strip(" ", 1, 0)] if prefixed else back)
    return backend


def _adds_bos(file: GGUFFile, kind: str) -> bool:
    """Whether texts begin with the bos token; llama.cpp's defaults where the file does not say."""
    by_default = kind == "llama" or file.metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    return bool(_one_of(file, "add_bos_token", (True, False), default=by_default))


def _special(file: GGUFFile, tokens: list[str]) -> dict[str, str]:
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if not (isinstance(token_id, int) and 0 <= token_id < len(tokens)):
                raise WeightsError(f"{file.path}: the {name} token {token_id} is not in the vocabulary of {len(tokens)}")
            named[f"{name}_token"] = tokens[token_id]
    return named


def _one_of(file: GGUFFile, key: str, allowed: tuple[Any, ...], default: Any = None) -> Any:
    found = file.metadata.get(f"tokenizer.ggml.{key}", default)
    if isinstance(found, list) or found not in allowed:
        raise WeightsError(
            f"{file.path}: tokenizer.ggml.{key} {str(found)[:60]!r} is not supported (only {', '.join(map(str, allowed))}); use the "
            "model's folder in Hugging Face's layout"
        )
    return found


def _strings(file: GGUFFile, key: str) -> list:
    found = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or not found:
        raise WeightsError(f"{file.path}: no tokenizer.ggml.{key}; the file holds no tokenizer")
    return found
