"""With speculation an engine answers as without: token for token when greedy, in distribution when drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import pytest

from llmopt_cli.errors import LlmoptError, ModelError, UsageError
from llmopt_cli.model.load import load_model
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.journal import replay
from llmopt_cli.runtime.request import Grammar, Request, RequestOutput
from llmopt_cli.runtime.speculative.controller import Controller
from llmopt_cli.runtime.speculative.lookup import Suffix
from llmopt_cli.runtime.speculative.proposer import Draft, Proposer, Watching
from llmopt_cli.runtime.stats import Tally
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.recipe import Batching, Recipe, Speculation
from tests.runtime.made_heads import knowing_eagle, knowing_medusa

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
PROMPTS = [[(5 * i * i + 11 * i + 3 * length) % 90 + 7 for i in range(length)] for length in (5, 33, 70)]
PROMPTS.append([11, 12, 13, 14, 15] * 9)  # something to look up
SMALL = Batching(max_num_seqs=8, max_num_batched_tokens=32, block_size=8, max_model_len=256)
HEADS = ("medusa", "eagle")
METHODS = ("ngram", "suffix", "draft_model", *HEADS)


class Wild:
    """Proposes what comes to its mind, and every third time nothing."""

    in_turn = False

    def __init__(self) -> None:
        self._random = Random(3)

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        counts = [self._random.randrange(length + 1) if length else 0 for length in lengths]
        return [Draft(tuple(self._random.randrange(4000) for _ in range(count))) for count in counts]

    def forget(self, request_id: str) -> None:
        pass

    def close(self) -> None:
        pass


@dataclass
class Knowing(Wild):
    """Knows every answer beforehand, and is wrong at each tenth token."""

    answers: Sequence[Sequence[int]]

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        return [self._of(request, length) for request, length in zip(requests, lengths, strict=True)]

    def _of(self, request: Request, length: int) -> Draft:
        known = request.num_tokens
        text = next(one for one in self.answers if list(one[:known]) == request.token_ids)
        return Draft(tuple(token if place % 10 else 1 for place, token in enumerate(text[known:], known))[:length])


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path]) -> tuple[Path, Path]:
    """A model, and another of the same tokens that drafts for it."""
    return tiny("Llama", **SIZES, num_hidden_layers=3), tiny("Llama", **SIZES, num_hidden_layers=1)


@pytest.fixture(scope="module")
def folders(pair: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each method proposes with; the heads know most of what is said greedily."""
    checkpoint = Checkpoint.open(pair[0])
    loaded = load_model(checkpoint, "float32")
    engine = Engine(checkpoint, loaded, Tokenizer(checkpoint), SMALL)
    texts = list(zip(PROMPTS, answers(engine, GREEDY), strict=True))
    engine.close()
    folder = tmp_path_factory.mktemp("heads")
    heads = {
        "medusa": knowing_medusa(loaded, texts, folder / "medusa"),
        "eagle": knowing_eagle(loaded, texts, folder / "eagle"),
    }
    return {"draft_model": str(pair[1]), **{kind: str(path) for kind, path in heads.items()}}


@pytest.fixture(scope="module")
def make(pair: tuple[Path, Path], folders: dict[str, str]) -> Iterator[Callable[..., Engine]]:
    """Engines on that model, one after the other."""
    checkpoint = Checkpoint.open(pair[0])
    loaded, tokenizer = load_model(checkpoint, "float32"), Tokenizer(checkpoint)
    made: list[Engine] = []

    def engine(
        method: str | Proposer | None = None, batching: Batching = SMALL, tokens: int = 4, adapt: bool = False
    ) -> Engine:
        if made:
            made.pop().close()
        asked = None
        if isinstance(method, str):
            asked = Speculation(folders.get(method, ""), tokens, method=method, adaptive=adapt)
        made.append(Engine(checkpoint, loaded, tokenizer, batching, speculation=asked))
        if method is not None and not isinstance(method, str):
            made[0].draft_with(method, tokens, adapt)
        return made[0]

    yield engine
    made.pop().close()


def answers(engine: Engine, params: SamplingParams | Sequence[SamplingParams]) -> list[list[int]]:
    found = [list(output.token_ids) for output in engine.generate(PROMPTS, params)]
    engine.check_integrity()
    return found


