"""With speculation tokens are drawn with the chances that they have without, whoever drafts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.runtime.logits import History, shape
from llmopt_cli.runtime.sampler import weights_of
from llmopt_cli.runtime.stats import Tally
from llmopt_cli.spec.recipe import Batching, Speculation
from tests.runtime.made_heads import drafts_of_few
from tests.runtime.test_verify import p_value

METHODS = ("ngram", "suffix", "draft_model", "medusa", "eagle")
WAYS = {
    "temperature": {"temperature": 2.0, "top_k": 6},
    "top_p": {"temperature": 2.5, "top_p": 0.8, "top_k": 6},
    "penalties": {"temperature": 2.0, "top_k": 6, "repetition_penalty": 1.4, "frequency_penalty": 0.6},
}
DRAWN = 500  # answers
PAIRS = (0, 1)  # places in an answer at which two neighbours are looked at together
LEVEL = 1e-4 / (len(METHODS) * len(WAYS) * len(PAIRS))
VOCABULARY = 512
FEW = (21, 22, 23)


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    """One of few tokens, nearly flat, so that many of them come."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return tiny("Llama", **sizes, vocab_size=VOCABULARY, num_hidden_layers=2)


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What methods propose with: a blurred copy of the model; heads that draft few tokens, by what they see."""
    folder = tmp_path_factory.mktemp("drafters")
    shutil.copytree(model, folder / "draft_model")
    random = torch.Generator().manual_seed(5)
    weights = load_file(model / "model.safetensors")
    blurred = {name: one + 0.3 * one.std() * torch.randn(one.shape, generator=random) for name, one in weights.items()}
    save_file(blurred, folder / "draft_model" / "model.safetensors", {"format": "pt"})
    for kind in ("medusa", "eagle"):
        drafts_of_few(kind, FEW, VOCABULARY, folder / kind)
    return {path.name: str(path) for path in folder.iterdir()}


@pytest.fixture(scope="module", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(method: str, model: Path, folders: dict[str, str]) -> Iterator[Engine]:
    asked = Speculation(folders.get(method, ""), 2, method=method, adaptive=False, prompt_lookup_min=1)
    batching = Batching(max_num_seqs=256, max_num_batched_tokens=2048, block_size=8, max_model_len=128)
    made = Engine.from_pretrained(model, dtype="float32", batching=batching, speculation=asked)
    yield made
    made.close()


@pytest.mark.parametrize("way", WAYS)
def test_drawn_tokens_are_distributed_as_the_model_says(method: str, engine: Engine, model: Path, way: str) -> None:
    """Neighbours in the first three tokens of many answers to one prompt, by the chance of each pair without drafts.

    The first token is drawn behind the prompt, the second is drafted behind it, and the third in the same draft, or in
    one of its own where the second did not stand. The fourth leaves room for both.
    """
    draw = Random(0)
    prompt = [draw.choice(FEW) for _ in range(60)]  # where every two of its tokens have been followed
    # What the prompt holds is likely, so that there is something to look up, and what few heads draft may stand.
    bias = () if method == "draft_model" else tuple((token, 40.0) for token in FEW)
    params = SamplingParams(max_tokens=4, ignore_eos=True, logit_bias=bias, **WAYS[way])  # type: ignore[arg-type]
    assert engine._speculator is not None
    tally = engine._speculator.tally = Tally()
    outputs = engine.generate([prompt] * DRAWN, [replace(params, seed=seed) for seed in range(DRAWN)])
    assert tally.tokens > DRAWN / 5
    assert 0.1 < tally.acceptance < 0.9
    assert all(0 < stood < tally.drafts for stood in tally.stood)
    found = torch.tensor([list(output.token_ids) for output in outputs])
    texts, chances = expected(model, prompt, params, 3)
    for place in PAIRS:
        counts = pairs(found, place, torch.ones(DRAWN, dtype=torch.float64))
        assert p_value(counts, pairs(texts, place, chances) * DRAWN) > LEVEL


def pairs(texts: Tensor, place: int, weights: Tensor) -> Tensor:
    """What each pair of tokens weighs at `place` of `texts` int64 (N, L), each of a weight: float64 [V * V]."""
    cells = torch.zeros(VOCABULARY**2, dtype=torch.float64)
    return cells.index_add(0, texts[:, place] * VOCABULARY + texts[:, place + 1], weights)


def expected(folder: Path, prompt: list[int], params: SamplingParams, length: int) -> tuple[Tensor, Tensor]:
    """All answers int64 (N, length) that may come, but for the least likely, and the chance float64 [N] of each."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts, chances = torch.tensor([prompt]), torch.ones(1, dtype=torch.float64)
    for _ in range(length):
        with torch.no_grad():
            logits = model(input_ids=texts).logits[:, -1].clone()
        histories = [History(set(prompt)) for _ in texts]
        for history, text in zip(histories, texts.tolist(), strict=True):
            for token in text[len(prompt) :]:
                history.add(token)
        shape(logits, [params] * len(texts), histories)
        weights = weights_of(logits, [params] * len(texts))
        both = chances[:, None] * weights / weights.sum(-1, keepdim=True)
        rows, tokens = (both > 1e-7).nonzero(as_tuple=True)
        texts, chances = torch.cat((texts[rows], tokens[:, None]), dim=1), both[rows, tokens]
    return texts[:, len(prompt) :], chances
