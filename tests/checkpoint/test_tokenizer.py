import json

import pytest
from tiny_gguf import MERGES, SPECIAL, TOKENS, hf_tensors, write_gguf
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pe_rlhf_jax.checkpoint.gguf import GGUFFile
from pe_rlhf_jax.checkpoint.tokenizer import choose_pad, end_token_ids, tokenizer_from_folder, tokenizer_from_gguf
from pe_rlhf_jax.checkpoint.weights import WeightsError


def _file(tmp_path, **changes):
    write_gguf(
        tmp_path / "m.gguf", hf_tensors(), metadata={key if "." in key else f"tokenizer.ggml.{key}": v for key, v in changes.items()}
    )
    return GGUFFile(tmp_path / "m.gguf")


@pytest.fixture
def tokenizer(tmp_path):
    return tokenizer_from_gguf(_file(tmp_path))


TEXTS = [
    "hello hello, world !  two  spaces , and n't 's",
    "In 2024: 3.14159 / 12-12-12 = 1,000,000",
    " leading and trailing \n\n\n\ttabs\r\n",
    "日本語 한국어 中文 עברית é e\u0301",
    "🙂👩‍👩‍👧‍👦 ☃\ufe0f \u200b\ufffd",
    "<|im_start|>user\nhello<|im_end|>\n",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_character_for_character(tokenizer, text):
    ids = tokenizer(text).input_ids
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < len(TOKENS) for i in ids)


def test_tokens_follow_the_files_merges_with_each_digit_alone(tokenizer):
    # Without the digit rule "12" would be one token: the file has that merge.
    assert tokenizer.tokenize("hello hello 12\n\n") == ["hello", "Ġhello", "Ġ", "1", "2", "ĊĊ"]
    assert tokenizer.convert_tokens_to_ids(["hello", "Ġhello"]) == [TOKENS.index("hello"), TOKENS.index("Ġhello")]


def test_special_tokens_are_single_and_can_be_left_out(tokenizer):
    ids = tokenizer("<|im_start|>he<|im_end|>").input_ids
    assert ids == [1, TOKENS.index("he"), 2]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "he"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.all_special_ids and set(tokenizer.added_tokens_decoder) == set(range(len(SPECIAL)))


def test_the_chat_template_is_the_files(tokenizer):
    turns = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == "<|im_start|>user\nhello<|im_end|>\n"
    assert tokenizer.apply_chat_template(turns, return_dict=False)[0] == 1


def test_a_pad_token_that_is_an_end_token_is_replaced(tokenizer):
    # The file says that 2, the end token, pads. <repo_name> and <empty_output> are free; the last is taken.
    assert tokenizer.pad_token == "<empty_output>"
    assert tokenizer.pad_token_id not in end_token_ids(tokenizer)
    assert end_token_ids(tokenizer, declared=(2, 3)) == (2, 3, 0)


def test_a_pad_token_of_its_own_stays(tmp_path):
    assert tokenizer_from_gguf(_file(tmp_path, padding_token_id=3)).pad_token_id == 3


def test_without_a_chat_template_only_declared_tokens_end(tmp_path):
    tokenizer = tokenizer_from_gguf(_file(tmp_path, **{"tokenizer.chat_template": None}))
    assert end_token_ids(tokenizer) == (2,)


def test_vocabularies_are_split_as_they_were_learned(tmp_path):
    llama3 = tokenizer_from_gguf(_file(tmp_path, pre="llama-bpe"))
    assert llama3.tokenize("hello 12") == ["hello", "Ġ", "12"]  # digits stay together, and a bos token comes first
    assert llama3("he").input_ids == [1, TOKENS.index("he")]
    qwen = tokenizer_from_gguf(_file(tmp_path, pre="qwen2"))
    assert qwen.tokenize("hello 12") == ["hello", "Ġ", "1", "2"]
    assert qwen("he").input_ids == [TOKENS.index("he")]
    assert qwen("é").input_ids == qwen("é").input_ids  # composed first
    assert llama3("é").input_ids != llama3("é").input_ids