def knower(method: str, said: Sequence[Sequence[int]]) -> str | Proposer:
    """A proposer that knows `said`, or the heads that know what is said greedily."""
    return method if method in HEADS else Knowing([[*pair[0], *pair[1]] for pair in zip(PROMPTS, said, strict=True)])


def tally_of(engine: Engine) -> Tally:
    tally = engine.stats().speculation
    assert tally is not None
    return tally


GREEDY = SamplingParams(max_tokens=30, ignore_eos=True)


@pytest.mark.parametrize("method", [*METHODS, "wild", "knowing"])
@pytest.mark.parametrize(("tokens", "budget"), [(1, 32), (5, 32), (5, 9)])
def test_greedy_answers_are_the_same(make: Callable[..., Engine], method: str, tokens: int, budget: int) -> None:
    """Prompts are cut into chunks, and with the small budget drafts are, too."""
    expected = answers(make(), GREEDY)
    proposer = {"wild": Wild(), "knowing": knower("knowing", expected)}.get(method, method)
    engine = make(proposer, replace(SMALL, max_num_batched_tokens=budget), tokens)
    assert answers(engine, GREEDY) == expected
    assert answers(engine, GREEDY) == expected  # now with prefix hits: nothing but verified tokens was cached
    assert engine.stats().prefix_cache_hits > 0
    engine.reset_prefix_cache()
    assert answers(engine, GREEDY) == expected
    tally = tally_of(engine)
    assert tally.drafts > 5
    assert tally.emitted == 3 * sum(len(answer) - 1 for answer in expected)
    if method in ("knowing", "medusa") and budget > 9:
        assert tally.length > 1 + 0.6 * tokens
    if method in ("knowing", *HEADS):
        assert tally.accepted > 0.2 * tally.tokens
        assert tally.accepted < tally.tokens


@pytest.mark.parametrize("method", [*METHODS, "wild"])
def test_greedy_answers_are_the_same_when_requests_are_preempted(make: Callable[..., Engine], method: str) -> None:
    expected = answers(make(), GREEDY)
    block = make().cache_size.block_bytes
    tight = replace(SMALL, max_num_batched_tokens=256, max_model_len=104, kv_cache_memory_bytes=24 * block)
    engine = make(Wild() if method == "wild" else method, tight)
    engine._state.expected = 0.0  # all are let in at once, although they will not fit
    assert answers(engine, GREEDY) == expected
    assert engine.stats().num_preemptions > 0
    if method in HEADS:
        assert tally_of(engine).accepted > 10


