"""Numbers as people read them: filters of the page's templates, and of `swarm.top`. Pure."""

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def count(value: float | None) -> str:
    """1234567 as "1.23M"; a dash where nothing is known."""
    if value is None:
        return "–"
    if value < 10_000:
        return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
    limit, unit = next((limit, unit) for limit, unit in _UNITS if value >= limit)
    scaled = value / limit
    return f"{scaled:.0f}{unit}" if scaled >= 100 else f"{scaled:.3g}{unit}"


def ms(value: float | None) -> str:
    """Milliseconds with their unit: "0.4 ms", "12 ms", "3.4 s"."""
    if value is None:
        return "–"
    if value < 10:
        return f"{value:.1f} ms"
    return f"{value:.0f} ms" if value < 1000 else f"{value / 1000:.3g} s"


def span(seconds: float | None) -> str:
    """A length of time in its two largest units: "42 s", "3 min", "5 h 12 min", "3 d 4 h"."""
    if seconds is None:
        return "–"
    seconds = int(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if seconds < 60:
        return f"{seconds} s"
    if hours < 1:
        return f"{minutes} min"
    if days < 1:
        return f"{hours} h {minutes % 60} min"
    return f"{days} d {hours % 24} h"


def percent(share: float | None) -> str:
    """0.123 as "12 %"."""
    return "–" if share is None else f"{100 * share:.0f} %"
