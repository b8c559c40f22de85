"""KV policies at the door: what files refuse already, and when the model is tried. Their flags, and announcements."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmopt_cli.commands.generate import generate
from llmopt_cli.commands.serve import _announce
from llmopt_cli.errors import CapacityError, LlmoptError, UsageError
from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import load_model
from llmopt_cli.model.rotation import find_rotations
from llmopt_cli.output import Output
from llmopt_cli.runtime import AsyncEngine, Engine, SamplingParams
from llmopt_cli.runtime.compression import compressor, door
from llmopt_cli.runtime.compression.door import refuse_unfit_policy
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.server.app import run
from llmopt_cli.server.service import Settings
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting
from llmopt_cli.spec.recipe import Batching, Recipe, Speculation
from tests.runtime.test_kv_policies import REFUSED, STREAM

BATCHING = Batching(max_num_seqs=4, block_size=4, max_num_batched_tokens=64)
SNAP = Selecting(budget=12, window=8)
PROMPT = [(7 * i * i + 13 * i) % 500 + 7 for i in range(60)]
Make = Callable[..., Engine]


@pytest.fixture
def engine(strong: Callable[[str], Path]) -> Iterator[Make]:
    made: list[Engine] = []

    def make(name: str, speculation: Speculation | None = None) -> Engine:
        checkpoint = Checkpoint.open(strong(name))
        loaded = load_model(checkpoint, "float32", "cpu")
        made.append(Engine(checkpoint, loaded, Tokenizer(checkpoint), BATCHING, speculation=speculation))
        return made[-1]

    yield make
    for one in made:
        one.close()


def asked(policy: KvPolicy | None) -> SamplingParams:
    return SamplingParams(max_tokens=6, ignore_eos=True, kv_policy=policy)


def tried(engine: Engine) -> int:
    """How often its model ran outside of steps."""
    return sum(layer.calls for layer in engine._layers)


def test_the_model_is_tried_when_somebody_first_wants_keys_turned(engine: Make, strong: Any) -> None:
    checkpoint = Checkpoint.open(strong("qwen3"))
    loaded = load_model(checkpoint, "float32", "cpu")
    before = sum(layer.calls for layer in paged_layers(loaded.model))
    one = Engine(checkpoint, loaded, Tokenizer(checkpoint), BATCHING)
    one.generate([PROMPT] * 2, [asked(None), asked(SNAP)])
    assert tried(one) == before
    one.check(PROMPT, asked(STREAM))
    once = tried(one)
    assert once > before
    one.generate([PROMPT], asked(STREAM))
    assert tried(one) == once
    one.close()


def test_a_server_tries_the_model_on_the_engines_thread(engine: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it would run in the middle of a step. Who asks in vain is told, and others go on."""
    monkeypatch.setattr(door, "LEARNED_TABLE", re.compile("what no file has"))
    threads: list[str] = []

    def noted(*arguments: Any) -> Any:
        threads.append(threading.current_thread().name)
        return find_rotations(*arguments)

    monkeypatch.setattr(compressor, "find_rotations", noted)
    turns, learnt = engine("qwen3"), engine("opt")

    async def ask(running: AsyncEngine, policy: KvPolicy | None) -> tuple[int, ...]:
        tokens: tuple[int, ...] = ()
        async for output in running.stream(PROMPT, asked(policy)):
            tokens = tuple(output.token_ids)
        return tokens

    async def work() -> None:
        async with AsyncEngine(turns) as running:
            found = await asyncio.gather(*(ask(running, policy) for policy in (None, STREAM, None, STREAM)))
        expected = [tuple(output.token_ids) for output in turns.generate([PROMPT] * 2, [asked(None), asked(STREAM)])]
        assert found == expected * 2
        async with AsyncEngine(learnt) as running:
            plain = asyncio.create_task(ask(running, None))
            for _ in range(2):
                with pytest.raises(UsageError, match="learned positions"):
                    await ask(running, STREAM)
            assert len(await plain) == 6

    asyncio.run(asyncio.wait_for(work(), 60))
    assert threads == ["llmopt-engine"] * 2


