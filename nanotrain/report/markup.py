"""HTML of tables, figures and sections, and the forms in which numbers are shown. All text passes through escape."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from nanotrain.config.data import CATEGORIES

ABSENT = "–"

KINDS = {"M": "Mamba-2", "-": "MLP", "*": "attention"}


def in_order(names: Iterable[str]) -> list[str]:
    """Return names with the categories of text first, in the order of `config.data.CATEGORIES`."""
    given = list(names)
    return [name for name in CATEGORIES if name in given] + [name for name in given if name not in CATEGORIES]


def colour_of(name: str) -> int | None:
    """Return the colour that a category has in every chart; None for other names."""
    return CATEGORIES.index(name) if name in CATEGORIES else None


def show_seconds(seconds: float) -> str:
    """Return 0.4 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def show_bytes(count: int) -> str:
    """Return B, KiB, MiB or GiB with three significant digits."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count / size < 1000 else f"{count / size:.0f} {unit}"
    return f"{count} B"


def show_count(count: float) -> str:
    """Return a count in words of size: 812, 3,520, 1.64 M, 12.3 B."""
    for suffix, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if abs(count) >= size:
            return f"{count / size:.3g} {suffix}"
    return f"{count:,.0f}"


def show(value: Any, digits: int = 4) -> str:
    """Return any value of the report as short text; None is a dash."""
    if value is None:
        return ABSENT
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(show(item, digits) for item in value)
    return str(value)


def show_share(value: float | None) -> str:
    """Return a share as a percentage."""
    return ABSENT if value is None else f"{100 * value:.1f}%"


def show_interval(interval: Sequence[float] | None) -> str:
    """Return the bounds of a share's interval as percentages."""
    return ABSENT if interval is None else f"{100 * interval[0]:.0f}–{100 * interval[1]:.0f}%"


def show_digest(digest: str | None) -> str:
    """Return HTML: the first twelve digits, the whole digest on hover."""
    return ABSENT if not digest else f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], *, text_columns: int = 1, caption: str = "") -> Html:
    """Return a table; the first `text_columns` are set left, the others are numbers and set right.

    Cells are shown by `show` and escaped, except Html.
    """
    if not rows:
        return Html("")

    def cell(tag: str, index: int, value: Any) -> str:
        text = value if isinstance(value, Html) else escape(show(value))
        css = "" if index < text_columns else ' class="n"'
        scope = ' scope="col"' if tag == "th" else ""
        return f"<{tag}{scope}{css}>{text}</{tag}>"

    head = "".join(cell("th", index, header) for index, header in enumerate(headers))
    body = "".join(f"<tr>{''.join(cell('td', i, value) for i, value in enumerate(row))}</tr>" for row in rows)
    css = ' class="narrow"' if len(headers) <= 3 else ""
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return Html(
        f'<div class="scroll"><table{css}>{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(chart: str, title: str, note: str = "") -> Html:
    """Return a chart with its title above and a remark below; empty when there is no chart."""
    if not chart:
        return Html("")
    remark = f"<p>{escape(note)}</p>" if note else ""
    return Html(f"<figure><figcaption><b>{escape(title)}</b>{remark}</figcaption>{chart}</figure>")


def grid(parts: Sequence[str], *, columns: int = 2) -> Html:
    """Return figures side by side, `columns` of them where the page is wide enough."""
    shown = [part for part in parts if part]
    css = "grid three" if columns == 3 else "grid"
    return Html(f'<div class="{css}">{"".join(shown)}</div>' if shown else "")


def paragraph(text: str) -> Html:
    """Return a paragraph of plain text."""
    return Html(f"<p>{escape(text)}</p>")


def heading(text: str) -> Html:
    """Return a heading below the section's own."""
    return Html(f"<h3>{escape(text)}</h3>")
