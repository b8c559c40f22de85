"""Tokenizers as GGUF has them, and as tokenizer.json has them.

Two kinds: byte-level BPE (`gpt2`, with a named way to split text into words, `pre`) and SentencePiece's BPE (`llama`,
whose merges are in the order of scores). Works on the JSON documents alone; runs no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llmopt_cli.errors import CheckpointError, ModelError, UsageError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # types of tokens
SPACE = "▁"  # SentencePiece's space
UNSCORED = -1000.0
_TAIL = r"\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
SPLITS = {"llama-bpe": _WORDS + _TAIL % "{1,3}", "qwen2": _WORDS + _TAIL % ""}  # pre -> the pattern of words
READ_AS = {  # other names that files have for the same splits
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral"), "llama-bpe"),
    **dict.fromkeys(("deepseek-r1-qwen", "kormo"), "qwen2"),
    **dict.fromkeys(("phi-2", "gigachat", "mellum", "default"), "gpt-2"),
}
SPECIAL = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}


def tokenizer_metadata(
    document: Mapping[str, Any], config: Mapping[str, Any], size: int, template: str | None, pre: str | None = None
) -> dict[str, Any]:
    """The keys for a tokenizer.json `document` and its tokenizer_config.json, for embeddings of `size` rows.

    `pre` overrides what the splitting of words is found to be. ModelError if GGUF has no such tokenizer, UsageError if
    only `pre` is missing.
    """
    model = document["model"]
    if model.get("type") != "BPE":
        raise ModelError(f"a tokenizer of type {model.get('type')} is not written as GGUF", "written is: BPE")
    pieces = SPACE in json.dumps(document["normalizer"] or document["pre_tokenizer"], ensure_ascii=False)
    added = {token["id"]: token for token in document.get("added_tokens", ())}
    names = _tokens(model["vocab"], added, size)
    unknown = model.get("unk_token")
    found: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if pieces else "gpt2",
        "tokenizer.ggml.pre": "default" if pieces else pre or _pre(document),
        "tokenizer.ggml.tokens": names,
        "tokenizer.ggml.token_type": [_type(index, name, added, unknown) for index, name in enumerate(names)],
    }
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    if pieces:
        found["tokenizer.ggml.scores"] = _scores(names, merges)
        found["tokenizer.ggml.add_space_prefix"] = "prepend" in json.dumps(document).lower().replace('"never"', "")
    else:
        found["tokenizer.ggml.merges"] = merges
    return found | _specials(document, config, names) | ({"tokenizer.chat_template": template} if template else {})


def _tokens(vocab: Mapping[str, int], added: Mapping[int, Mapping[str, Any]], size: int) -> list[str]:
    by_id = {index: name for name, index in vocab.items()}
    by_id |= {index: str(one["content"]) for index, one in added.items()}
    if max(by_id) >= size:
        raise ModelError(f"the tokenizer has {max(by_id) + 1} tokens, the embedding {size} rows")
    return [by_id.get(index, f"[PAD{index}]") for index in range(size)]


def _type(index: int, name: str, added: Mapping[int, Mapping[str, Any]], unknown: str | None) -> int:
    if name == unknown:
        return UNKNOWN
    if index in added:
        return CONTROL if added[index].get("special") else USER_DEFINED
    if name == f"[PAD{index}]":
        return UNUSED
    return BYTE if len(name) == 6 and name.startswith("<0x") and name.endswith(">") else NORMAL


def _scores(names: list[str], merges: list[str]) -> list[float]:
    """Minus the rank of the first merge that makes a token: SentencePiece merges what has the highest score."""
    ranks: dict[str, float] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), -float(rank))
    return [ranks.get(name, UNSCORED if len(name) > 1 else -float(len(merges))) for name in names]


def _pre(document: Mapping[str, Any]) -> str:
    """llama.cpp's name for how text is split into words before it is merged."""
    steps = document["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    found = [name for name, split in SPLITS.items() if patterns == [split] and kinds == ["Split", "ByteLevel"]]
    if not found:
        raise UsageError(
            "how this tokenizer splits words is nothing that llama.cpp has a known name for",
            "give the name with --pre, if there is one; the names are in llama.cpp's src/llama-vocab.cpp",
        )
    return found[0]


def _specials(document: Mapping[str, Any], config: Mapping[str, Any], names: list[str]) -> dict[str, Any]:
    ids = {name: index for index, name in enumerate(names)}
    found: dict[str, Any] = {}
    for key, own in SPECIAL.items():
        token = config.get(own)
        token = token.get("content") if isinstance(token, Mapping) else token
        if token in ids:
            found[f"tokenizer.ggml.{key}_token_id"] = ids[token]
    single = json.dumps((document.get("post_processor") or {}), ensure_ascii=False)
    for key in ("bos", "eos"):
        token = found.get(f"tokenizer.ggml.{key}_token_id")
        adds = token is not None and f'"SpecialToken": {{"id": {json.dumps(names[token], ensure_ascii=False)}' in single
        found[f"tokenizer.ggml.add_{key}_token"] = adds
    return found


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, str]:
    """tokenizer.json, tokenizer_config.json and the chat template of a GGUF file, by name.

    CheckpointError if it has a tokenizer of another kind.
    """
    kind, names = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.tokens")
    if kind not in ("gpt2", "llama") or not names:
        raise CheckpointError(f"GGUF tokenizers of type `{kind}` are not read", "read are: gpt2, llama")
    document = _byte_level(metadata) if kind == "gpt2" else _sentence_pieces(metadata)
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(names)
    document["added_tokens"] = [
        {"id": index, "content": names[index], "special": found == CONTROL, "single_word": False, "lstrip": False}
        | {"rstrip": False, "normalized": False}
        for index, found in enumerate(types)
        if found in (CONTROL, USER_DEFINED)
    ]
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for key, own in SPECIAL.items():
        if (token := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None and token < len(names):
            config[own] = names[token]
    document["post_processor"] = _template(_added(metadata, "bos", names), _added(metadata, "eos", names), names)
    files = {"tokenizer.json": document, "tokenizer_config.json": config}
    written = {name: json.dumps(content, ensure_ascii=False) for name, content in files.items()}
    template = metadata.get("tokenizer.chat_template")
    return written | ({"chat_template.jinja": template} if template else {})


def _added(metadata: Mapping[str, Any], key: str, names: list[str]) -> list[str]:
    """The special token that the tokenizer puts before (`bos`) or after (`eos`) a text, if it does."""
    token = metadata.get(f"tokenizer.ggml.{key}_token_id")
    default = metadata["tokenizer.ggml.model"] == "llama" and key == "bos"
    adds = metadata.get(f"tokenizer.ggml.add_{key}_token", default)
    return [names[token]] if adds and token is not None else []


def _document(model: dict[str, Any], **parts: Any) -> dict[str, Any]:
    base = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False}
    ends = {"continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    empty = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    return {**empty, **parts, "model": {**base, **ends, **model}}


def _byte_level(metadata: Mapping[str, Any]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    pre = READ_AS.get(pre, pre)
    steps: list[dict[str, Any]] = []
    if pre in SPLITS:
        steps = [{"type": "Split", "pattern": {"Regex": SPLITS[pre]}, "behavior": "Isolated", "invert": False}]
    elif pre == "smollm":
        steps = [{"type": "Digits", "individual_digits": True}]
    elif pre != "gpt-2":
        known = ", ".join([*SPLITS, "gpt-2", "smollm"])
        raise CheckpointError(f"the file's tokenizer splits words as `{pre}`, which is not read", f"read are: {known}")
    steps.append(_BYTE_LEVEL | {"use_regex": pre not in SPLITS})
    types = metadata.get("tokenizer.ggml.token_type", [])
    model = {
        "vocab": _vocab(metadata["tokenizer.ggml.tokens"], types),
        "merges": [merge.split(" ", 1) for merge in metadata["tokenizer.ggml.merges"]],
        "ignore_merges": pre == "llama-bpe",
    }
    return _document(
        model,
        normalizer={"type": "NFC"} if pre == "qwen2" else None,
        pre_tokenizer={"type": "Sequence", "pretokenizers": steps},
        decoder=_BYTE_LEVEL | {"use_regex": True},
    )


def _vocab(names: list[str], types: list[int]) -> dict[str, int]:
    """Tokens that text can become; padding is left out."""
    return {name: index for index, name in enumerate(names) if index >= len(types) or types[index] != UNUSED}


def _sentence_pieces(metadata: Mapping[str, Any]) -> dict[str, Any]:
    names, types = metadata["tokenizer.ggml.tokens"], metadata.get("tokenizer.ggml.token_type", [])
    vocab = _vocab(names, types)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    model = {
        "vocab": vocab,
        "merges": _merges(names, metadata["tokenizer.ggml.scores"], types),
        "unk_token": names[unknown] if unknown is not None else None,
        "fuse_unk": True,
        "byte_fallback": BYTE in types,
    }
    normalizers = [{"type": "Prepend", "prepend": SPACE}, replace] if prefix else [replace]
    return _document(
        model,
        normalizer={"type": "Sequence", "normalizers": normalizers},
        decoder={"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
    )


def _merges(names: list[str], scores: list[float], types: list[int]) -> list[list[str]]:
    """All ways to make a token of two others, the token of the highest score first."""
    usable = {name for name, kind in zip(names, types or [NORMAL] * len(names), strict=True) if kind == NORMAL}
    ordered = sorted(usable, key=lambda name: -found[name]) if (found := dict(zip(names, scores, strict=True))) else []
    return [
        [name[:cut], name[cut:]]
        for name in ordered
        for cut in range(1, len(name))
        if name[:cut] in usable and name[cut:] in usable
    ]


def _template(before: list[str], after: list[str], names: list[str]) -> dict[str, Any]:
    """The post-processor that puts special tokens around a text."""
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    around = [[{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens] for tokens in (before, after)]
    special = {
        token: {"id": token, "ids": [names.index(token)], "tokens": [token]} for token in dict.fromkeys(before + after)
    }
    single = [*around[0], *text, *around[1]]
    return {"type": "TemplateProcessing", "single": single, "pair": [*single, *single], "special_tokens": special}