@pytest.mark.parametrize(("name", "policy", "reason"), REFUSED)
def test_what_files_tell_is_refused_before_weights_are_read(
    strong: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, name: str, policy: KvPolicy, reason: str
) -> None:
    """By `generate`, and by a server that is to give all requests such a policy."""
    monkeypatch.setattr(Engine, "from_recipe", lambda *_, **__: pytest.fail("it was loaded"))
    folder = str(strong(name))
    attempts: list[Callable[[], None]] = [
        lambda: generate(folder, ["x"], kv_policy=str(policy), quiet=True),
        lambda: run(Recipe(folder), Settings(port=0, kv_policy=policy), False, lambda _: None, {}),
    ]
    for attempt in attempts:
        with pytest.raises((UsageError, CapacityError)) as caught:
            attempt()
        assert reason in caught.value.message
        assert caught.value.hint


@pytest.mark.parametrize("name", ["phi", "gpt-neox", "glm", "qwen3", "llama-rope-yarn"])
def test_what_files_do_not_tell_is_let_in(strong: Callable[[str], Path], name: str) -> None:
    refuse_unfit_policy(STREAM, Checkpoint.open(strong(name)), BATCHING)


def test_generate_takes_speculation_as_json(tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    texts = []
    for config in (None, '{"method": "suffix", "num_speculative_tokens": 3, "adaptive": false}'):
        generate(str(tiny("Llama")), ["It was"], 12, dtype="float32", speculative_config=config, quiet=True)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"speculative_config": '{"method": "ngram", "num_speculative_tokens": "many"}'}, "must be a whole number"),
        ({"speculative_config": '{"method": "ngram", "adaptive": 1}'}, "adaptive must be true or false, not 1"),
        ({"speculative_config": '{"method": 3}'}, "method must be a text, not 3"),
        ({"speculative_config": ""}, "is no JSON"),
        ({"spec_method": "ngram", "spec_tokens": 0}, "must lie in 1..64, not 0"),
        ({"spec_method": "ngram", "spec_tokens": 1000}, "must lie in 1..64, not 1000"),
        ({"spec_tokens": 3}, "needs a model"),
        ({"kv_policy": ""}, "unknown kv_policy ``"),
    ],
)
def test_bad_flags_are_refused_with_a_hint(flags: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        generate("demo", ["x"], **flags)
    assert reason in caught.value.message
    assert caught.value.hint


def test_a_damaged_tokenizer_is_refused(strong: Callable[[str], Path], tmp_path: Path) -> None:
    source = strong("qwen3")
    for file in source.iterdir():
        (tmp_path / file.name).symlink_to(file)
    damaged = json.loads((source / "tokenizer.json").read_text())
    damaged["model"]["vocab"].popitem()
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(damaged))
    with pytest.raises(LlmoptError, match="has no usable tokenizer: Token"):
        Tokenizer(Checkpoint.open(tmp_path))


def test_drafts_and_policy_are_announced(engine: Make, capsys: pytest.CaptureFixture[str]) -> None:
    plain = engine("qwen3").startup_report()
    drafted = engine("qwen3", Speculation(method="suffix", num_speculative_tokens=3, adaptive=False)).startup_report()
    assert plain["speculation"] is None
    assert drafted["speculation"] == {
        "method": "suffix",
        "model": "",
        "num_speculative_tokens": 3,
        "adaptive": False,
    }
    _announce(Output(), plain | {"kv_policy": None, "url": "somewhere"})
    assert "drafts" not in (said := capsys.readouterr().err)
    assert "KV policy" not in said
    _announce(Output(), drafted | {"kv_policy": str(SNAP), "url": "somewhere"})
    said = capsys.readouterr().err
    assert "up to 3 tokens by suffix in every step" in said
    assert "snapkv:budget=12,window=8,kernel=5 for requests that name none" in said
