"""A server with two adapters: each is a model of its own, and what does not fit is told before anything is served."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llmopt_cli.errors import LlmoptError
from llmopt_cli.runtime import Engine, SamplingParams
from llmopt_cli.server.app import run
from llmopt_cli.server.service import Settings
from llmopt_cli.spec.recipe import Recipe

pytestmark = pytest.mark.timeout(60)


def test_adapters_are_served_as_models(
    start_server: Callable[..., Any], tiny: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    base = tiny("Llama")
    folders = {"law": write_lora(base, ["q_proj", "v_proj"], 1), "tale": write_lora(base, ["down_proj"], 2)}
    # The form of vLLM, all after one flag; in process, the same adapters by themselves.
    server = start_server("--lora-modules", *(f"{name}={path}" for name, path in folders.items()), model=str(base))
    cards = {card["id"]: card.get("parent") for card in server.get("/v1/models").json()["data"]}
    assert cards == {base.name: None, "law": base.name, "tale": base.name}
    assert server.get("/v1/models/tale").json()["parent"] == base.name
    prompt = list(range(20, 60))
    texts = {}
    for name in (base.name, "law", "tale", "law"):
        asked = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
        answer = server.post("/v1/completions", model=name, **asked).json()
        assert answer["model"] == name
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == (32 if name in texts else 0)
        texts[name] = answer["choices"][0]["text"]
    engine = Engine.from_pretrained(base, dtype="float32", device="cpu", adapters=folders)
    for name, text in texts.items():
        params = SamplingParams(max_tokens=12, ignore_eos=True, adapter="" if name == base.name else name)
        assert engine.generate([prompt], params)[0].text == text
    engine.close()
    assert len(set(texts.values())) == 3
    chat = server.post("/v1/chat/completions", model="law", messages=[{"role": "user", "content": "a"}], max_tokens=2)
    assert chat.json()["model"] == "law"
    unknown = server.post("/v1/completions", model="laws", prompt="a")
    assert unknown.status_code == 404
    assert "`law` and `tale` are" in unknown.json()["error"]["message"]


def test_what_does_not_fit_is_told_before_anything_is_served(
    tiny: Callable[..., Path], write_lora: Callable[..., Path]
) -> None:
    base = tiny("Llama")
    folder = str(write_lora(base, ["o_proj"], 1))
    announced: list[dict[str, Any]] = []
    wrong = [("demo", "mine", "the adapter `mine` has"), (str(base), base.name, "are both called")]
    for model, name, words in wrong:
        recipe = Recipe.resolve(None, model=model, device="cpu")
        with pytest.raises(LlmoptError) as caught:
            run(recipe, Settings(port=0), False, announced.append, {name: folder})
        assert words in caught.value.message
    assert announced == []
