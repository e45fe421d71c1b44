"""The synthetic checkpoint's tokenizer: a small byte-level BPE with ERNIE's special tokens."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

_BASE_SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2, as published
_MEDIA_TOKENS = {
    f"{kind.lower()}{suffix}_token": f"<|{kind}_{name}|>"
    for kind in ("IMAGE", "VIDEO")
    for suffix, name in (("", "PLACEHOLDER"), ("_start", "START"), ("_end", "END"))
}
ADDED_SPECIALS = [
    "<|begin_of_sentence|>",
    "<|end_of_sentence|>",
    "<mask:1>",
    *_MEDIA_TOKENS.values(),
    "<think>",
    "</think>",
]

# Without digits: they are tokens of their own and must not be merged.
_TEXT = """\
A picture is cut into small patches, and each patch becomes a vector. Four neighbours that form a
square are merged into one token, so that a photograph of a street costs a few hundred tokens and
a page of text somewhat more. The tokens of the picture and the words of the question then walk
through the same layers side by side. They share attention, so that every word can look at every
part of the picture, but they part ways at the experts: the words go to the experts for text, the
pieces of the picture to the experts for vision, and the two never meet there. What is in the
image? There is a dog on the left, a red car behind it, and a man with a green umbrella who waits
at the crossing. The weather looks cold and wet. Please describe the video in one sentence, and
say how many people you can see. Hello! How are you today? I am fine, thank you. The answer is
yes.
图片被切成许多小块，每一块变成一个向量。相邻的四块合并成一个词元，于是一张街景照片只需要几百个词元。
图片的词元和问题的词元一起走过同样的层，它们共享注意力，但是在专家那里分开：文字交给文字专家，图片交给视觉专家。
这张图片里有什么？左边有一只狗，后面有一辆红色的汽车，还有一个人打着绿色的伞在路口等待。
请用一句话描述这段视频，并说出你能看到几个人。你好！今天天气怎么样？谢谢，我很好。
"""  # noqa: RUF001 - Chinese has its own punctuation

_CHAT_TEMPLATE = """\
{%- set count = namespace(image=0, video=0) -%}
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
{{- {'user': 'User: ', 'assistant': '\\nAssistant: '}.get(message.role, '') -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ['image', 'image_url'] -%}
{%- set count.image = count.image + 1 -%}
{{- 'Picture ' ~ count.image ~ ':<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>' -}}
{%- elif part.type in ['video', 'video_url'] -%}
{%- set count.video = count.video + 1 -%}
{{- 'Video ' ~ count.video ~ ':<|VIDEO_START|><|VIDEO_PLACEHOLDER|><|VIDEO_END|>' -}}
{%- else -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- {'system': '\\n', 'assistant': '<|end_of_sentence|>'}.get(message.role, '') -}}
{%- endfor -%}
{%- if add_generation_prompt is not defined or add_generation_prompt -%}
{{- '\\nAssistant: ' -}}
{{- '<think>' -}}
{%- if enable_thinking is not defined or not enable_thinking -%}
{{- '\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""


def train(num_tokens: int, lines: Iterable[str] = tuple(_TEXT.splitlines())) -> Tokenizer:
    """A tokenizer of `num_tokens` (at least 259) plus ADDED_SPECIALS; of the same lines, which hold
    no digits, the same every time."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens,
        special_tokens=_BASE_SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_tokens([AddedToken(str(d), normalized=False, special=False) for d in range(10)])
    tokenizer.add_special_tokens(ADDED_SPECIALS)
    return tokenizer


def readable_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of tokens that stand for whole characters: neither special nor a part of one."""
    added = tokenizer.get_added_tokens_decoder()
    special = {token_id for token_id, token in added.items() if token.special}
    return [
        token_id
        for token_id in range(tokenizer.get_vocab_size())
        if token_id not in special and _is_readable(tokenizer.decode([token_id]))
    ]


def write_tokenizer(tokenizer: Tokenizer, directory: Path, *, model_max_length: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "added_tokens_decoder": {
            str(token_id): {
                "content": token.content,
                "lstrip": token.lstrip,
                "normalized": token.normalized,
                "rstrip": token.rstrip,
                "single_word": token.single_word,
                "special": token.special,
            }
            for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
        },
        "bos_token": "<s>",
        "chat_template": _CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "cls_token": "<|begin_of_sentence|>",
        "eos_token": "</s>",
        "extra_special_tokens": _MEDIA_TOKENS,
        "mask_token": "<mask:1>",
        "model_max_length": model_max_length,
        "pad_token": "<unk>",
        "sep_token": "<|end_of_sentence|>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    file = directory / "tokenizer_config.json"
    file.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _is_readable(text: str) -> bool:
    return text.isprintable() and "\ufffd" not in text
