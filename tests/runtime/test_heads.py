"""Heads that draft: their files, and what they propose."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from llmopt_cli.errors import CheckpointError, ModelError
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.runtime.request import Request, SamplingParams
from llmopt_cli.runtime.scheduler import Chunk
from llmopt_cli.runtime.speculative.eagle import Eagle, angles
from llmopt_cli.runtime.speculative.heads import EAGLE_FILE, MEDUSA_FILE, Heads, write_heads
from llmopt_cli.runtime.speculative.heads_output import commonest, output_matrix
from llmopt_cli.runtime.speculative.medusa import Medusa
from llmopt_cli.runtime.speculative.train_eagle import EaglePupil
from llmopt_cli.runtime.speculative.train_job import eagle_config
from llmopt_cli.spec.checkpoint import Checkpoint
from tests.runtime.made_heads import EAGLE, MEDUSA, SIZE, VOCABULARY, eagle_tensors, medusa_tensors

TINY = {"hidden_size": SIZE, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def base(tiny: Callable[..., Path]) -> Checkpoint:
    return Checkpoint.open(tiny("Llama", **TINY))


@pytest.fixture(scope="module")
def loaded(base: Checkpoint) -> LoadedModel:
    return load_model(base)


@pytest.fixture
def medusa(tmp_path: Path) -> Write:
    """Writes random Medusa heads as they are published."""

    def write(size: int = SIZE, **config: Any) -> Path:
        return _folder(tmp_path / "medusa", MEDUSA | config, medusa_tensors(size), MEDUSA_FILE)

    return write


@pytest.fixture
def eagle(tmp_path: Path) -> Write:
    """Writes a random EAGLE head as they are published, with an embedding that nobody needs."""

    def write(more: dict[str, Tensor] | None = None, **config: Any) -> Path:
        return _folder(tmp_path / "eagle", EAGLE | config, eagle_tensors(EAGLE | config) | (more or {}), EAGLE_FILE)

    return write


def _folder(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], file: str) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / file)
    return folder


def test_heads_are_known_by_what_their_folder_holds(base: Checkpoint, medusa: Write, eagle: Write) -> None:
    folder = eagle()
    assert (Heads.open(medusa(), base).kind, Heads.open(folder, base).kind) == ("medusa", "eagle")
    with pytest.raises(ModelError, match="holds eagle heads, not medusa"):
        Heads.open(folder, base, "medusa")
    with pytest.raises(ModelError, match="holds no heads that draft"):
        Heads.open(base.path, base)


def test_heads_for_another_model_are_refused_by_their_headers(base: Checkpoint, medusa: Write, eagle: Write) -> None:
    wanted = "for a model of hidden size 64 with 4,096 tokens, and `.*` has 32 and 4,096"
    with pytest.raises(ModelError, match=wanted) as refused:
        Heads.open(medusa(size=64), base)
    assert "llmopt train-heads" in str(refused.value.hint)
    with pytest.raises(ModelError, match="of hidden size 32 with 999 tokens"):
        Heads.open(eagle(vocab_size=999), base)


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"num_hidden_layers": 2}, {}, "one layer"),
        ({"intermediate_size": 41}, {}, r"F32 \[40, 32\] where config.json makes it \[41, 32\]"),
        ({}, {"fc.bias": torch.ones(3)}, r"`fc.bias` of `eagle` is F32 \[3\]"),
        ({}, {"layers.0.input_layernorm.weight": torch.ones(SIZE)}, "which eagle heads of this format do not have"),
    ],
)
def test_what_an_eagle_head_is_not(
    base: Checkpoint, eagle: Write, config: dict[str, Any], more: dict[str, Tensor], words: str
) -> None:
    folder = eagle(more)
    (folder / "config.json").write_text(json.dumps(EAGLE | config))
    with pytest.raises((ModelError, CheckpointError), match=words):
        Heads.open(folder, base)


def test_medusa_heads_that_are_missing_are_named(base: Checkpoint, medusa: Write) -> None:
    with pytest.raises(CheckpointError, match=r"lacks `3.0.linear.weight`"):
        Heads.open(medusa(medusa_num_heads=4), base)


def test_a_map_to_tokens_that_do_not_exist_is_refused(base: Checkpoint, eagle: Write) -> None:
    heads = Heads.open(eagle({"token_map": torch.tensor([5, VOCABULARY])}), base)
    with pytest.raises(CheckpointError, match="names tokens beyond the 4,096 there are"):
        heads.tensors(torch.float32, torch.device("cpu"))


def test_fewer_heads_may_be_used_than_are_stored(base: Checkpoint, medusa: Write, loaded: LoadedModel) -> None:
    proposer = Medusa(Heads.open(medusa(medusa_num_heads=1), base), loaded)
    request = requests_of(torch.ones(1, 4, dtype=torch.long))[0]
    proposer.see(step([request], [0]), torch.randn(3, SIZE))
    assert len(proposer.propose([request], [3])[0].tokens) == 1


def requests_of(tokens: Tensor) -> list[Request]:
    """One that decodes for each row: all but its last token are computed."""
    made = [Request(str(index), row, len(row), SamplingParams()) for index, row in enumerate(tokens.tolist())]
    for one in made:
        one.num_computed = one.num_tokens - 1
    return made


def step(requests: Sequence[Request], starts: Sequence[int], drafts: int = 0) -> list[Chunk]:
    """What ran so that these requests are where they are, and behind them wrong drafts."""
    return [
        Chunk(one.request_id, start, one.num_computed - start + drafts, samples=True, drafts=drafts)
        for one, start in zip(requests, starts, strict=True)
    ]


def test_each_medusa_head_says_what_its_blocks_make_of_the_last_state(
    base: Checkpoint, loaded: LoadedModel, medusa: Write
) -> None:
    folder, generator = medusa(), torch.Generator().manual_seed(3)
    stored = load_file(folder / "medusa_lm_head.safetensors")
    proposer = Medusa(Heads.open(folder, base), loaded)
    requests = requests_of(torch.randint(0, VOCABULARY, (3, 5), generator=generator))
    states = torch.randn(12 + 6, SIZE, generator=generator)  # 4 and 2 drafts of each
    proposer.see(step(requests, [0, 0, 0], drafts=2), states)
    found = proposer.propose(requests, [3, 0, 9])
    for row, draft, length in ((3, found[0], 3), (15, found[2], 3)):
        expected = []
        for head in range(length):
            x = states[row]
            for layer in range(2):
                weight, bias = (stored[f"{head}.{layer}.linear.{part}"] for part in ("weight", "bias"))
                x = x + F.silu(weight @ x + bias)
            expected.append(int((stored[f"{head}.2.weight"] @ x).argmax()))
        assert draft.tokens == tuple(expected)
        assert draft.chances is None
    assert found[1].tokens == ()
    requests[0].num_computed += 3  # a state that nobody saw
    proposer.forget("2")
    assert [draft.tokens for draft in proposer.propose(requests, [2, 0, 2])] == [(), (), ()]


class Plain:
    """The same EAGLE head in transformers' own layer, over whole sequences."""

    def __init__(self, folder: Path, loaded: LoadedModel) -> None:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

        stored = load_file(folder / "model.safetensors")
        config = LlamaConfig.from_dict({**EAGLE, "attn_implementation": "eager"})
        config._attn_implementation = "eager"
        self.layer = LlamaDecoderLayer(config, 0).eval()
        inner = {name.removeprefix("layers.0."): one for name, one in stored.items() if name.startswith("layers.0.")}
        self.layer.load_state_dict(inner | {"input_layernorm.weight": torch.ones(SIZE)})
        self.layer.input_layernorm = torch.nn.Identity()
        self.turn, self.fc = LlamaRotaryEmbedding(config), stored["fc.weight"]
        self.embed, self.head = loaded.model.get_input_embeddings(), loaded.model.get_output_embeddings()

    @torch.no_grad()
    def drafts(self, tokens: list[int], states: Tensor, count: int, first: int = 0) -> tuple[int, ...]:
        """`count` tokens behind `tokens`, whose states (len - 1 - first, H) are known from position `first` on."""
        known = list(tokens)
        for _ in range(count):
            places = torch.arange(first, first + len(states))[None]
            x = F.linear(torch.cat((self.embed(torch.tensor(known[first + 1 :])), states), -1), self.fc)[None]
            mask = torch.full((len(states), len(states)), -torch.inf).triu(1)[None, None]
            angles_of = self.turn(x, places)
            out = self.layer(x, attention_mask=mask, position_embeddings=angles_of, position_ids=places)
            guess = (out[0] if isinstance(out, tuple) else out)[0, -1:] if out[0].dim() == 3 else out[:, -1]
            states = torch.cat((states, guess))
            known.append(int(self.head(guess).argmax()))
        return tuple(known[len(tokens) :])


