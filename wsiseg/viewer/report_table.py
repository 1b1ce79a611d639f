"""The table of a run's report as HTML. Knows no files and no addresses but those given."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from wsiseg.outputs.run_folder import SlideResult

_STATES = {"ok": "good", "no tissue": "warn", "incomplete": "warn"}


def run_classes(results: Sequence[SlideResult]) -> dict[str, str]:
    """Name to colour (#rrggbb) of all classes of a run, the background ones last."""
    found: dict[str, tuple[bool, str]] = {}
    for result in results:
        for item in result.classes or ():
            colour = "#{:02x}{:02x}{:02x}".format(*item.colour)
            found.setdefault(item.name, (item.background, colour))
    return {name: colour for name, (_, colour) in sorted(found.items(), key=lambda p: p[1][0])}


class Table:
    """The columns of a run's table, and its rows."""

    def __init__(self, results: Sequence[SlideResult]) -> None:
        """Settle the columns from all results."""
        self.results = results
        self.classes = run_classes(results)
        self.counted = [c for c in self.classes if any(c in (r.objects or ()) for r in results)]

    def head(self) -> str:
        """The row of column heads, each a button that sorts."""
        cells = ["<th scope=col>Preview</th>", _head("Slide", "text"), _head("Status", "text")]
        cells.append(_head("Analysed mm²"))
        cells += [_head(f"{name} mm²", swatch=colour) for name, colour in self.classes.items()]
        cells += [_head(f"{name} objects") for name in self.counted]
        cells += [_head("µm per px"), _head("Analysis s"), _head("Tissue", "text")]
        cells += [_head("Model", "text")]
        return f"<tr>{''.join(cells)}</tr>"

    def row(self, result: SlideResult, *, page: str | None, picture: str | None) -> str:
        """The row of a slide, with the address that it leads to and that of its preview."""
        total, objects = result.analysed_mm2, result.objects or {}
        cells = [
            f"<td>{_preview(result, page, picture)}</td>",
            _name(result, page),
            _status(result),
            _value(total, "{:,.3f}"),
            *(_area(result.areas_mm2.get(c), total) for c in self.classes),
            *(_value(objects.get(c), "{:,.0f}") for c in self.counted),
            _value(result.mpp, "{:.4g}"),
            _value(result.seconds, "{:,.1f}"),
            _text(result.tissue),
            _text(result.model, result.model_sha256[:12]),
        ]
        return f"<tr>{''.join(cells)}</tr>\n"

    def totals(self) -> str:
        """The last row: sums over all slides."""
        results = self.results
        total = sum(r.analysed_mm2 or 0.0 for r in results)
        sums = {c: sum(r.areas_mm2.get(c, 0.0) for r in results) for c in self.classes}
        counts = [sum((r.objects or {}).get(c, 0) for r in results) for c in self.counted]
        cells = [
            "<td></td><th scope=row class=text>Total</th><td></td>",
            _value(total, "{:,.3f}"),
            *(_area(sums[c], total) for c in self.classes),
            *(_value(n, "{:,.0f}") for n in counts),
            "<td></td>",
            _value(sum(r.seconds or 0.0 for r in results), "{:,.1f}"),
            "<td></td><td></td>",
        ]
        return f"<tr>{''.join(cells)}</tr>"


def _head(text: str, kind: str = "number", *, swatch: str = "") -> str:
    mark = f'<i class="swatch" style="background:{swatch}"></i>' if swatch else ""
    return f'<th scope=col class="{kind}"><button>{mark}{shown(text)}</button></th>'


def _preview(result: SlideResult, page: str | None, picture: str | None) -> str:
    if picture is None:
        return '<span class="soft">none</span>'
    name = shown(result.slide or result.stem)
    image = f'<img src="{escape(picture, quote=True)}" alt="Overview of {name}" loading="lazy">'
    return image if page is None else f'<a href="{escape(page, quote=True)}">{image}</a>'


def _name(result: SlideResult, page: str | None) -> str:
    name = shown(result.slide or result.stem)
    label = name if page is None else f'<a href="{escape(page, quote=True)}">{name}</a>'
    other = result.slide and not result.slide.startswith(f"{result.stem}.")
    stem = f"<small>outputs {shown(result.stem)}</small>" if other else ""
    return f'<th scope=row class="text name" data-v="{name}">{label}{stem}</th>'


def _status(result: SlideResult) -> str:
    state = _STATES.get(result.status, "bad")
    why = f"<small>{shown(result.error)}</small>" if result.error else ""
    text = shown(result.status)
    return f'<td class="text" data-v="{text}"><span class="badge {state}">{text}</span>{why}</td>'


def _value(value: float | None, form: str) -> str:
    if value is None:
        return '<td data-v="">–</td>'
    return f'<td data-v="{value!r}">{form.format(value)}</td>'


def _area(value: float | None, total: float | None) -> str:
    if value is None:
        return '<td data-v="">–</td>'
    share = f"<small>{100 * value / total:.1f}%</small>" if total else ""
    return f'<td data-v="{value!r}">{value:,.3f}{share}</td>'


def _text(text: str, small: str = "") -> str:
    below = f"<small><code>{shown(small)}</code></small>" if small else ""
    return f'<td class="text" data-v="{shown(text)}">{shown(text) or "–"}{below}</td>'


def shown(text: str) -> str:
    """Text for the page: escaped, and with bytes that are no text made visible."""
    return escape(text.encode("utf-8", "backslashreplace").decode(), quote=True)
