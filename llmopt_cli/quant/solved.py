"""What every solver of one weight answers: a solver is a pure function that puts a weight on its grid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from llmopt_cli.errors import ModelError
from llmopt_cli.model.codes import Codes
from llmopt_cli.spec.scheme import Scheme


class RangeError(ModelError):
    """A weight for which no scale can be stored; whoever knows its name adds that."""

    def __init__(self, where: str = "a weight") -> None:
        hint = "check the model, or take --method fp8 or nf4, whose scales are float32"
        super().__init__(f"{where} is too large for a float16 scale, or not a number", hint)


@dataclass(frozen=True, eq=False)
class Solved:
    """What became of one weight. `method` was really used; `damping` is what its Hessian needed, see `gptq`."""

    codes: Codes
    method: str
    damping: float = 0.0


# Takes a weight float32 [out, in], the mean of x x^T [in, in] over calibration inputs (None for methods that need no
# data, or where a scaler decided against using it) and the scheme.
Solver = Callable[[Tensor, Tensor | None, Scheme], Solved]
