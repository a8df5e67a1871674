"""Kubernetes quantities ("500m", "16Gi") as numbers."""

from __future__ import annotations

import re
from decimal import Decimal

_FORM = re.compile(r"(?P<number>\d+(?:\.\d+)?|\.\d+)(?P<suffix>m|k|[KMGTPE]i|[MGTPE])?")
_FACTORS = {
    "m": Decimal("0.001"),
    "k": Decimal(10) ** 3,
    **{letter: Decimal(10) ** (3 * power) for power, letter in enumerate("MGTPE", start=2)},
    **{f"{letter}i": Decimal(2) ** (10 * power) for power, letter in enumerate("KMGTPE", start=1)},
}


def parse_quantity(text: str) -> Decimal:
    """Return the value of a quantity: bytes of "16Gi", cores of "500m".

    Raises ValueError on anything that is not a non-negative quantity.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity such as 500m, 2, 16Gi or 1.5G")
    return Decimal(match["number"]) * _FACTORS.get(match["suffix"] or "", Decimal(1))