def test_an_eagle_drafts_as_the_layer_says_whatever_was_rejected(
    base: Checkpoint, loaded: LoadedModel, eagle: Write
) -> None:
    folder, generator = eagle(), torch.Generator().manual_seed(4)
    plain = Plain(folder, loaded)
    proposer = Eagle(Heads.open(folder, base), loaded, num_blocks=24, block_size=4, budget=64, positions=64)
    tokens = torch.randint(0, VOCABULARY, (2, 20), generator=generator).tolist()
    states = torch.randn(2, 20, SIZE, generator=generator)
    requests = requests_of(torch.tensor(tokens)[:, :9])
    proposer.see(step(requests, [0, 0]), states[:, :8].flatten(0, 1))
    for drafts, grown in ((2, 1), (4, 3), (3, 2)):
        found = proposer.propose(requests, [7, 1])  # the other one has no room for seven
        for index, (request, draft) in enumerate(zip(requests, found, strict=True)):
            seen = states[index, : request.num_computed]
            assert draft.tokens == plain.drafts(request.token_ids, seen, [7, 1][index])
        assert [draft.tokens for draft in proposer.propose(requests, [7, 1])] == [draft.tokens for draft in found]
        starts = [one.num_computed for one in requests]
        for one, own in zip(requests, tokens, strict=True):
            one.token_ids += own[one.num_tokens : one.num_tokens + grown]
            one.num_computed += grown
        # As many states as known tokens, then those of drafts that did not stand.
        rows = [torch.cat((states[i, at : at + grown], torch.randn(drafts, SIZE))) for i, at in enumerate(starts)]
        proposer.see(step(requests, starts, drafts), torch.cat(rows))
    proposer.forget("0")
    proposer.forget("1")
    proposer._room.check_integrity([])


