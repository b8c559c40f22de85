"""`Recipe`: a deployment as data. Which model, in which precision, batched how, on what.

Knows no torch and checks no file: names are resolved by the verb that uses them.
"""

from __future__ import annotations

import json
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

from llmopt_cli.errors import UsageError
from llmopt_cli.spec.yaml_file import find_yaml, read_yaml, recipes_folder

MODES = ("continuous", "static", "none")
POLICIES = ("fcfs", "priority")
SPECULATION = {"draft_model": True, "ngram": False, "suffix": False, "medusa": True, "eagle": True}  # by a model?
MOST_DRAFTED = 64
SPEC_FLAGS = {"spec_method": "method", "spec_model": "model", "spec_tokens": "num_speculative_tokens"}
KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
EXAMPLE = """for example `--speculative-config '{"method": "ngram", "num_speculative_tokens": 4}'`"""


@dataclass(frozen=True, slots=True)
class Batching:
    """How requests share the machine. Lengths and budgets in tokens, memory in bytes.

    `max_model_len=None` is the model's own limit; `kv_cache_memory_bytes=None` is what is free, capped at what
    `max_num_seqs` requests of full length can use. With `enable_prefix_caching` requests that begin alike share blocks.
    Two values of `batching_mode` are baselines: "static" fills a batch and runs it to its end, "none" runs one request
    after the other. Beside others, a prompt gets at most `long_prefill_token_threshold` tokens of a step (0: no limit).
    With `deterministic` a request's logits are the same bit for bit whatever else runs, and slower.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory_bytes: int | None = None
    enable_prefix_caching: bool = True
    batching_mode: str = MODES[0]
    scheduling_policy: str = POLICIES[0]
    long_prefill_token_threshold: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "block_size", "kv_cache_memory_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        for name, known in (("batching_mode", MODES), ("scheduling_policy", POLICIES)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)}")
        if self.max_num_seqs > self.max_num_batched_tokens:
            # Every running request needs a token of the budget in every step, or decoding starves.
            raise ValueError(
                f"max_num_batched_tokens {self.max_num_batched_tokens} is below max_num_seqs {self.max_num_seqs}"
            )


@dataclass(frozen=True, slots=True)
class Speculation:
    """Speculative decoding (arXiv 2211.17192): up to `num_speculative_tokens` are proposed, the model accepts a part.

    `model` is what the `method` proposes with: a small model of the same tokens, or heads; two look the text up and
    need none. `acceptance` is the probability that a proposed token is accepted, for estimates: 0.7-0.85 for code,
    0.6-0.75 for chat. An `adaptive` one proposes fewer tokens, or none, where that is faster. Lookups of method
    "ngram" match `prompt_lookup_min` to `prompt_lookup_max` tokens.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: str = ""
    num_speculative_tokens: int = 4
    acceptance: float = 0.7
    method: str = ""
    adaptive: bool = True
    prompt_lookup_min: int = 2
    prompt_lookup_max: int = 4

    def __post_init__(self) -> None:
        if not 1 <= self.num_speculative_tokens <= MOST_DRAFTED:
            raise ValueError(f"num_speculative_tokens must lie in 1..{MOST_DRAFTED}, not {self.num_speculative_tokens}")
        if not 0 <= self.acceptance <= 1:
            raise ValueError(f"acceptance must lie in 0..1, not {self.acceptance}")
        if not 1 <= self.prompt_lookup_min <= self.prompt_lookup_max:
            raise ValueError(
                f"prompt_lookup_min {self.prompt_lookup_min} must lie in 1..{self.prompt_lookup_max}, prompt_lookup_max"
            )
        method = self.method or "draft_model"
        if method not in SPECULATION:
            raise ValueError(f"speculation's method must be one of {', '.join(SPECULATION)}, not {method}")
        if SPECULATION[method] and not self.model:
            raise ValueError(f"speculation by {method} needs a model")
        object.__setattr__(self, "method", method)

    def record(self) -> dict[str, Any]:
        """What a report names of it."""
        return {name: getattr(self, name) for name in ("method", "model", "num_speculative_tokens", "adaptive")}