def test_sentencepiece_vocabularies_get_the_merges_that_their_scores_imply(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "a", "b", "ab", "▁a"]
    types = [2, 3, 3] + [6] * 256 + [1] * 5
    scores = [0.0] * 259 + [-5.0, -5.0, -5.0, -3.0, -1.0]
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "padding_token_id": None, "pre": None, "merges": None}
    file = _file(tmp_path, model="llama", tokens=pieces, token_type=types, scores=scores, **ids)
    tokenizer = tokenizer_from_gguf(file)
    assert tokenizer.tokenize("ab b") == ["▁a", "b", "▁", "b"]  # the best piece first: then "ab" has no "a" left
    assert tokenizer("a").input_ids == [1, pieces.index("▁a")]
    for text in ("ab b", "  a", "日"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    assert tokenizer.pad_token == "<unk>"


def test_choosing_a_pad_token():
    def with_special(*special, **named):
        vocabulary = {"a": 0, **{token: i + 1 for i, token in enumerate(special)}}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        backend.add_special_tokens(list(special))
        return PreTrainedTokenizerFast(tokenizer_object=backend, **named)

    reserved = with_special("<bos>", "<eos>", "<right_pad_id>", "<reserved>", bos_token="<bos>", eos_token="<eos>")
    assert choose_pad(reserved, (2,)) == "<right_pad_id>"
    assert choose_pad(reserved, (2, 3)) == "<reserved>"
    used = with_special("<eos>", "<a>", "<b>", eos_token="<eos>", chat_template="{{ '<b>' }}")
    assert choose_pad(used, (1,)) == "<a>"
    assert choose_pad(with_special("<eos>", "<unk>", eos_token="<eos>", unk_token="<unk>"), (1,)) == "<unk>"
    assert choose_pad(with_special("<eos>", "Ĕ", eos_token="<eos>", unk_token="<eos>"), (1, 2)) == "Ĕ"
    with pytest.raises(WeightsError, match="no special token that could pad"):
        choose_pad(with_special("<eos>", eos_token="<eos>"), (1,))


def test_decoding_never_cleans_up_spaces(tokenizer):
    assert tokenizer.clean_up_tokenization_spaces is False
    assert tokenizer.decode(tokenizer("he , he .").input_ids) == "he , he ."


def test_saved_to_a_folder_it_is_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    again = tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))
    assert [again(t).input_ids for t in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
    assert (again.pad_token_id, again.eos_token_id, again.chat_template) == (4, 2, tokenizer.chat_template)
    assert again.clean_up_tokenization_spaces is False


def test_a_folders_pad_and_end_tokens_are_checked_too(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "tokenizer_config.json"
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "pad_token": "<|im_end|>", "clean_up_tokenization_spaces": True}))
    again = tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))
    assert again.pad_token == "<empty_output>" and again.clean_up_tokenization_spaces is False
    config.write_text(json.dumps({k: v for k, v in values.items() if k != "eos_token"}))
    assert tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (0,)).eos_token == "<|endoftext|>"
    with pytest.raises(WeightsError, match="names an end token"):
        tokenizer_from_folder(tmp_path / "folder", len(TOKENS))


@pytest.mark.parametrize("declared", ["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
def test_a_folders_file_is_read_as_it_stands_whatever_class_it_names(tokenizer, tmp_path, declared):
    """The published SmolLM2 says GPT2Tokenizer, which splits neither digits nor line breaks as its file does."""
    tokenizer.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tokenizer_class": declared}))
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))
    assert [again(t).input_ids for t in TEXTS] == [tokenizer(t).input_ids for t in TEXTS]
    again.save_pretrained(tmp_path / "once more")
    contents = [json.loads((tmp_path / name / "tokenizer.json").read_text()) for name in ("folder", "once more")]
    assert all(contents[0][part] == contents[1][part] for part in ("normalizer", "pre_tokenizer", "model", "added_tokens"))


def test_added_tokens_beyond_the_model_are_left_out(tokenizer, tmp_path):
    """As Gemma 3's text models have one for pictures, named in the configuration too."""
    before, template = [tokenizer(t).input_ids for t in TEXTS], tokenizer.chat_template
    tokenizer.add_tokens(["<picture>"], special_tokens=True)
    assert tokenizer("<picture>").input_ids == [len(TOKENS)]
    tokenizer.save_pretrained(tmp_path / "folder")
    config = tmp_path / "folder" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "image_token": "<picture>"}))
    again = tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))
    assert [again(t).input_ids for t in TEXTS] == before and max(again("a <picture>").input_ids) < len(TOKENS)
    assert (again.pad_token_id, again.eos_token_id, again.bos_token_id) == (4, 2, 1) and again.chat_template == template
    assert again("<|im_start|>").input_ids == [1] and 1 in again.all_special_ids


def test_a_template_that_processors_kept_in_a_file_of_its_own(tokenizer, tmp_path):
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(tmp_path / "folder")
    file = tmp_path / "folder" / "chat_template.json"
    file.write_text(json.dumps({"chat_template": template}))
    again = tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))
    assert again.chat_template == template and 0 in end_token_ids(again)
    file.write_text("{")
    with pytest.raises(WeightsError, match="cannot read the tokenizer"):
        tokenizer_from_folder(tmp_path / "folder", len(TOKENS), (2,))


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(WeightsError, match=r"(?s)cannot read the tokenizer.*expected tokenizer.json"):
        tokenizer_from_folder(tmp_path, len(TOKENS))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot read the tokenizer"):
        tokenizer_from_folder(tmp_path, len(TOKENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model 'bert' is not supported"),
        ({"model": "llama"}, "no tokenizer.ggml.scores"),
        ({"pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not supported"),
        ({"add_eos_token": True}, "add_eos_token 'True' is not supported"),
        ({"add_bos_token": True, "bos_token_id": None}, "texts should begin with a bos token, but the file names none"),
        ({"tokens": None}, "no tokenizer.ggml.tokens"),
        ({"merges": [*MERGES, "zz hell"]}, "merges do not fit the vocabulary"),
        ({"merges": [*MERGES, "nospace"]}, "merges do not fit the vocabulary"),
        ({"tokens": [*TOKENS[:-1], TOKENS[0]]}, "duplicates"),
        ({"token_type": [1, 2]}, "types do not match"),
        ({"eos_token_id": 10_000}, "eos token 10000 is not in the vocabulary"),
        ({"eos_token_id": None}, "names an end token"),
    ],
)
def test_other_and_damaged_tokenizers_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(WeightsError, match=message):
        tokenizer_from_gguf(_file(tmp_path, **changes))
