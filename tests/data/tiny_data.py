"""A byte-level tokenizer with a small chat template, and made-up rated sentences."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for turn in messages %}{% if turn.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|start|>{{ turn.role }}\n{{ turn.content }}<|end|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(chat_template: str | None = CHAT_TEMPLATE, adds_start: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte; `adds_start` puts <s> before every text, as Llama's and Gemma's tokenizers do."""
    special = ["<pad>", "<s>", "<|start|>", "<|end|>"]
    vocabulary = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(special)
    if adds_start:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="<|end|>", pad_token="<pad>", chat_template=chat_template
    )


def review_table(count: int) -> str:
    """A table of made-up rated sentences, in the format of the data set; every third opening comes several times."""
    lines = []
    for i in range(count):
        opening = f"Take {i % 5} of this" if i % 3 == 0 else f"Film {i} is quite"
        lines.append(f"{i + 1}\t{(i * 37 % 81) / 10 - 4:.6f}\t{opening} a thing worth seeing {i} times.\r\n")
    return "".join(lines)
