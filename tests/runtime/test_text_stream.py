"""Streamed text: whole characters, no stop string ever shown, and the same text however it is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmopt_cli.errors import CheckpointError, LlmoptError, ModelError
from llmopt_cli.runtime.tokenizer import TextStream, Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint

TOKENIZER = Tokenizer(Checkpoint.open("demo"))


def stream(ids: list[int], stop: tuple[str, ...] = (), prompt: str = "It was ") -> tuple[list[str], str]:
    """What could be seen after each token, and the final text."""
    text = TextStream(TOKENIZER, TOKENIZER.encode(prompt), stop)
    seen = []
    for token in ids:
        ended = text.push(token)
        seen.append(text.text)
        if ended:
            break
    text.close()
    return seen, text.text


@given(st.text(max_size=30))
def test_streamed_text_is_the_decoded_text(text: str) -> None:
    ids = TOKENIZER.encode(text)
    seen, final = stream(ids)
    assert final == TOKENIZER.decode(ids) == text
    assert all(final.startswith(part) for part in seen), "text once shown never changes"


@given(st.lists(st.integers(7, 4095), max_size=30))
def test_any_tokens_decode_like_the_whole(ids: list[int]) -> None:
    assert stream(ids)[1] == TOKENIZER.decode(ids)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテスト", "🙂 and 👩‍👩‍👧", "mixed 🙂text"])
def test_multi_byte_characters_are_shown_whole(text: str) -> None:
    seen, final = stream(TOKENIZER.encode(text))
    assert final == text
    assert not any("�" in part for part in seen)


@given(
    st.text("ab ", min_size=1, max_size=20), st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=3)
)
def test_stop_strings_never_show(text: str, stop: list[str]) -> None:
    seen, final = stream(TOKENIZER.encode(text), tuple(stop))
    ends = [text.find(string) + len(string) for string in stop if string in text]
    cuts = [text.find(string) for string in stop if string in text and text.find(string) + len(string) == min(ends)]
    assert final == (text[: min(cuts)] if cuts else text)
    assert all(final.startswith(part) for part in seen)


def test_a_character_cut_at_the_end_is_marked() -> None:
    ids = TOKENIZER.encode("🙂")
    assert len(ids) > 1
    assert stream(ids[:-1])[1] == TOKENIZER.decode(ids[:-1]) != ""


def test_end_ids_come_from_where_there_are_any(tiny: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("Llama"), tmp_path / "m"))
    ids = []
    for generation, config, nested in (([7, 8], 9, 10), (None, 9, 10), (None, None, 10), (None, None, None)):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
        data = json.loads((folder / "config.json").read_text()) | {"eos_token_id": config}
        data["text_config"] = {"eos_token_id": nested}
        (folder / "config.json").write_text(json.dumps(data))
        ids.append(Tokenizer(Checkpoint.open(folder)).eos_ids)
    assert ids == [{7, 8}, {9}, {10}, {1}]  # the tokenizer's own is 1


@pytest.mark.parametrize(
    ("file", "text", "error", "message"),
    [
        ("tokenizer.json", "{}", ModelError, "no usable tokenizer"),
        ("tokenizer.json", '{"version": "1', ModelError, "no usable tokenizer"),
        ("generation_config.json", '{"eos_tok', CheckpointError, "cannot be read"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    tiny: Callable[..., Path], tmp_path: Path, file: str, text: str, error: type[LlmoptError], message: str
) -> None:
    folder = Path(shutil.copytree(tiny("Llama"), tmp_path / "m"))
    (folder / file).write_text(text)
    with pytest.raises(error, match=message):
        Tokenizer(Checkpoint.open(folder))
