"""A linear layer that lost rows or columns, in a place where the code around counts on all of them.

It reads the kept columns of its input and answers zeros where its rows are gone: weights and their
multiplications go, while whatever stands between two such layers computes at its full width. So the
units of an attention can be cut whose forward no knob and no narrower class could make fit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PADDED = f"{__name__}:PaddedLinear"


class PaddedLinear(nn.Linear):
    """Takes the place of the class of an existing `nn.Linear`; state-dict keys stay.

    Attributes:
        rows, columns: places that the kept rows and columns had, or None where none is gone;
            buffers that are not saved, for every cut makes them anew.
        full_rows, full_columns: widths that the code around counts on; `out_features` and
            `in_features` say the same.
        row_span, column_span: places of one head, which go together when it goes for good.
    """

    rows: Tensor | None
    columns: Tensor | None
    full_rows: int
    full_columns: int
    row_span: int
    column_span: int

    def after_swap(self) -> None:
        """Start whole."""
        if "full_rows" not in vars(self):
            self.full_rows, self.full_columns = self.weight.shape
            self.row_span = self.column_span = 1
            self.register_buffer("rows", None, persistent=False)
            self.register_buffer("columns", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., full_columns] -> [..., full_rows]."""
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """[..., full_columns] -> [..., full_rows], with a bias [rows that are kept]."""
        if self.columns is not None:
            x = x.index_select(-1, self.columns)
        out = F.linear(x, self.weight, bias)
        if self.rows is None:
            return out
        whole = out.new_zeros(*out.shape[:-1], self.full_rows)
        return whole.index_copy(-1, self.rows, out)

    def drop_places(
        self, dim: int, size: int, padded: Collection[int], gone: Collection[int], span: int
    ) -> None:
        """Note which of the `size` rows (`dim` 0) or columns (1) go, before they do.

        Args:
            dim: 0 for rows, 1 for columns.
            size: how many there are now.
            padded: indices whose places stay, as zeros.
            gone: indices whose places go, too: the code around is narrower then.
            span: places of one head, for cuts to come; 0 where this cut does not know.
        """
        side = ("row", "column")[dim]
        name, width = f"{side}s", f"full_{side}s"
        index, full = getattr(self, name), getattr(self, width)
        places: Sequence[int] = range(size) if index is None else index.tolist()
        known = 1 if index is None else getattr(self, f"{side}_span")
        runs = sorted({places[i] // known for i in gone})
        left = [places[i] for i in range(size) if i not in padded and i not in gone]
        moved = [place - known * sum(run < place // known for run in runs) for place in left]
        now = full - known * len(runs)
        if span:  # the heads that are left, of which each may have lost the same places
            heads = len({places[i] // span for i in range(size) if i not in gone})
            span = now // heads if heads else span
        setattr(self, width, now)
        setattr(self, f"{side}_span", span or known)
        setattr(self, name, torch.tensor(moved, dtype=torch.long, device=self.weight.device))


def product(layer: nn.Linear, x: Tensor, bias: Tensor | None) -> Tensor:
    """What `layer` answers with a bias [full_rows] from elsewhere; where rows are gone, zeros."""
    if not isinstance(layer, PaddedLinear):
        return F.linear(x, layer.weight, bias)
    if bias is not None and layer.rows is not None:
        bias = bias[layer.rows]
    return layer.product(x, bias)
