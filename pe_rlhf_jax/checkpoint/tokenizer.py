"""The backbone's tokenizer: rebuilt from a GGUF file's own vocabulary, or read from a folder."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.weights import WeightsError

CHAT_END_TOKENS = ("<|im_end|>", "<|endoftext|>")
"""Tokens that end a response of a chat model where its vocabulary has them, whatever else it declares."""

# GGUF's token types that are not plain vocabulary.
_CONTROL, _USER_DEFINED = 3, 4


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Byte-level BPE out of the file's vocabulary, merges, special tokens and chat template.

    Its pad token is one that ends nothing (see `choose_pad`).

    Raises:
        WeightsError: the file has no tokenizer, another kind than SmolLM's, or a damaged one.
    """
    tokens, types, merges = (_strings(file, f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    for key, expected in (("model", "gpt2"), ("pre", "smollm"), ("add_bos_token", False), ("add_eos_token", False)):
        if (found := file.metadata.get(f"tokenizer.ggml.{key}", False)) != expected:
            raise WeightsError(
                f"{file.path}: tokenizer.ggml.{key} {found!r} is not supported (only {expected!r} is); use the model's "
                "folder in Hugging Face's layout"
            )
    vocabulary = {token: i for i, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens) or len(types) != len(tokens):
        raise WeightsError(f"{file.path}: the vocabulary has duplicates, or its types do not match; the file is damaged")
    try:
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in merges)]
        backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        added = [
            tokenizers.AddedToken(token, special=kind == _CONTROL, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind in (_CONTROL, _USER_DEFINED)
        ]
        backend.add_tokens(added)
    except Exception as error:  # the Rust library raises plain Exception
        raise WeightsError(f"{file.path}: the merges do not fit the vocabulary ({error}); the file is damaged") from error
    named = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = file.metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            if not (isinstance(token_id, int) and 0 <= token_id < len(tokens)):
                raise WeightsError(f"{file.path}: the {name} token {token_id} is not in the vocabulary of {len(tokens)}")
            named[f"{name}_token"] = tokens[token_id]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=file.metadata.get("tokenizer.chat_template"),
        model_max_length=file.config["max_position_embeddings"],
        clean_up_tokenization_spaces=False,
        **named,
    )
    return _finished(tokenizer, file.eos_token_ids, file.path)


def tokenizer_from_folder(folder: Path, eos_token_ids: Iterable[int] = ()) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer (code in the folder is never run), with a pad token that ends nothing.

    `eos_token_ids` are the end tokens that the model declares.

    Raises:
        WeightsError: the tokenizer is missing, damaged, or only exists as slow Python code.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, clean_up_tokenization_spaces=False)
    except Exception as error:  # transformers raises many kinds for files that are missing or damaged
        raise WeightsError(
            f"{folder}: cannot read the tokenizer ({type(error).__name__}: {error}); expected tokenizer.json and tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise WeightsError(f"{folder}: expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    return _finished(tokenizer, eos_token_ids, folder)


def end_token_ids(tokenizer: PreTrainedTokenizerFast, declared: Iterable[int] = ()) -> tuple[int, ...]:
    """Every token at which generation stops, `tokenizer.eos_token_id` first.

    These are the tokenizer's end token, those that the model declares, and for chat models CHAT_END_TOKENS.
    """
    chat = CHAT_END_TOKENS if tokenizer.chat_template else ()
    vocabulary = tokenizer.get_vocab()
    ids = [tokenizer.eos_token_id, *declared, *(vocabulary[token] for token in chat if token in vocabulary)]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def choose_pad(tokenizer: PreTrainedTokenizerFast, end_ids: Iterable[int]) -> str:
    """The pad token: the tokenizer's own unless it ends a text or begins one, else a special token that is not used.

    The latter is the first special token with "pad" in its name, else the one with the highest id, that is neither end,
    begin nor unknown token and does not stand in the chat template; the unknown token is the last resort.
    """
    taken = {*end_ids, tokenizer.bos_token_id}
    if tokenizer.pad_token is not None and tokenizer.pad_token_id not in taken:
        return tokenizer.pad_token
    special = {i: token.content for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special}
    template = str(tokenizer.chat_template or "")
    free = [token for i, token in special.items() if i not in taken and i != tokenizer.unk_token_id and token not in template]
    if named := [token for token in free if "pad" in token.lower()]:
        return named[0]
    if free:
        return free[-1]
    if tokenizer.unk_token is not None and tokenizer.unk_token_id not in taken:
        return tokenizer.unk_token
    raise WeightsError("the tokenizer has no special token that could pad; give it a pad_token that is not an end token")


def _finished(tokenizer: PreTrainedTokenizerFast, declared: Iterable[int], where: Path) -> PreTrainedTokenizerFast:
    declared = tuple(declared)
    if tokenizer.eos_token is None:
        if not declared:
            raise WeightsError(f"{where}: neither tokenizer nor model names an end token; set eos_token in the tokenizer")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(declared[0])
    tokenizer.pad_token = choose_pad(tokenizer, end_token_ids(tokenizer, declared))
    return tokenizer


def _strings(file: GGUFFile, key: str) -> list:
    found = file.metadata.get(key)
    if not isinstance(found, list) or not found:
        raise WeightsError(f"{file.path}: no {key}; the file holds no tokenizer")
    return found
