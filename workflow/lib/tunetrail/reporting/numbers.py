"""Formats numbers for the report. A value that was not measured is shown as such and never as 0.

Intervals are the dicts of the metrics files, {"mean", "low", "high", "n"}, or None.
"""

NOT_MEASURED = "not measured"
MIN_PROMPTS = 10
"""With fewer prompts a bootstrap interval is too narrow (zero width if all are wins) to base a verdict on."""


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """A number with fixed decimals, a true minus sign and separated thousands; `sign` also writes a plus.

    >>> number(-1234.567, 1)
    '−1,234.6'
    """
    if value is None:
        return NOT_MEASURED
    text = f"{value:{'+' if sign else ''},.{digits}f}"
    if not text.strip("-+0,."):  # -0.00 is 0.00
        text = text.lstrip("-+")
    return text.replace("-", "−")


def interval(value: dict | None, digits: int = 2, sign: bool = False) -> str:
    """`mean [low, high]`.

    >>> interval({"mean": 27.61, "low": 24.7, "high": 30.52}, 1)
    '27.6 [24.7, 30.5]'
    """
    if value is None:
        return NOT_MEASURED
    mean, low, high = (number(value[key], digits, sign) for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def p_value(value: float) -> str:
    """Three decimals; a p-value is never 0.

    >>> p_value(0.0004), p_value(0.03)
    ('<0.001', '0.030')
    """
    return "<0.001" if value < 0.001 else number(value, 3)


def divergence(value: dict | None) -> str:
    """A KL in nats; for best-of-n only a bound is known.

    >>> divergence({"mean": 0.636, "low": 0.0, "high": 0.636, "estimator": "analytic bound"})
    '≤ 0.64'
    """
    if value is not None and value.get("estimator") == "analytic bound":
        return f"≤ {number(value['mean'])}"
    return interval(value)


def percent(value: float | None, digits: int = 0, sign: bool = False) -> str:
    """A share in percent.

    >>> percent(0.583)
    '58%'
    """
    return NOT_MEASURED if value is None else f"{number(100 * value, digits, sign)}%"


def percent_interval(value: dict | None) -> str:
    """A share as `58% [51, 65]`, with a decimal if rounding would move an end of the interval onto 50.

    >>> percent_interval({"mean": 0.58, "low": 0.504, "high": 0.65})
    '58.0% [50.4, 65.0]'
    """
    if value is None:
        return NOT_MEASURED
    ends = [100 * value[key] for key in ("low", "high")]
    digits = 1 if any(round(end) == 50 and end != 50 for end in ends) else 0
    low, high = (number(end, digits) for end in ends)
    return f"{percent(value['mean'], digits)} [{low}, {high}]"


def duration(seconds: float | None) -> str:
    """
    >>> duration(3725), duration(400.4), duration(32.6), duration(0.21)
    ('1 h 02 min', '6 min 40 s', '33 s', '0.2 s')
    """
    if seconds is None:
        return NOT_MEASURED
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"{hours:,} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"


def size(count: float | None) -> str:
    """A count, short enough for a headline.

    >>> size(134515008), size(43963), size(512)
    ('135 M', '44.0 k', '512')
    """
    if count is None:
        return NOT_MEASURED
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if count >= unit:
            return f"{count / unit:.3g}{name}" if count >= 100 * unit else f"{count / unit:.1f}{name}"
    return f"{count:g}"
