"""`Adapter`: a LoRA adapter on disk in peft's format, as far as its config and the header of its file tell.

Knows what peft's settings mean and refuses by name those that mean more than `W + scale * B A`. Knows no model: whether
an adapter fits one is `model.lora`'s business. Paper: Hu et al. 2021 (arXiv:2106.09685); rslora: Kalajdzievski 2023.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from llmopt_cli.errors import CheckpointError, UsageError
from llmopt_cli.spec.checkpoint import TensorHeader, read_header, read_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FACTOR = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")
LAYER = r".*?\.[^.]*\.(\d+)\."  # peft's: the first number in a module's name
READ = {
    *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
# Where an adapter comes from, and what only its training needed.
HARMLESS = {
    *("base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode", "lora_dropout"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
    "ensure_weight_tying",
}
# Values that ask for nothing, beside false, null and empty ones. Other initialisations change the base's weights, too.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "task_type": ("CAUSAL_LM",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Adapter:
    """What one adapter's files say: its `config`, and the headers of its factors by module and factor, `A` or `B`."""

    name: str
    path: Path
    config: Mapping[str, Any]
    factors: Mapping[str, Mapping[str, TensorHeader]]

    @classmethod
    def open(cls, name: str, folder: str | Path) -> Self:
        """Read config and header; UsageError if there is no such folder, CheckpointError for what can't be served."""
        path = Path(folder).expanduser()
        if not (path / CONFIG).is_file():
            raise UsageError(f"`{path}` is no adapter: it has no {CONFIG}", "give a folder that peft saved")
        if not (path / WEIGHTS).is_file():
            raise CheckpointError(
                f"the adapter `{name}` has no {WEIGHTS} in `{path}`", "save it with peft's `save_pretrained`"
            )
        config = read_json(path / CONFIG)
        _check_config(name, config)
        return cls(name, path, config, _factors(name, path / WEIGHTS))

    @property
    def tensors(self) -> list[TensorHeader]:
        """The headers of all factors."""
        return [header for pair in self.factors.values() for header in pair.values()]

    def targets(self, module: str) -> bool:
        """Whether the config says that a linear of this name is adapted, by peft's rules."""
        if _named(self.config.get("exclude_modules"), module):
            return False
        wanted = self.config["target_modules"]
        if isinstance(wanted, str):
            return wanted == "all-linear" or _named(wanted, module)
        return _named(wanted, module) and self._in_layers(module)

    def rank(self, module: str) -> int:
        """The inner size of a module's factors."""
        return int(_patterned(self.config.get("rank_pattern"), module, self.config["r"]))

    def scale(self, module: str) -> float:
        """What a module's `B A` is multiplied by: alpha / r, or alpha / sqrt(r)."""
        alpha, rank = _patterned(self.config.get("alpha_pattern"), module, self._alpha), self.rank(module)
        return float(alpha / rank**0.5 if self.config.get("use_rslora") else alpha / rank)

    @cached_property
    def _alpha(self) -> float:
        return float(self.config["lora_alpha"])

    def _in_layers(self, module: str) -> bool:
        layers = self.config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = self.config.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [LAYER]
        found = next((match for rule in rules if (match := re.match(rule, module))), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def named_folders(words: Sequence[str]) -> dict[str, str]:
    """`name=folder` words as a dict; UsageError for one that is none, or a name given twice."""
    found: dict[str, str] = {}
    for word in words:
        name, _, folder = word.partition("=")
        if not (name and folder):
            raise UsageError(f"`{word}` names no adapter", "write `--lora-modules name=folder`")
        if name in found:
            raise UsageError(f"two adapters are called `{name}`", "give each a name of its own")
        found[name] = folder
    return found


def _check_config(name: str, config: Mapping[str, Any]) -> None:
    """Refuse what is no plain LoRA, and settings that are not of their kind."""
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"the adapter `{name}` is of type `{config.get('peft_type')}`, and only LORA is served")
    for key, value in config.items():
        if value and key not in READ | HARMLESS and value not in NEUTRAL.get(key, ()):
            raise CheckpointError(f"the adapter `{name}` has `{key}: {value}`, which is not supported")
    targets, excluded = config.get("target_modules"), config.get("exclude_modules")
    patterns = [config.get(key) or {} for key in ("rank_pattern", "alpha_pattern")]
    if not all(isinstance(pattern, dict) for pattern in patterns):
        raise CheckpointError(f"the adapter `{name}` has a rank_pattern or alpha_pattern that is no JSON object")
    checks = {
        "r": all(type(one) is int and one > 0 for one in [config.get("r"), *patterns[0].values()]),
        "lora_alpha": all(type(one) in (int, float) for one in [config.get("lora_alpha"), *patterns[1].values()]),
        "target_modules": bool(targets) and _is_names(targets),
        "exclude_modules": not excluded or _is_names(excluded),
        "layers_to_transform": isinstance(config.get("layers_to_transform"), int | list | None),
        "layers_pattern": not config.get("layers_pattern") or _is_names(config["layers_pattern"]),
    }
    if wrong := [key for key, fine in checks.items() if not fine]:
        raise CheckpointError(f"the adapter `{name}` has no usable `{wrong[0]}` in its {CONFIG}")


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _factors(name: str, file: Path) -> dict[str, dict[str, TensorHeader]]:
    """The headers in an adapter's file, by module and factor; every module must have both."""
    found: dict[str, dict[str, TensorHeader]] = {}
    for tensor, header in read_header(file).items():
        match = FACTOR.fullmatch(tensor)
        if match is None:
            raise CheckpointError(f"the adapter `{name}` stores `{tensor}`, which is no factor of a linear layer")
        found.setdefault(match["module"], {})[match["factor"]] = header
    if not found:
        raise CheckpointError(f"the adapter `{name}` stores no factors")
    if lacking := [module for module, pair in found.items() if len(pair) < 2]:
        raise CheckpointError(f"the adapter `{name}` stores only one of the two factors of `{lacking[0]}`")
    return found


def _named(wanted: str | Sequence[str] | None, module: str) -> bool:
    """A regular expression must match the whole name, a word of a list be its end."""
    if isinstance(wanted, str):
        return _matches(wanted, module)
    return any(f".{module}".endswith(f".{one}") for one in wanted or ())


def _patterned(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches."""
    return next((value for key, value in (patterns or {}).items() if _matches(rf"(.*\.)?({key})", module)), default)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as error:
        raise CheckpointError(f"an adapter's pattern `{pattern}` is no regular expression: {error}") from None
