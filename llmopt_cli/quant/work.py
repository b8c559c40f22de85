"""The folder DIR.partial in which a run grows: resumable at every moment, and renamed to DIR when all is well.

A step, for each block one, is done when its `blocks/N.json` is there: weights and streams were flushed before it. What
does not belong to the last step done is left over from an interrupted one and is made again. Knows files; nothing of
what they hold.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llmopt_cli.errors import CapacityError, CheckpointError, InterruptedWorkError, LlmoptError, UsageError
from llmopt_cli.quant.streams import replacing, settle
from llmopt_cli.spec.checkpoint import Checkpoint

FINGERPRINT = "fingerprint.json"
LOCK = "lock"


def fingerprint(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to be the same run: the model's files by size and time, and all settings."""
    files = [*checkpoint.files, checkpoint.path / "config.json"]
    stats = {file.name: file.stat() for file in files}
    model = {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
    found: dict[str, Any] = json.loads(json.dumps({"model": model, **settings}, default=str))
    return found


class Work:
    """What is there of a run of `total` steps towards `target`."""

    def __init__(self, target: Path, total: int) -> None:
        self.target = target
        self.total = total
        self.folder = partial_of(target)
        self.output = self.folder / "model"

    @property
    def done(self) -> int:
        """Steps that need not be made again: those before the first that has no `N.json`."""
        return next(index for index in range(self.total + 1) if not self._facts(index).is_file())

    def stream(self, name: str, level: int) -> Path:
        """Where the hidden states before block `level` lie."""
        return self.folder / "streams" / f"{name}-{level:04}"

    def commit(self, index: int, tensors: dict[str, Tensor], facts: Mapping[str, Any], spent: bool = True) -> None:
        """Step `index` is done; the streams behind it are there already, those before it go if they are `spent`."""
        self.keep(self.weights(index), tensors)
        with replacing(self._facts(index)) as stream:
            stream.write(json.dumps(facts).encode())
        if spent:
            self._forget("*", index)

    def note(self, name: str, level: int, facts: Any) -> None:
        """Keep what stream `name` taught before block `level`. That part of it goes: what lies behind is there."""
        with replacing(self._note(name, level)) as stream:
            stream.write(json.dumps(facts).encode())
        self._forget(name, level)

    def noted(self, name: str, level: int) -> Any:
        """What was kept so, or None."""
        return _read(self._note(name, level))

    def _note(self, name: str, level: int) -> Path:
        return self.folder / "blocks" / f"{name}-{level:04}.json"

    def _forget(self, name: str, level: int) -> None:
        path = self.stream(name, level)
        for old in path.parent.glob(path.name):
            old.unlink()

    def keep(self, file: Path, tensors: dict[str, Tensor]) -> None:
        """Write tensors to a file that is there whole or not at all."""
        rough = file.with_suffix(".tmp")
        save_file(tensors, rough)
        with rough.open("rb") as written:
            os.fsync(written.fileno())
        rough.replace(file)
        settle(file.parent)

    def weights(self, index: int) -> Path:
        """The file with what became of step `index`."""
        return self.folder / "blocks" / f"{index:04}.safetensors"

    @property
    def ends(self) -> Path:
        """The file with what became of the embedding and the head, if anything did."""
        return self.folder / "blocks" / "ends.safetensors"

    @property
    def made(self) -> list[Path]:
        """All files with what became of the model."""
        return [file for file in (self.ends, *map(self.weights, range(self.total))) if file.exists()]

    def facts(self, index: int) -> dict[str, Any]:
        """What was said about step `index` when it was done."""
        found: dict[str, Any] = json.loads(self._facts(index).read_text(encoding="utf-8"))
        return found

    def _facts(self, index: int) -> Path:
        return self.folder / "blocks" / f"{index:04}.json"

    def finish(self) -> None:
        """Put `output` in the place of `target`, and remove the rest."""
        for file in self.output.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        old = self.target.with_name(f"{self.target.name}.replaced")
        shutil.rmtree(old, ignore_errors=True)
        if self.target.exists():
            self.target.rename(old)
        self.output.rename(self.target)
        settle(self.target.parent)
        for leftover in (old, self.folder):
            shutil.rmtree(leftover, ignore_errors=True)


def partial_of(target: Path) -> Path:
    """Where the work towards `target` is."""
    return target.with_name(f"{target.name}.partial")


@contextmanager
def working(target: Path, total: int, wanted: Mapping[str, Any], overwrite: bool) -> Iterator[Work]:
    """Go on with the run in DIR.partial if it is this one, else begin.

    An interrupt, a full disk or a kill leaves it to be resumed by the same command; any other known error removes it.
    """
    work = Work(target, total)
    try:
        work.folder.mkdir(parents=True, exist_ok=True)
        with _alone(work.folder):
            _prepare(work, wanted, overwrite)
            try:
                yield work
            except LlmoptError:
                shutil.rmtree(work.folder, ignore_errors=True)
                raise
            except KeyboardInterrupt:
                raise InterruptedWorkError(f"interrupted; {_progress(work)}", "the same command goes on") from None
    except (OSError, SafetensorError) as error:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
            raise CapacityError(
                f"the disk of `{target}` is full; {_progress(work)}", "make room, then the same command goes on"
            ) from None
        raise CheckpointError(f"cannot write `{target}`: {error}", "name another folder with -o") from None


def _progress(work: Work) -> str:
    return f"{work.done} of {work.total} steps are done and kept in `{work.folder}`"


def _prepare(work: Work, wanted: Mapping[str, Any], overwrite: bool) -> None:
    """Leave nothing in the folder but the same run; UsageError if another one is there and may not be overwritten."""
    found = _read(work.folder / FINGERPRINT)
    if found is not None and found != wanted and not overwrite:
        changed = ", ".join(key for key in wanted if found.get(key) != wanted[key])
        raise UsageError(
            f"`{work.folder}` holds an unfinished run with another {changed or 'number of settings'}",
            "add --overwrite to begin anew, run the command that began it, or name another folder with -o",
        )
    kept = {"streams", "blocks", FINGERPRINT} if found == wanted else set()
    for entry in work.folder.iterdir():
        if entry.name not in kept | {LOCK}:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for folder in (work.folder / "streams", work.folder / "blocks", work.output):
        folder.mkdir(exist_ok=True)
    if found != wanted:
        with replacing(work.folder / FINGERPRINT) as file:
            file.write(json.dumps(wanted, indent=2).encode())


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes off; UsageError if one is at work here."""
    with (folder / LOCK).open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is at work in `{folder}`", "wait for it, or name another folder"
            ) from None
        yield
