"""YAML into a frozen dataclass, with errors that name key, file, line and the nearest known key.

Knows YAML and pydantic; what the keys mean is the business of the dataclass.
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

from llmopt_cli.errors import ConfigFileError, UnknownNameError

T = TypeVar("T")
PACKAGE = Path(__file__).resolve().parent.parent


def recipes_folder() -> Path:
    """Where the bundled recipes lie: inside an installed package, or at the root of a checkout."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def find_yaml(kind: str, name: str | Path, folder: Path) -> Path:
    """The file `name`, else the bundled one of that name in `folder`, with or without `.yaml`."""
    path = Path(name)
    if path.is_file():
        return path
    bundled = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if path.parent == Path() and bundled.is_file():
        return bundled
    raise UnknownNameError(kind, str(name), [file.stem for file in folder.glob("*.yaml")])


def read_yaml(path: Path, kind: type[T]) -> T:
    """Read `path` as the dataclass `kind`. Unknown keys and wrong values raise ConfigFileError."""
    import yaml
    from pydantic import TypeAdapter, ValidationError

    try:
        text = path.read_text(encoding="utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigFileError(f"cannot read `{path}`: {error}") from None
    except (ValueError, KeyError, AttributeError) as error:  # what the parser lets through for a date that is none
        raise ConfigFileError(f"`{path}` holds a wrong value: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigFileError(f"`{path}`{where} is not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(data, dict):
        raise ConfigFileError(f"`{path}` must hold `key: value` lines at its top")
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        raise _explain(path, root, kind, error.errors()[0]) from None


def _explain(path: Path, root: Any, kind: type[Any], problem: Any) -> ConfigFileError:
    """The first problem pydantic found, as one sentence with its line."""
    keys = [str(part) for part in problem["loc"]]
    reason = str(problem["msg"]).removeprefix("Value error, ")
    if not keys and (said := reason.split()[0]) in _known_keys(kind, keys):  # a refusal begins with its field
        keys.append(said)
    line = _line(root, keys)
    where = f"in `{path}`, line {line}"
    if problem["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _known_keys(kind, keys[:-1])
        near = difflib.get_close_matches(keys[-1], known, n=1, cutoff=0.4)
        hint = f"did you mean `{near[0]}`?" if near else f"known keys: {', '.join(known)}"
        return ConfigFileError(f"unknown key `{'.'.join(keys)}` {where}", hint)
    if problem["type"] in ("missing", "missing_argument"):
        return ConfigFileError(f"key `{'.'.join(keys)}` is missing {where}")
    return ConfigFileError(f"key `{'.'.join(keys)}` {where}: {reason[0].lower()}{reason[1:]}")


def _line(node: Any, keys: list[str]) -> int:
    """The 1-based line of the deepest part of `keys` that the file holds."""
    line = int(node.start_mark.line) + 1
    for key in keys:
        pairs = node.value if isinstance(node.value, list) else []
        found = [pair for pair in pairs if isinstance(pair, tuple) and pair[0].value == key]
        if not found:
            break
        line, node = int(found[0][0].start_mark.line) + 1, found[0][1]
    return line


def _known_keys(kind: type[Any], keys: list[str]) -> list[str]:
    """The field names of the dataclass that `keys` lead to from `kind`."""
    for key in keys:
        hint: Any = typing.get_type_hints(kind).get(key)
        nested = [part for part in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(part)]
        if not nested:
            return []
        kind = typing.cast(type[Any], nested[0])
    return [field.name for field in dataclasses.fields(kind)]