@dataclass(frozen=True, slots=True)
class Recipe:
    """One deployment. `scheme` is what `quantize` makes of `model`; `serve` and `bench` run `model` as it is.

    `engine` is who runs it: llmopt, or one that llmopt estimates and measures (vllm, sglang, trtllm, llamacpp).
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    model: str = "demo"
    scheme: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    gpu: str | None = None
    engine: str = "llmopt"
    kv_cache_dtype: str = "auto"
    tensor_parallel_size: int | None = None
    pipeline_parallel_size: int = 1
    speculation: Speculation | None = None
    batching: Batching = field(default_factory=Batching)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")

    @classmethod
    def read(cls, name: str | Path) -> Self:
        """Read a recipe file, or the bundled recipe of that name."""
        return read_yaml(find_yaml("recipe", name, recipes_folder()), cls)

    @classmethod
    def resolve(cls, name: str | Path | None, **flags: Any) -> Self:
        """The recipe in file `name` (or the default), overridden by every flag that is not None.

        Flags named like fields of `Batching` go there. Raises UsageError if flags and file contradict each other.
        """
        recipe = cls.read(name) if name is not None else cls()
        given = {key: value for key, value in flags.items() if value is not None}
        speculation = {field: given.pop(flag) for flag, field in SPEC_FLAGS.items() if flag in given}
        config = given.pop("speculative_config", None)
        batching = {key: given.pop(key) for key in list(given) if key in Batching.__dataclass_fields__}
        if config is not None or speculation:
            given["speculation"] = _speculation(recipe.speculation, _read_config(config) | speculation)
        try:
            return replace(recipe, batching=replace(recipe.batching, **batching), **given)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def write(self, path: Path, title: str) -> None:
        """Write the deployment as a new YAML file that `read` understands, `title` in a comment at its top.

        Raises UsageError if the file exists or can't be written.
        """
        import yaml

        text = f"# {title}\n{yaml.safe_dump(_changed(self), sort_keys=False)}"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise UsageError(f"`{path}` exists already", "name another file with -o") from None
        except OSError as error:
            raise UsageError(f"cannot write `{path}`: {error.strerror}", "name another file with -o") from None


def _speculation(known: Speculation | None, asked: dict[str, Any]) -> Speculation:
    """What is `known`, overridden by what is asked for."""
    try:
        return Speculation(**(({} if known is None else asdict(known)) | asked))
    except ValueError as error:
        hint = "for example `--spec-method ngram --spec-tokens 4`, or `--spec-method draft_model --spec-model SMALLER`"
        raise UsageError(str(error), hint) from None


def _read_config(text: str | None) -> dict[str, Any]:
    """The fields that a JSON object names; UsageError for a text that is none, or names others."""
    try:
        found = json.loads("{}" if text is None else text)
    except ValueError as error:
        raise UsageError(f"--speculative-config is no JSON: {error}", EXAMPLE) from None
    if not isinstance(found, dict):
        raise UsageError("--speculative-config is no JSON object", EXAMPLE)
    known = {one.name: type(one.default) for one in fields(Speculation)}
    if strange := found.keys() - known.keys():
        raise UsageError(f"--speculative-config has no key `{min(strange)}`", f"it has {', '.join(sorted(known))}")
    for name, value in found.items():
        if type(value) not in (known[name], *([int] if known[name] is float else [])):
            raise UsageError(f"--speculative-config: {name} must be {KINDS[known[name]]}, not {value!r}", EXAMPLE)
    return found


def _changed(noun: Any) -> dict[str, Any]:
    """The fields that differ from their defaults; a recipe always names its model and engine."""
    found = {}
    for one in fields(noun):
        value = getattr(noun, one.name)
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if value != default or one.name in ("model", "engine"):
            found[one.name] = _changed(value) if is_dataclass(value) else value
    return found
