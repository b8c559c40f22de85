"""Policies that keep a part of the cache, against dense attention that does the same to transformers' own model."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM

from llmopt_cli.errors import CapacityError, LlmoptError, UsageError
from llmopt_cli.model.attention import paged_layers
from llmopt_cli.model.load import LoadedModel, load_model
from llmopt_cli.model.rotation import find_rotations
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.compression.slots import lift, slots_of
from llmopt_cli.runtime.compression.votes import pyramid
from llmopt_cli.runtime.journal import replay
from llmopt_cli.runtime.tokenizer import Tokenizer
from llmopt_cli.spec.checkpoint import Checkpoint
from llmopt_cli.spec.kv_policy import KvPolicy, Selecting, Streaming, parse_policy
from llmopt_cli.spec.recipe import Batching

BLOCK = 4
LENGTH = 150  # of the prompts
ANSWER = 24
CONTEXT = 96  # of streaming engines: less than their prompts
STREAM = Streaming(sinks=3, window=30)
SNAP = Selecting(budget=40, window=8)
PYRAMID = Selecting(budget=0.3, window=8, pyramid=True)
REFUSED = (
    ("opt", STREAM, "learned positions"),
    ("gpt2", STREAM, "learned positions"),
    ("llama-rope-dynamic", STREAM, "depend on the length (dynamic)"),
    ("mistral-window", SNAP, "limits attention to a window"),
    ("deepseek-v3", PYRAMID, "(MLA)"),
    ("qwen3", Streaming(window=4000), "the context is 256"),
)
PROMPTS = [[(7 * i * i + 13 * i + 5 * seed) % 500 + 7 for i in range(LENGTH + seed)] for seed in range(3)]


class Dense:
    """transformers' model with dense attention under a policy: all keys are kept, and looked up by its rule."""

    def __init__(self, folder: Path, policy: KvPolicy) -> None:
        AttentionInterface.register("dense_policy", self.attend)
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="dense_policy"
        ).eval()
        self.policy, self.kept = policy, dict[Any, list[tuple[Tensor, Tensor]]]()
        self.turn = sys.modules[type(self.model).__module__].apply_rotary_pos_emb

    @torch.inference_mode()
    def says(self, prompt: list[int], answer: list[int]) -> bool:
        """Whether each token of the answer is the likeliest behind those before it."""
        self.kept.clear()
        known = [*prompt, *answer[:-1]]
        pieces = [known] if isinstance(self.policy, Streaming) else [prompt, *([token] for token in answer[:-1])]
        rows, at = [], 0
        for piece in pieces:
            places = torch.arange(at, at := at + len(piece))[None]
            rows.append(self.model(input_ids=torch.tensor([piece]), position_ids=places, use_cache=False).logits[0])
        return torch.cat(rows)[len(prompt) - 1 :].argmax(-1).tolist() == answer

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        how = self._stream if isinstance(self.policy, Streaming) else self._select
        groups = q.shape[1] // k.shape[1]
        out = [
            how(module, head, q[0, head * groups : (head + 1) * groups] * scaling, k[0, head], v[0, head])
            for head in range(k.shape[1])
        ]
        return torch.cat(out)[None].transpose(1, 2), None

    def _stream(self, module: Any, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Every query of a text sees sinks that have moved up to its window, and the window."""
        assert isinstance(self.policy, Streaming)
        sinks = -(-self.policy.sinks // BLOCK) * BLOCK
        stride = max(1, self.policy.window // 4 // BLOCK) * BLOCK
        rows = []
        for at in range(q.shape[1]):
            start = max(sinks, (at // stride * stride - self.policy.window) // BLOCK * BLOCK)
            places = torch.full((1, sinks), start - sinks)
            cos, sin = self.model.base_model.rotary_emb(k, places)
            moved = self.turn(k[None, None, :sinks], k[None, None, :sinks], cos, sin)[0][0, 0]
            keys, values = torch.cat((moved, k[start : at + 1])), torch.cat((v[:sinks], v[start : at + 1]))
            if at < sinks:
                keys, values = k[: at + 1], v[: at + 1]
            rows.append((q[:, at] @ keys.T).softmax(-1) @ values)
        return torch.stack(rows, dim=1)

    def _select(self, module: Any, head: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """A prompt sees all; what follows sees what the prompt's end looked at most."""
        assert isinstance(self.policy, Selecting)
        cache = self.kept.setdefault(module, [])
        if len(k) == 1:
            keys, values = (torch.cat(pair) for pair in zip(cache[head], (k, v), strict=True))
            cache[head] = keys, values
            return (q @ keys.T).softmax(-1) @ values
        length, window = len(k), self.policy.window
        weights = (q @ k.T).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        votes = weights[:, -window:, : length - window].sum((0, 1)).tolist()
        pooled = [sum(near := votes[max(0, i - 2) : i + 3]) / len(near) for i in range(len(votes))]
        best = sorted(range(len(pooled)), key=lambda i: -pooled[i])[: self._slots(module, length) - window]
        places = sorted(best) + list(range(length - window, length))
        cache.append((k[places], v[places]))
        return weights @ v

    def _slots(self, module: Any, length: int) -> int:
        assert isinstance(self.policy, Selecting)
        if not self.policy.pyramid:
            return int(self.policy.budget)
        average = math.ceil(self.policy.budget * length) // BLOCK
        pages = pyramid(self.policy, self.model.config.num_hidden_layers, length, average * BLOCK, BLOCK)
        return pages[int(module.layer_idx)] * BLOCK


@pytest.fixture(scope="module")
def load(strong: Callable[[str], Path]) -> Callable[[str], tuple[Path, Checkpoint, LoadedModel, Tokenizer]]:
    known: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name not in known:
            checkpoint = Checkpoint.open(strong(name))
            known[name] = (
                strong(name),
                checkpoint,
                load_model(checkpoint, "float32", "cpu"),
                Tokenizer(checkpoint, False),
            )
        return known[name]

    return get


@pytest.fixture
def engine(load: Any, request: pytest.FixtureRequest) -> Iterator[Callable[..., Engine]]:
    made: list[Engine] = []

    def make(name: str = "llama-rope-llama3", kv: str = "auto", **limits: Any) -> Engine:
        limits = {"max_num_seqs": 4, "block_size": BLOCK, "max_num_batched_tokens": 64} | limits
        _, checkpoint, loaded, tokenizer = load(name)
        made.append(Engine(checkpoint, loaded, tokenizer, Batching(**limits), kv))
        return made[-1]

    yield make
    for one in made:
        one.check_integrity()
        assert one.stats().kv_cache_usage == 0
        one.close()


def asked(policy: KvPolicy | None, **others: Any) -> SamplingParams:
    return SamplingParams(max_tokens=ANSWER, ignore_eos=True, kv_policy=policy, **others)


def answers(engine: Engine, prompts: list[list[int]], *params: SamplingParams) -> list[list[int]]:
    each = params * len(prompts) if len(params) == 1 else params
    return [list(output.token_ids) for output in engine.generate(prompts, list(each))]


@pytest.mark.parametrize("name", ["llama-rope-llama3", "gpt-neox", "glm"])
def test_streaming_says_what_dense_attention_says(load: Any, engine: Any, name: str) -> None:
    """Prompts are longer than the context; rotations in halves, of a part of the head, and in pairs."""
    dense, found = Dense(load(name)[0], STREAM), []
    for budget in (16, 64):
        streaming = engine(name, max_model_len=CONTEXT, max_num_batched_tokens=budget)
        found.append(answers(streaming, PROMPTS[:2], asked(STREAM)))
        found.append(answers(streaming, PROMPTS[:2], asked(STREAM)))  # their heads come from the prefix cache
        assert streaming.stats().prefix_cache_hits > 0
    assert found == [found[0]] * 4
    assert all(dense.says(*pair) for pair in zip(PROMPTS, found[0], strict=False))


@pytest.mark.parametrize("policy", [SNAP, PYRAMID], ids=["snapkv", "pyramidkv"])
@pytest.mark.parametrize("budget", [13, 256])
def test_selecting_says_what_dense_attention_says(load: Any, engine: Any, policy: Selecting, budget: int) -> None:
    dense = Dense(load("qwen3")[0], policy)
    found = answers(engine("qwen3", max_num_batched_tokens=budget), PROMPTS[:2], asked(policy))
    assert all(dense.says(*pair) for pair in zip(PROMPTS, found, strict=False))


@pytest.mark.parametrize("policy", [STREAM, SNAP, PYRAMID], ids=str)
def test_what_others_share_is_left_as_it_was(engine: Any, policy: KvPolicy) -> None:
    """Plain requests with the same prompt, before, beside and behind one with a policy."""
    one, plain = engine(), asked(None)
    expected, kept = (answers(one, PROMPTS[:1], asked(p, cache_salt=f"{p}")) for p in (None, policy))
    assert kept != expected, "the policy is at work"
    assert answers(one, [PROMPTS[0]] * 3, asked(policy), plain, asked(policy)) == [*kept, *expected, *kept]
    assert answers(one, PROMPTS[:1], plain) == expected
    assert one.stats().prefix_cache_hits > 0


@pytest.mark.parametrize("policy", [STREAM, replace(SNAP, budget=0.6), replace(PYRAMID, budget=0.6)], ids=str)
@pytest.mark.parametrize("kv", ["auto", "int8"])
def test_preempted_requests_compress_again(engine: Any, policy: KvPolicy, kv: str) -> None:
    """A plain request that came first grows until there is no room for what the others keep."""
    context, blocks = (128, 34) if isinstance(policy, Streaming) else (256, 66)
    params = [replace(asked(one), max_tokens=100) for one in (None, policy, policy, policy)]
    prompts = [PROMPTS[0][:20], *PROMPTS]
    roomy = engine(kv=kv, enable_prefix_caching=False, max_model_len=context)
    expected = [answers(roomy, [prompt], one)[0] for prompt, one in zip(prompts, params, strict=True)]
    memory = blocks * roomy.cache_size.block_bytes
    small = engine(kv=kv, enable_prefix_caching=False, max_model_len=context, kv_cache_memory_bytes=memory)
    small._state.expected = 0.0  # nothing is kept free for answers to grow into
    assert answers(small, prompts, *params) == expected
    assert small.stats().num_preemptions > 0


@pytest.mark.parametrize("kv", ["int8", "fp8"])
def test_quantized_caches_hold_what_is_kept(engine: Any, kv: str) -> None:
    """Codes are moved with their scales: what a prompt keeps is bit for bit what it had."""
    one = engine(kv=kv, enable_prefix_caching=False)
    for policy in (STREAM, SNAP, PYRAMID):
        assert len(answers(one, PROMPTS[:1], asked(policy))[0]) == ANSWER
    whole = Selecting(budget=LENGTH - 1, window=LENGTH - 1)  # all but the first token is kept
    kept, plain = (one.add_request(PROMPTS[0], asked(policy)) for policy in (whole, None))
    requests = [one._answers.live[name].request for name in (kept, plain)]
    while len(requests[1].output_ids) < 2:
        one.step()
    moved, still = (slots_of(request.blocks, BLOCK, LENGTH, one.device) for request in requests)
    for layer in one._layers:
        for pages in (layer.k, layer.v):
            assert pages is not None
            for found, expected in zip(lift(pages, moved[:-1]), lift(pages, still[1:]), strict=True):
                assert found is not None
                assert expected is not None
                assert torch.equal(found, expected)
    one.abort_all()


@pytest.mark.parametrize("name", ["llama-rope-yarn", "gpt-neox", "glm", "phi"])
def test_turned_keys_are_those_of_the_new_place(load: Any, name: str) -> None:
    loaded = load(name)[2]
    layers, keys = paged_layers(loaded.model), list[Tensor]()
    rotations = find_rotations(loaded, layers)
    for layer in layers:
        layer.watcher = lambda _, key, __: keys.append(key.clone())
    with torch.inference_mode():
        for place in (5, 1005):
            loaded.logits(torch.tensor([99]), torch.tensor([place]))
    for layer, rotation, before, after in zip(layers, rotations, keys, keys[len(layers) :], strict=False):
        layer.watcher = None
        assert not torch.allclose(before, after, atol=1e-2)
        torch.testing.assert_close(rotation.turn(before, 1000), after, atol=1e-4, rtol=1e-4)


def test_streaming_takes_as_many_blocks_however_long_it_runs(engine: Any) -> None:
    one = engine(max_model_len=CONTEXT, enable_prefix_caching=False)
    name, used = one.add_request(PROMPTS[0], SamplingParams(max_tokens=700, ignore_eos=True, kv_policy=STREAM)), []
    while name in one._answers.live:
        one.step()
        used.append(one._state.blocks.num_blocks - one._state.blocks.num_free)
    assert len(used) > 700
    assert max(used[-201:-1]) == max(used[200:400]) <= STREAM.most_cached(BLOCK) // BLOCK


def test_tables_are_made_when_a_block_is_added(engine: Any) -> None:
    one, made = engine(), list[Any]()
    name = one.add_request(PROMPTS[0], replace(asked(PYRAMID), max_tokens=2 + 3 * BLOCK))
    while one.has_work():
        one.step()
        made += [tables for request, tables in one._compressor._tables.items() if request.request_id == name]
    assert 3 <= len({id(tables) for tables in made}) <= 4
    assert len(made) == 1 + 3 * BLOCK


def test_prompts_are_scored_under_a_policy(engine: Any) -> None:
    one, scored = engine(max_model_len=CONTEXT), SamplingParams(max_tokens=1, prompt_logprobs=0, kv_policy=STREAM)
    [output] = one.generate(PROMPTS[:1], scored)
    assert len(output.prompt_logprobs or ()) == LENGTH - 1


def test_answers_of_one_prompt_are_drawn_apart(engine: Any) -> None:
    one, params = engine(), asked(SNAP, temperature=1.0, seed=3)
    alone = answers(one, [PROMPTS[0]] * 2, params, params.child(1))
    first = one.add_request(PROMPTS[0], params, "a")
    one.add_request(PROMPTS[0], params.child(1), "b", twin=first)
    found: dict[str, list[int]] = {}
    while one.has_work():
        found |= {output.request_id: list(output.token_ids) for output in one.step()}
    assert [found["a"], found["b"]] == alone


def test_a_log_of_policies_is_planned_again(engine: Any, tmp_path: Path) -> None:
    one = engine(max_model_len=180)
    one.record(tmp_path / "log")
    answers(one, PROMPTS, asked(STREAM), asked(SNAP), asked(PYRAMID))
    assert replay(tmp_path / "log").difference is None


@pytest.mark.parametrize(("name", "policy", "reason"), REFUSED)
def test_what_a_model_can_not_keep_is_refused(engine: Any, name: str, policy: KvPolicy, reason: str) -> None:
    with pytest.raises((UsageError, CapacityError)) as caught:
        engine(name).check([7], asked(policy))
    assert reason in caught.value.message


def test_learned_positions_can_be_selected(engine: Any) -> None:
    assert len(answers(engine("opt"), PROMPTS[:1], asked(SNAP))[0]) == ANSWER


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("snapkv:budget=16,window=32", "budget 16 is below the window of 32"),
        ("snapkv:budget=1.5", "a whole number or a share"),
        ("snapkv:kernel=4", "kernel must be odd"),
        ("streaming:sinks=-1", "sinks must be at least 0"),
        ("streaming:window=many", "window must be a number, not `many`"),
        ("streaming:budget=4", "streaming has no setting `budget`, but sinks, window"),
        ("h2o", "unknown kv_policy `h2o`"),
    ],
)
def test_what_is_misspelt_is_refused(text: str, reason: str) -> None:
    with pytest.raises(LlmoptError) as caught:
        parse_policy(text)
    assert reason in caught.value.message


def test_policies_are_spelt_as_they_are_read() -> None:
    for policy in (STREAM, SNAP, PYRAMID):
        assert parse_policy(str(policy)) == policy
    assert parse_policy("none") is None
    with pytest.raises(UsageError, match="kv_policy can't be combined with beam search"):
        SamplingParams(beams=2, kv_policy=SNAP)


@pytest.mark.parametrize("layers", [1, 2, 7, 32])
def test_a_pyramid_falls_and_keeps_the_total(layers: int) -> None:
    for kept in (48, 256, 1024):
        pages = pyramid(Selecting(budget=kept, pyramid=True), layers, 4096, kept, 16)
        assert sum(pages) * 16 == layers * kept
        assert sorted(pages, reverse=True) == list(pages)
        assert pages[-1] * 16 >= 32