def test_an_eagle_works_with_what_it_saw(base: Checkpoint, loaded: LoadedModel, eagle: Write) -> None:
    folder, generator = eagle(), torch.Generator().manual_seed(5)
    plain = Plain(folder, loaded)
    proposer = Eagle(Heads.open(folder, base), loaded, num_blocks=5, block_size=4, budget=6, positions=64)
    requests = requests_of(torch.randint(0, VOCABULARY, (2, 12), generator=generator))
    states = torch.randn(2, 11, SIZE, generator=generator)
    assert proposer.propose(requests, [2, 2])[0].tokens == ()
    proposer.see(step(requests[:1], [7]), states[0, 7:])  # what comes before was found in a cache
    proposer.see(step(requests[1:], [0]), states[1])
    first, second = proposer.propose(requests, [2, 2])
    assert first.tokens == plain.drafts(requests[0].token_ids, states[0, 7:], 2, first=7)
    assert second.tokens == ()  # its past is longer than what runs at once, and is caught up with by and by
    while not second.tokens:
        first, second = proposer.propose(requests, [0, 2])
    assert second.tokens == plain.drafts(requests[1].token_ids, states[1], 2)
    assert proposer.propose(requests, [0, 10])[1].tokens == ()  # no room for that many


@pytest.fixture(scope="module")
def texts() -> Tensor:
    """(12, 32): words that come in one order, so that a model's states tell what comes next."""
    generator = torch.Generator().manual_seed(6)
    starts = torch.randint(0, 10, (12, 1), generator=generator)
    return 100 + (starts + torch.arange(32)) % 10


def test_what_an_eagle_learns_is_what_it_drafts(
    base: Checkpoint, loaded: LoadedModel, texts: Tensor, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config, embed = eagle_config(base, "float32"), loaded.model.get_input_embeddings()
    output = output_matrix(loaded)
    tokens = commonest(texts, VOCABULARY)
    pupil = EaglePupil(config, embed, output, tokens, angles(config, 64, torch.float32, loaded.device), steps=3)
    write_heads(tmp_path / "made", EAGLE_FILE, config, pupil.tensors())
    proposer = Eagle(Heads.open(tmp_path / "made", base), loaded, 8, 16, 64, 64)
    states = torch.randn(1, 32, SIZE)
    rows = output[tokens]
    for known in (2, 3, 11, 28):
        request = requests_of(texts[:1, :known])[0]
        proposer.see(step([request], [0]), states[0, : known - 1])
        draft = proposer.propose([request], [3])[0].tokens
        proposer.forget("0")
        # It learns along a text: along this one, what it learns is the very chain that it drafted.
        text = torch.cat((texts[:1, :known], torch.tensor([draft]), texts[:1, known + 3 :]), dim=1)
        with torch.no_grad():
            guesses = [tokens[F.linear(guess, rows).argmax(-1)[0]] for guess in pupil.unroll(text, states)]
        assert tuple(int(guess[known - 2 + place]) for place, guess in enumerate(guesses)) == draft
