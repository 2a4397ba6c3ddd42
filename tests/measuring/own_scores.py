"""Two scores of heads as somebody else would write them, in a file of their own: neither can be had from where a head
looks, and one needs values.

Shapes: r rows, n query heads on this rank, h head width.
"""

from __future__ import annotations

import torch

from megatron_lccp.measuring import AttentionRows, HeadScore, Metric


class AttentionEntropy(HeadScore):
    """Over how many keys a head spreads itself."""

    metric = Metric(
        name="attention_entropy", unit="nat", level="mechanistic", bounds=(0.0, None), axes=("head", "layer"),
        about="Entropy of the answer rows' attention over all keys: 0 for one key, ln(keys) for all alike.",
    )  # fmt: skip

    def of_rows(self, rows: AttentionRows) -> torch.Tensor:
        """[r, n]."""
        entropy_rn = torch.zeros_like(rows.lse_rn)
        for block in rows.blocks():
            entropy_rn += torch.special.entr(block.weight_rnt).sum(-1)
        return rows.over_context(entropy_rn)


class NeedleOutput(HeadScore):
    """How much a head brings from the needle."""

    metric = Metric(
        name="needle_output", unit="norm", level="mechanistic", bounds=(0.0, None), axes=("head", "layer"),
        about="Length of the sum of weight x value over the needle's tokens; 0 for a head that brings nothing from it.",
    )  # fmt: skip

    def of_rows(self, rows: AttentionRows) -> torch.Tensor:
        """[r, n]."""
        return rows.output(rows.tap.needle).norm(dim=-1)


class NoRows(HeadScore):
    """Forgets the rows."""

    metric = Metric(name="no_rows", unit="count", about="Nothing.")

    def of_rows(self, rows: AttentionRows) -> torch.Tensor:
        """[n], which is refused."""
        return rows.lse_rn.mean(0)


OWN = tuple(f"{__name__}.{kind.__name__}" for kind in (AttentionEntropy, NeedleOutput))
"""What a YAML file calls them."""
