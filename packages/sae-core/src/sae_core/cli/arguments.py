"""The parser of every command: an option of ``type=int``, a plugin's too, takes 1e6 for 1000000."""

from __future__ import annotations

import argparse
from decimal import Decimal, InvalidOperation
from typing import Any, final

__all__ = ["Parser", "whole_number"]


def whole_number(text: str) -> int:
    """A whole number, written out or with an exponent, as in run files. Raises ArgumentTypeError for what is none.

    >>> whole_number("1e6"), whole_number("2.5e3"), whole_number("-3")
    (1000000, 2500, -3)
    """
    try:
        return int(text)
    except ValueError:
        pass
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise argparse.ArgumentTypeError(f"{text!r} is no number") from None
    if not number.is_finite() or number.copy_abs() >= 1 << 63 or number != number.to_integral_value():
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number that fits into 64 bits")
    return int(number)


@final
class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose whole numbers are read by `whole_number`; its subparsers are like it."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **given: Any) -> None:
        super().__init__(*args, allow_abbrev=allow_abbrev, **given)
        self.register("type", int, whole_number)
