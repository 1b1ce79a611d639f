"""The report of a run: one HTML page, a row a slide. Knows no servers, and opens no slide."""

from __future__ import annotations

import base64
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from wsiseg import __version__
from wsiseg.atomic import staged
from wsiseg.errors import UsageError
from wsiseg.outputs.run_folder import SlideResult
from wsiseg.viewer.damage import checked
from wsiseg.viewer.report_table import Table, shown
from wsiseg.viewer.thumbnails import thumbnail

FEW = 60
"""Up to this many slides the previews are larger, so that the page stays within some megabytes."""

_FEW_PX, _MANY_PX = 720, 320


@dataclass(frozen=True)
class Links:
    """Where a page leads, by number of the slide; None where nowhere.

    Attributes:
        page: address of what a slide's name and preview open.
        picture: address of its preview.
    """

    page: Callable[[int], str | None]
    picture: Callable[[int], str | None]


def write_report(
    path: Path,
    folder: Path,
    results: Sequence[SlideResult],
    *,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write the report of a run as one HTML file that needs no other and no network.

    Names lead to the overviews in the run's folder, which open where that is at hand. Masks and
    overviews that cannot be read make their slide a damaged one.

    Args:
        path: the file; it appears when it is complete.
        folder: of the run.
        results: its slides.
        progress: called with the number of slides done.

    Returns:
        The number of slides without a usable result.

    Raises:
        UsageError: the path is one of the outputs of the run.
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UsageError(f"{path}: a web page is written; give it a name that ends in .html")
    longest = _FEW_PX if len(results) <= FEW else _MANY_PX
    pictures: list[str | None] = []
    looked_at: list[SlideResult] = []
    for done, result in enumerate(map(checked, results), start=1):
        overview = result.files.get("overview")
        data = None if overview is None else thumbnail(overview, longest)
        pictures.append(None if data is None else _data_url(data))
        if overview is not None and data is None and not result.error:
            problem = f"{overview.name}: the picture cannot be read"
            result = replace(result, status="damaged", error=problem)
        looked_at.append(result)
        if progress is not None:
            progress(done)

    def page(number: int) -> str | None:
        overview = results[number].files.get("overview")
        return None if overview is None else _relative(overview, path.parent)

    text = render_report(folder, looked_at, Links(page, pictures.__getitem__))
    with staged(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
    return len(_unusable(looked_at))


def render_report(folder: Path, results: Sequence[SlideResult], links: Links) -> str:
    """The report as HTML; all text from files is escaped, and no script but the page's own runs."""
    style, script = _asset("report.css"), _asset("report.js")
    table = Table(results)
    name = folder.resolve().name or str(folder)
    rows = "".join(
        table.row(r, page=links.page(n), picture=links.picture(n)) for n, r in enumerate(results)
    )
    policy = "default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'; script-src "
    policy += script_hash()
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<link rel="icon" href="data:,">
<title>{shown(name)} - wsiseg</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{shown(name)}</h1>
<p class="soft">{shown(_models(results))}</p>
</header>
{_tiles(results, table.classes)}
{_notices(results)}
<p class="tools"><label>Find <input id="find" type="search" autocomplete="off"></label>
<span id="shown" class="soft" aria-live="polite"></span></p>
<div class="wide">
<table>
<thead>{table.head()}</thead>
<tbody>
{rows}</tbody>
<tfoot>{table.totals()}</tfoot>
</table>
</div>
<footer class="soft">Areas are those of the labels in the masks; percentages are of the analysed
area of the slide. Made {made} by wsiseg {escape(__version__)}. For research; not a medical
device.</footer>
<script>{script}</script>
</body>
</html>
"""


def script_hash() -> str:
    """The page's script as a Content-Security-Policy names it."""
    digest = hashlib.sha256(_asset("report.js").encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _models(results: Sequence[SlideResult]) -> str:
    terms = {r.model: r.licence for r in results if r.model}
    if not terms:
        return "No slide was analysed."
    return "Analysed with " + ", ".join(
        f"{model} (licence: {licence})" if licence else model
        for model, licence in sorted(terms.items())
    )


def _tiles(results: Sequence[SlideResult], classes: dict[str, str]) -> str:
    states = Counter(r.status for r in results)
    cells = [("slides" if len(results) > 1 else "slide", f"{len(results):,}", "")]
    cells += [(s, f"{n:,}", "") for s, n in sorted(states.items()) if s != "ok"]
    analysed = sum(r.analysed_mm2 or 0.0 for r in results)
    cells.append(("mm² analysed", f"{analysed:,.2f}", ""))
    for name, colour in classes.items():
        area = sum(r.areas_mm2.get(name, 0.0) for r in results)
        cells.append((f"mm² {name}", f"{area:,.2f}", colour))
    tiles = "".join(
        f'<div class="tile"><strong>{value}</strong>'
        f"<span>{_swatch(colour)}{shown(text)}</span></div>"
        for text, value, colour in cells[:12]
    )
    return f'<div class="tiles">{tiles}</div>'


def _swatch(colour: str) -> str:
    return f'<i class="swatch" style="background:{colour}"></i>' if colour else ""


def _notices(results: Sequence[SlideResult]) -> str:
    """What must be known before the numbers are used, a paragraph each."""
    lines = []
    bad = _unusable(results)
    if bad:
        verb = "slides have" if len(bad) > 1 else "slide has"
        known = sum(r.analysed_mm2 is not None for r in bad)
        but = f", but with the areas that are known of {known} of them" if known else ""
        lines.append(
            f"{len(bad)} {verb} no usable result; the totals are without what is missing{but}."
        )
    empty = sum(r.status == "no tissue" for r in results)
    if empty:
        lines.append(
            f"On {empty} of the slides no tissue was found, so nothing was analysed there."
        )
    digests = {(r.model, r.model_sha256) for r in results if r.model_sha256}
    if len(digests) > 1:
        lines.append("The slides were not all analysed with the same model file; see their rows.")
    return "".join(f'<p class="note">{shown(line)}</p>' for line in lines)


def _unusable(results: Sequence[SlideResult]) -> list[SlideResult]:
    return [r for r in results if r.status not in ("ok", "no tissue")]


def _data_url(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _relative(path: Path, folder: Path) -> str | None:
    """The address of a file seen from a folder; None where there is no way."""
    try:
        relative = os.path.relpath(path, folder)
    except ValueError:  # another drive
        return None
    return "./" + quote(Path(relative).as_posix(), errors="surrogateescape")


def _asset(name: str) -> str:
    return (files("wsiseg.viewer") / "assets" / name).read_text(encoding="utf-8")
