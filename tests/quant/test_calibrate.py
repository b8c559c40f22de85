"""Texts into windows: no second BOS, no text on both sides, and errors that name the line."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from llmopt_cli.errors import UsageError
from llmopt_cli.quant.calibrate import CALIBRATION, EVALUATION, Corpus, refuse_overlap, sample, windows
from llmopt_cli.spec.checkpoint import BUNDLED

TOKENIZER = AutoTokenizer.from_pretrained(BUNDLED["demo"])
BOS = TOKENIZER.bos_token_id


@pytest.fixture
def corpus(tmp_path: Path) -> Callable[..., Corpus]:
    def make(*texts: str) -> Corpus:
        path = tmp_path / "some.jsonl"
        path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
        return Corpus.read(path)

    return make


def test_a_text_with_its_own_bos_gets_no_second_one(corpus: Callable[..., Corpus]) -> None:
    text = "<|begin_of_text|>The sea was calm." * 2
    ids = windows(corpus(text, text), TOKENIZER, 8).flatten().tolist()
    assert ids == (TOKENIZER(text, add_special_tokens=False)["input_ids"] * 2)[: len(ids)]
    assert ids[0] == BOS
    assert ids[1] != BOS


def test_windows_pack_all_texts_in_order_and_drop_only_the_rest(corpus: Callable[..., Corpus]) -> None:
    texts = ["<|begin_of_text|>one two three", "<|begin_of_text|>four", "<|begin_of_text|>five six seven eight"]
    stream = [token for text in texts for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    packed = windows(corpus(*texts), TOKENIZER, 4)
    assert packed.flatten().tolist() == stream[: len(stream) // 4 * 4]
    assert packed.shape[1] == 4


def test_a_plain_file_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("first line\n\nsecond line\n")
    assert Corpus.read(tmp_path / "a.txt").texts == ("first line\n\nsecond line\n",)


def test_samples_depend_on_the_seed_alone_and_are_drawn_once_each() -> None:
    tokens = torch.arange(40).view(20, 2)
    assert torch.equal(sample(tokens, 5, seed=1), sample(tokens, 5, seed=1))
    assert not torch.equal(sample(tokens, 5, seed=1), sample(tokens, 5, seed=2))
    assert sorted(sample(tokens, 99, seed=0).flatten().tolist()) == list(range(40))


def test_the_bundled_texts_have_nothing_in_common() -> None:
    fitted, judged = (set("\n".join(Corpus.read(path).texts).split("\n")) for path in (CALIBRATION, EVALUATION))
    shared = {line for line in fitted & judged if len(line) > 80}
    assert shared == set()
    refuse_overlap(Corpus.read(CALIBRATION), Corpus.read(EVALUATION))


def test_judging_on_the_calibration_text_is_refused() -> None:
    with pytest.raises(UsageError, match="shares 180 of its 180 texts"):
        refuse_overlap(Corpus.read(CALIBRATION), Corpus.read(CALIBRATION))


def test_the_hash_changes_with_any_text(corpus: Callable[..., Corpus]) -> None:
    assert corpus("a", "b").sha256 == corpus("a", "b").sha256
    assert corpus("a", "b").sha256 != corpus("ab").sha256


@pytest.mark.parametrize("line", ["{", '{"content": "x"}', '{"text": 3}', '"text"'])
def test_a_line_that_is_no_text_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(UsageError, match="line 2"):
        Corpus.read(tmp_path / "bad.jsonl")


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read"):
        Corpus.read(tmp_path / "none.txt")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(UsageError, match="holds no text"):
        Corpus.read(tmp_path / "empty.txt")


def test_a_text_too_short_for_two_windows_is_refused(corpus: Callable[..., Corpus]) -> None:
    with pytest.raises(UsageError, match="not two windows of 512"):
        windows(corpus("short"), TOKENIZER, 512)


def test_conversations_go_through_the_models_chat_template(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "The wind, sir."}]
    (tmp_path / "chat.jsonl").write_text("\n".join([json.dumps({"messages": turns})] * 20))
    rendered = TOKENIZER.apply_chat_template(turns, tokenize=False)
    assert "<|user|>" in rendered
    expected = TOKENIZER(rendered, add_special_tokens=False)["input_ids"] * 20
    found = windows(Corpus.read(tmp_path / "chat.jsonl"), TOKENIZER, 16)
    assert found.flatten().tolist() == expected[: found.numel()]


def test_conversations_for_a_tokenizer_without_a_template_are_refused(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "Hm?"}]}))
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED["demo"])
    tokenizer.chat_template = None
    with pytest.raises(UsageError, match="no chat template"):
        windows(Corpus.read(tmp_path / "chat.jsonl"), tokenizer, 16)


def test_a_data_set_is_read_from_a_folder_or_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "A clear night."}) + "\n")
    if importlib.util.find_spec("datasets") is None:
        with pytest.raises(UsageError, match="`datasets`"):
            Corpus.read(tmp_path / "set")
    else:
        assert Corpus.read(tmp_path / "set").texts == ("A clear night.",)