@pytest.mark.parametrize("method", [*METHODS, "wild", "knowing"])
@pytest.mark.parametrize("blocks", [0, 24], ids=["room for all", "preempted"])
def test_greedy_answers_are_the_same_whatever_the_controller_does(
    make: Callable[..., Engine], method: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It naps, compares, tries in earnest, drafts and pauses, each as often as can be."""
    for name, value in {"TRYING": 0.5, "NAP": 2, "EARNEST": 2, "LESSONS": 20, "LASTS": 1, "HOPELESS": 0.0}.items():
        monkeypatch.setattr(f"{Controller.__module__}.{name}", value)
    expected = answers(make(), GREEDY)
    room = blocks * make().cache_size.block_bytes
    tight = replace(SMALL, max_num_batched_tokens=256, max_model_len=104, kv_cache_memory_bytes=room) if room else SMALL
    proposer = {"wild": Wild(), "knowing": knower("knowing", expected)}.get(method, method)
    engine = make(proposer, tight, adapt=True)
    if blocks:
        engine._state.expected = 0.0  # all are let in at once, although they will not fit
    for _ in range(3):
        assert answers(engine, GREEDY) == expected
    assert bool(engine.stats().num_preemptions) == bool(blocks)
    tally = tally_of(engine)
    assert 0 < tally.drafts < tally.steps <= tally.emitted == 3 * len(PROMPTS) * (GREEDY.max_tokens - 1)


def test_a_reset_reaches_what_suffixes_remember(make: Callable[..., Engine]) -> None:
    engine = make("suffix")
    answers(engine, GREEDY)
    engine.reset_prefix_cache()
    engine.add_request(PROMPTS[0], GREEDY)
    for _ in range(4):
        engine.step()
    assert engine._speculator
    suffix = engine._speculator._proposer
    assert isinstance(suffix, Suffix)
    assert not suffix._ended
    assert not any(other.text for other in suffix._others.values())


class Seldom:
    """Lets heads see everything, but asks them at each `every`-th step alone; keeps what they said, drafts nothing."""

    def __init__(self, heads: Watching, every: int) -> None:
        self.see, self.forget, self.close, self.unseen, self.in_turn = (
            *(heads.see, heads.forget, heads.close),
            *(heads.unseen, heads.in_turn),
        )
        self.said: dict[tuple[str, int], Draft] = {}  # by request and how long its text was
        self._heads, self._every, self._steps = heads, every, 0

    def propose(self, requests: Sequence[Request], lengths: Sequence[int]) -> list[Draft]:
        self._steps += 1
        if self._steps % self._every == 0:
            for request, draft in zip(requests, self._heads.propose(requests, lengths), strict=True):
                self.said[request.request_id, request.num_tokens] = draft
        return [Draft()] * len(requests)


@pytest.mark.parametrize("method", HEADS)
def test_heads_recall_what_they_would_have_drafted(make: Callable[..., Engine], method: str) -> None:
    found = []
    for every in (1, 12):
        engine = make(method, replace(SMALL, max_num_batched_tokens=256))
        assert engine._speculator
        assert engine._speculator._watching
        seldom = Seldom(engine._speculator._watching, every)
        engine._speculator._proposer = engine._speculator._watching = seldom
        texts = {
            output.request_id: [*prompt, *output.token_ids]
            for prompt, output in zip(PROMPTS, engine.generate(PROMPTS, GREEDY), strict=True)
        }
        found.append(seldom.said)
    each_time, at_times = found
    assert not any(draft.recalled for draft in each_time.values()), "they were asked each time"
    recalled = {place: draft.recalled for place, draft in at_times.items() if draft.recalled}
    assert len(recalled) > len(PROMPTS)
    for (name, tokens), places in recalled.items():
        count = places[0][0]
        assert tokens - count > max([length for one, length in at_times if one == name and length < tokens], default=0)
        guesses = [each_time[name, length].tokens for length in range(tokens - count, tokens)]
        text = texts[name][:tokens]
        for place, (judged, right) in enumerate(places):
            before = [
                (guess, text[start:])
                for start, guess in enumerate(guesses, tokens - count)
                if len(text) - start > place and list(guess[:place]) == text[start : start + place]
            ]
            assert judged == len(before)
            assert right == sum(guess[place] == came[place] for guess, came in before)
    assert sum(places[0][1] for places in recalled.values()) > 10


def test_drafts_take_no_blocks_from_anyone(make: Callable[..., Engine]) -> None:
    block = make().cache_size.block_bytes
    few = replace(SMALL, max_model_len=104, kv_cache_memory_bytes=28 * block)
    counts = []
    for method in (None, Wild()):
        engine = make(method, few, tokens=8)
        answers(engine, GREEDY)
        counts.append(engine.stats().num_preemptions)
    assert counts[1] <= counts[0]


@pytest.mark.parametrize("method", ["knowing", *HEADS])
@pytest.mark.parametrize("most", range(1, 9))
def test_an_answer_ends_where_it_should_in_the_middle_of_a_draft(
    make: Callable[..., Engine], most: int, method: str
) -> None:
    whole = answers(make(), GREEDY)
    engine = make(knower(method, whole), tokens=6)
    assert answers(engine, replace(GREEDY, max_tokens=most)) == [answer[:most] for answer in whole]
    # A stop token, at its first occurrence.
    ends = [replace(GREEDY, stop_token_ids=(answer[most],)) for answer in whole]
    assert answers(engine, ends) == [answer[: answer.index(answer[most]) + 1] for answer in whole]


@pytest.mark.parametrize("method", ["knowing", *HEADS])
def test_stop_strings_end_a_text_in_the_middle_of_a_draft(make: Callable[..., Engine], method: str) -> None:
    plain = make().generate(PROMPTS, GREEDY)
    stops = [output.text[9:12] for output in plain]
    params = [replace(GREEDY, stop=(stop,)) for stop in stops]
    expected = [(output.text, output.token_ids) for output in make().generate(PROMPTS, params)]
    engine = make(knower(method, [output.token_ids for output in plain]), tokens=7)
    found = engine.generate(PROMPTS, params)
    assert [(output.text, output.token_ids) for output in found] == expected
    assert tally_of(engine).accepted > 0


@pytest.mark.parametrize("method", ["knowing", *HEADS])
@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5},
        {"min_tokens": 12, "stop_token_ids": tuple(range(100, 400))},
        {"grammar": Grammar("regex", "[a-z ]{5,40}")},
        {"logprobs": 2},
        {"allowed_token_ids": (300, 301, 302, 303), "presence_penalty": 1.0},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_shapes_logits_counts_at_every_position(
    make: Callable[..., Engine], changes: dict[str, object], method: str
) -> None:
    params = replace(GREEDY, **changes)  # type: ignore[arg-type]
    plain = make().generate(PROMPTS, params)
    engine = make(knower(method, [output.token_ids for output in plain]), tokens=5)
    found = engine.generate(PROMPTS, params)
    assert [one.token_ids for one in found] == [one.token_ids for one in plain]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in plain]
    for one, other in zip(found, plain, strict=True):
        assert [entry.token for entry in one.logprobs] == [entry.token for entry in other.logprobs]
        assert [e.logprob for e in one.logprobs] == pytest.approx([e.logprob for e in other.logprobs], abs=1e-3)
    tally = tally_of(engine)
    assert tally.drafts > 0
    if method == "knowing" or "allowed_token_ids" not in changes:  # heads know tokens that are not
        assert tally.accepted > 0


def test_outputs_of_a_step_hold_all_its_tokens(make: Callable[..., Engine]) -> None:
    expected = answers(make(), GREEDY)
    engine = make(knower("knowing", expected), tokens=5)
    engine.add_request(PROMPTS[0], GREEDY)
    outputs: list[RequestOutput] = []
    while engine.has_work():
        outputs += engine.step()
    assert sum(output.num_new_tokens for output in outputs) == len(expected[0])
    assert max(output.num_new_tokens for output in outputs) > 3
    assert "".join(output.delta for output in outputs) == outputs[-1].text


def test_a_log_of_drafts_replays(make: Callable[..., Engine], tmp_path: Path) -> None:
    engine = make("suffix")
    engine.record(tmp_path / "log")
    answers(engine, GREEDY)
    found = replay(tmp_path / "log")
    assert found.difference is None
    assert '"draft"' in (tmp_path / "log").read_text()


@pytest.mark.parametrize("method", ["draft_model", *HEADS])
def test_aborting_gives_everything_back(make: Callable[..., Engine], method: str) -> None:
    engine = make(method)
    for prompt in PROMPTS:
        engine.add_request(prompt, GREEDY)
    for _ in range(12):
        engine.step()
    engine.abort_all()
    engine.check_integrity()
    assert engine.stats().kv_cache_usage == 0
    assert engine.generate(PROMPTS[:1], GREEDY)[0].token_ids == tuple(answers(make(), GREEDY)[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"spec_method": "ngram", "spec_tokens": 0}, r"must lie in 1\.\.64, not 0"),
        ({"spec_method": "ngram", "spec_tokens": 1000}, r"must lie in 1\.\.64, not 1000"),
        ({"spec_method": "magic"}, "must be one of draft_model, ngram"),
        ({"spec_method": "eagle"}, "speculation by eagle needs a model"),
        ({"spec_tokens": 3}, "speculation by draft_model needs a model"),
        ({"speculative_config": "{"}, "is no JSON"),
        ({"speculative_config": '{"metod": "ngram"}'}, "no key `metod`"),
    ],
)
def test_wrong_settings_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Recipe.resolve(None, **flags)


def test_flags_win_over_the_configuration() -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 7, "prompt_lookup_max": 5}'
    found = Recipe.resolve(None, speculative_config=text, spec_tokens=3).speculation
    assert found == Speculation(method="ngram", num_speculative_tokens=3, prompt_lookup_max=5)


def test_a_draft_of_other_tokens_is_refused_before_any_weights_are_read(
    pair: tuple[Path, Path], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    (pair[0] / "model.safetensors").stat()
    with pytest.raises(ModelError, match=r"has a vocabulary of 512 tokens, not 4,096"):
        Engine.from_pretrained(pair[0], speculation=Speculation(str(tiny("Llama", **SIZES, vocab_size=512))))
    with pytest.raises(UsageError, match="drafts for itself"):
        Engine.from_pretrained(pair[0], speculation=Speculation(str(pair[0])))
    with pytest.raises(LlmoptError, match="nowhere"):
        Engine.from_pretrained(pair[0], speculation=Speculation(str(tmp_path / "nowhere")))
