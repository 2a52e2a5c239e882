"""The backbone's tokenizer: rebuilt from a GGUF file's own vocabulary, or read from a folder."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import transformers
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.gguf_tokenizer import build_tokenizer
from pe_rlhf_jax.checkpoint.weights import WeightsError

CHAT_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<end_of_turn>")
"""Tokens that end a response of a chat model where its vocabulary has them, whatever else it declares."""
_CONTROL_BYTE = "\u0114"  # how byte-level vocabularies spell byte 0x14, "device control four"


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """The tokenizer out of the file's vocabulary (see `gguf_tokenizer.build_tokenizer`), with a pad token that ends nothing.

    Raises:
        WeightsError: the file has no tokenizer, one of another kind, or a damaged one.
    """
    return _finished(build_tokenizer(file), file.eos_token_ids, file.path)


def tokenizer_from_folder(folder: Path, vocab_size: int, eos_token_ids: Iterable[int] = ()) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer (code in the folder is never run), with a pad token that ends nothing.

    Args:
        vocab_size: the model's; added tokens beyond it are left out.
        eos_token_ids: the end tokens that the model declares.

    Raises:
        WeightsError: the tokenizer is missing, damaged, or only exists as slow Python code.
    """
    # For classes of its own, transformers 5 keeps of tokenizer.json little more than vocabulary and merges: SmolLM2's digits, each of them
    # a token, would not be split.
    own = (folder / "tokenizer.json").is_file()
    try:
        # Not imported above: where torch is installed, that would import it too, half a gigabyte.
        kind = PreTrainedTokenizerFast if own else transformers.AutoTokenizer
        tokenizer = kind.from_pretrained(folder, local_files_only=True, clean_up_tokenization_spaces=False)
        template = folder / "chat_template.json"  # where processors had it before they wrote chat_template.jinja
        if isinstance(tokenizer, PreTrainedTokenizerFast) and tokenizer.chat_template is None and template.is_file():
            tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    except Exception as error:  # transformers raises many kinds for files that are missing or damaged
        raise WeightsError(
            f"{folder}: cannot read the tokenizer ({type(error).__name__}: {error}); expected tokenizer.json and tokenizer_config.json"
        ) from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise WeightsError(f"{folder}: expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    return _finished(_within(tokenizer, vocab_size), eos_token_ids, folder)


def _within(tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> PreTrainedTokenizerFast:
    """Without added tokens of which the model has no embedding: Gemma 3's text models have one for pictures."""
    vocabulary = tokenizer.get_vocab()
    if max(vocabulary.values()) < vocab_size:
        return tokenizer
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocab_size]
    named = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    settings = {name: getattr(tokenizer, name) for name in ("model_max_length", "padding_side", "truncation_side")}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **settings,
        **{name: token for name, token in named.items() if token is not None and vocabulary[token] < vocab_size},
    )


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
    begin nor unknown token and does not stand in the chat template; then the unknown token, and where that ends texts too (GPT-2 has
    one special token for everything) the byte of a control character that texts do not have.
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
    if _CONTROL_BYTE in tokenizer.get_vocab():
        return _CONTROL_BYTE
    raise WeightsError("the tokenizer has no special token that could pad; give it a pad_token that is not an end token")


def _finished(tokenizer: PreTrainedTokenizerFast, declared: Iterable[int], where: Path) -> PreTrainedTokenizerFast:
    declared = tuple(declared)
    if tokenizer.eos_token is None:
        if not declared:
            raise WeightsError(f"{where}: neither tokenizer nor model names an end token; set eos_token in the tokenizer")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(declared[0])
    tokenizer.pad_token = choose_pad(tokenizer, end_token_ids(tokenizer, declared))
    return tokenizer
