"""Figures as text."""

import math


def format_value(value: float) -> str:
    """Two decimals; below a tenth three significant digits, and from a thousand upwards `1.6e3`."""
    size = abs(value)
    if math.isfinite(value) and round(size, 2) >= 1000:
        return _with_exponent(f"{value:.1e}")
    if 0 < size < 1e-4:
        return _with_exponent(f"{value:.2e}")
    return f"{value:.{_decimals(value)}f}"


def format_mean(mean: float, std: float) -> str:
    """`46.8 ± 0.4`, with no more decimals than `std` leaves meaningful. Where `std` is NaN, as `format_value`."""
    if not (math.isfinite(mean) and math.isfinite(std)):
        return format_value(mean)
    text = format_value(mean)
    if "e" in text:
        exponent = int(text.split("e")[1])
        if std >= 0.05 * 10.0**exponent:
            return f"{text} ± {std / 10.0**exponent:.1f}e{exponent}"
        return f"{text} ± {std:.0f}" if std >= 1 else f"{text} ± {std:.1g}"  # would be 0.0e3
    decimals = 0 if std >= 10 else 1 if std >= 0.1 else _decimals(mean)
    if 0 < std < 0.1:
        decimals = min(decimals, max(2, -math.floor(math.log10(std))))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def _decimals(value: float) -> int:
    """Two, or as many as three significant digits of a value below a tenth take."""
    return 2 - math.floor(math.log10(abs(value))) if 0 < abs(value) < 0.1 else 2


def _with_exponent(text: str) -> str:
    mantissa, exponent = text.split("e")
    return f"{mantissa}e{int(exponent)}"
