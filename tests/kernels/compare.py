"""How near an op has to come to its float64 reference."""

from __future__ import annotations

import torch

from tests.kernels.draw import SENTINEL

MAX_NMSE = {torch.float32: 1e-10, torch.float16: 1e-6, torch.bfloat16: 1e-5}
"""||error||^2 / ||reference||^2. Rounding the result alone costs 2e-15, 3e-8 and 2e-6."""

MAX_ERROR = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Of any element, relative to the largest in its row."""

FEW = 16


def assert_close(out: torch.Tensor, expected: torch.Tensor) -> None:
    """Every row, which is a vector along the last dimension, is near by itself: a large row can't
    hide a small one.

    Args:
        out: of the op, in its dtype.
        expected: of the reference, float64.
    """
    assert expected.dtype == torch.float64
    assert out.shape == expected.shape
    if out.numel() == 0:
        return
    assert bool(expected.isfinite().all()), "the reference is not finite"
    assert bool(out.isfinite().all()), (
        f"{int((~out.isfinite()).sum())} of {out.numel()} elements are not finite, the first at "
        f"{(~out.isfinite()).nonzero()[0].tolist()}"
    )
    error = out.double() - expected
    # Among few elements one that is unluckily rounded, by up to half a unit in the last place,
    # weighs too much: a bfloat16 by itself has an NMSE of up to 1.5e-5. Few of those that are large
    # are few, too.
    if float(_participation(expected.flatten())) >= FEW:
        nmse = error.square().sum() / expected.square().sum().clamp_min(1e-300)
        assert float(nmse) <= MAX_NMSE[out.dtype], f"NMSE {float(nmse):.3g}"
    if out.shape[-1] >= FEW:
        row_nmse = error.square().sum(-1) / expected.square().sum(-1).clamp_min(1e-300)
        row_nmse = row_nmse.masked_fill(_participation(expected) < FEW, 0)
        worst = float(row_nmse.max())
        assert worst <= 3 * MAX_NMSE[out.dtype], (
            f"NMSE {worst:.3g} in row {_where(row_nmse)} of {list(out.shape[:-1])}"
        )
        largest = error.abs().amax(-1) / expected.abs().amax(-1).clamp_min(1e-300)
        assert float(largest.max()) <= MAX_ERROR[out.dtype], (
            f"error {float(largest.max()):.3g} in row {_where(largest)} of {list(out.shape[:-1])}"
        )
    else:
        largest = error.abs().amax() / expected.abs().amax().clamp_min(1e-300)
        assert float(largest) <= MAX_ERROR[out.dtype], f"error {float(largest):.3g}"


def _participation(x: torch.Tensor) -> torch.Tensor:
    """How many elements of equal size would have the spread of a row's squares."""
    squares = (x / x.abs().amax(-1, keepdim=True).clamp_min(1e-300)).square()
    return squares.sum(-1).square() / squares.square().sum(-1).clamp_min(1e-300)


def _where(rows: torch.Tensor) -> list[int]:
    return [int(i) for i in torch.unravel_index(rows.argmax(), rows.shape)]


def assert_equal_bits(out: torch.Tensor, expected: torch.Tensor) -> None:
    """The same bits; a NaN equals itself."""
    assert out.dtype == expected.dtype
    assert out.shape == expected.shape
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[out.dtype.itemsize]
    differing = out.contiguous().view(integer) != expected.contiguous().view(integer)
    assert not bool(differing.any()), (
        f"{int(differing.sum())} of {out.numel()} elements differ, the first at "
        f"{differing.nonzero()[0].tolist()}: {out[differing][0]} and {expected[differing][0]}"
    )


def assert_gaps_untouched(view: torch.Tensor, fill: float = SENTINEL) -> None:
    """The storage around a view made by `Draw.strided` still holds what it was filled with."""
    storage = torch.empty(0, dtype=view.dtype, device=view.device).set_(view.untyped_storage())
    around = storage.clone()
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(fill)
    assert_equal_bits(around, torch.full_like(around, fill))
