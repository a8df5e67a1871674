"""Kubernetes quantities ("500m", "16Gi", "1e3"): as numbers, and as the API server writes them."""

from __future__ import annotations

import re
from decimal import ROUND_CEILING, Decimal

_FORM = re.compile(
    r"\+?(?P<number>\d+(?:\.\d*)?|\.\d+)"
    r"(?:(?P<suffix>[numk]|[KMGTPE]i|[MGTPE])|[eE](?P<power>[+-]?\d{1,2}))?"
)
_DECIMAL = {-9: "n", -6: "u", -3: "m", 0: "", 3: "k", 6: "M", 9: "G", 12: "T", 15: "P", 18: "E"}
_BINARY = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_FACTORS = {
    **{suffix: Decimal(10) ** power for power, suffix in _DECIMAL.items()},
    **{suffix: Decimal(1024) ** power for power, suffix in enumerate(_BINARY)},
}


def parse_quantity(text: str) -> Decimal:
    """Return the value of a quantity: bytes of "16Gi", cores of "500m".

    Raises ValueError on anything that is not a non-negative quantity.
    """
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a quantity such as 500m, 2, 16Gi or 1.5G")
    power = int(match["power"] or 0)
    return Decimal(match["number"]) * _FACTORS[match["suffix"] or ""] * Decimal(10) ** power


def canonical_quantity(text: str) -> str:
    """Return a quantity in the form that the API server gives back: "0.5" is "500m".

    Without it, every apply would differ from what is stored. The largest suffix that leaves a whole
    number, of binary ones for whole binary ones; a fraction of a nano is rounded up. "1.5Ki" is
    "1536": without a suffix the server takes it for a decimal one. Raises ValueError like
    `parse_quantity`.
    """
    nanos = int((parse_quantity(text) * 10**9).to_integral_value(ROUND_CEILING))
    whole, fraction = divmod(nanos, 10**9)
    if text.endswith("i") and whole and whole % 1024 == 0 and not fraction:
        return _binary(whole)
    if not nanos:
        return "0"
    power = max(power for power in _DECIMAL if nanos % 10 ** (power + 9) == 0)
    return f"{nanos // 10 ** (power + 9)}{_DECIMAL[power]}"


def _binary(value: int) -> str:
    power = 0
    while value % 1024 == 0 and power < len(_BINARY) - 1:
        value, power = value // 1024, power + 1
    return f"{value}{_BINARY[power]}"
