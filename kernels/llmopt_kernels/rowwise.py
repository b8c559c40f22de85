"""`Rowwise`: within it, what is computed for one token does not depend on the others in its batch, bit for bit.

Libraries choose the order of additions by the shape of a product, and treat the last elements of a tensor apart. Here
products take rows one by one or in tiles of one size, and functions with more than one way to compute them take one row
at a time. Knows nothing of models.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llmopt_kernels import cpu, reference

_inside = threading.local()


def active() -> bool:
    """Whether this thread is within a `Rowwise`."""
    return getattr(_inside, "depth", 0) > 0


class Rowwise(TorchFunctionMode):
    """Takes every product and curve on this thread; NotImplementedError for a product that it has no way for."""

    def __enter__(self) -> Self:
        _inside.depth = getattr(_inside, "depth", 0) + 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _inside.depth -= 1
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        ours = WAYS.get(func)
        if ours is not None:
            return ours(*args, **kwargs)
        if func in CURVES:
            return _by_rows(func, *args, **kwargs)
        if func in UNABLE:
            raise NotImplementedError(
                f"`{getattr(func, '__name__', func)}` has no way that is independent of the batch"
            )
        return func(*args, **kwargs)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear_rows`."""
    others = (weight,) if bias is None else (weight, bias)
    fits = cpu.fits(x, *others)
    return cpu.linear_rows(x, weight, bias) if fits else reference.linear_rows(x, weight, bias)


def _addmm(bias: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return linear(x, weight.t(), bias)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a (..., M, K) times b (..., K, N); sums of one addend have no order."""
    if a.shape[-1] == 1:
        return torch.matmul(a, b)
    if b.dim() <= 2:
        return linear(a, b.t()) if b.dim() == 2 else linear(a, b[None])[..., 0]
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])  # type: ignore[no-untyped-call]
    lefts, rights = (t.expand(*batch, *t.shape[-2:]).flatten(0, -3) for t in (a, b))
    products = [linear(left, right.t()) for left, right in zip(lefts, rights, strict=True)]
    return torch.stack(products).view(*batch, a.shape[-2], b.shape[-1])


def _by_rows(curve: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if x.dim() < 2 or x.numel() == x.shape[-1]:
        return curve(x, *args, **kwargs)
    # Rows of their own: where one begins decides which of its elements are computed in vectors.
    rows = [curve(row.clone(), *args, **kwargs) for row in x.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(x.shape) if rows else curve(x, *args, **kwargs)


WAYS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    F.linear: linear,
    torch.addmm: _addmm,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, torch.mm, Tensor.mm), _matmul),
}
CURVES = {
    *(F.silu, F.gelu, F.softplus, F.sigmoid, F.tanh, F.logsigmoid),
    *(torch.exp, torch.tanh, torch.sigmoid, torch.cos, torch.sin, torch.erf),
    *(Tensor.exp, Tensor.tanh, Tensor.sigmoid, Tensor.cos, Tensor.sin, Tensor.erf),
}
UNABLE = {
    *(torch.einsum, torch.baddbmm, torch.bilinear, F.conv1d),
    *(
        function
        for owner, name in ((torch, "_grouped_mm"), (F, "grouped_mm"))
        if (function := getattr(owner, name, None))
    ),
}
