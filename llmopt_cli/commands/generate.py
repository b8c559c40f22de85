"""`llmopt generate`: complete prompts once, in process, without a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llmopt_cli import options
from llmopt_cli.errors import UsageError
from llmopt_cli.output import Output


def generate(
    model: options.ModelArg = "demo",
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="May be given again; `-` reads stdin.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option("--top-k", help="Draw among the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, typer.Option("--top-p", help="Draw among the likeliest with this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes draws repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this string. May be given again.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on past the end-of-text token.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")] = False,
    dtype: options.DtypeOpt = None,
    device: options.DeviceOpt = None,
    max_model_len: options.MaxModelLenOpt = None,
    kv_cache_memory_bytes: options.KvMemoryOpt = None,
    enable_prefix_caching: options.PrefixCachingOpt = None,
    kv_cache_dtype: options.KvDtypeOpt = None,
    deterministic: options.DeterministicOpt = None,
    kv_policy: options.KvPolicyOpt = None,
    spec_method: options.SpecMethodOpt = None,
    spec_model: options.SpecModelOpt = None,
    spec_tokens: options.SpecTokensOpt = None,
    speculative_config: options.SpecConfigOpt = None,
    lora: Annotated[Path | None, typer.Option("--lora", help="A LoRA adapter in peft's format to answer with.")] = None,
    trust_remote_code: options.TrustOpt = False,
    as_json: options.JsonOpt = False,
    quiet: options.QuietOpt = False,
) -> None:
    """Complete prompts: raw text, special tokens as the tokenizer adds them."""
    from llmopt_cli.runtime.request import SamplingParams
    from llmopt_cli.spec.kv_policy import parse_policy

    out = Output(as_json=as_json, quiet=quiet)
    if not prompt:
        raise UsageError("there is no prompt", 'give one: `llmopt generate demo --prompt "It was"`')
    prompts = [_stdin() if text == "-" else text for text in prompt]
    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        adapter="lora" if lora else "",
        kv_policy=None if kv_policy is None else parse_policy(kv_policy),
    )

    from llmopt_cli.runtime import Engine
    from llmopt_cli.runtime.compression.door import refuse_unfit_policy
    from llmopt_cli.spec.checkpoint import Checkpoint
    from llmopt_cli.spec.recipe import Recipe

    flags = {"dtype": dtype, "device": device, "kv_cache_dtype": kv_cache_dtype}
    batching = {"max_model_len": max_model_len, "kv_cache_memory_bytes": kv_cache_memory_bytes}
    batching |= {"enable_prefix_caching": enable_prefix_caching, "deterministic": deterministic}
    speculation = {"spec_method": spec_method, "spec_model": spec_model, "spec_tokens": spec_tokens}
    speculation["speculative_config"] = speculative_config
    recipe = Recipe.resolve(None, model=model, **flags, **batching, **speculation)
    with out.progress(f"loading {model}") as report:
        if params.kv_policy is not None:
            refuse_unfit_policy(params.kv_policy, Checkpoint.open(model), recipe.batching)
        engine = Engine.from_recipe(recipe, trust_remote_code, report, {"lora": lora} if lora else None)
    tokenizer = engine.tokenizer
    ids = [tokenizer.chat([{"role": "user", "content": text}]) if chat else tokenizer.encode(text) for text in prompts]
    with out.progress("generating") as report:
        outputs = engine.generate(ids, params, report)
    data = [
        {"prompt": text, "text": o.text, "token_ids": list(o.token_ids), "finish_reason": o.finish_reason}
        for text, o in zip(prompts, outputs, strict=True)
    ]
    out.result(data if len(data) > 1 else data[0], lambda: [output.text for output in outputs])


def _stdin() -> str:
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"the prompt on stdin is not UTF-8: {error}") from None
