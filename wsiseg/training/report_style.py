"""Style and script of the HTML report. Text only; knows no metrics."""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark; --paper: #ffffff; --card: #f5f6f8; --ink: #1c2026;
  --soft: #5d6670; --rule: #d7dbe0; --accent: #0b62a4; --bar: #cfe3f3; --warn: #fff6df;
  --warn-edge: #d9a520; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --card: #1e2329; --ink: #e8eaed;
  --soft: #a3abb5; --rule: #363d46; --accent: #7db8e8; --bar: #1f4461; --warn: #332a12;
  --warn-edge: #b8891a; } }
* { box-sizing: border-box; }
html { background: var(--paper); }
body { margin: 0 auto; max-width: 1120px; padding: 2.2rem 1.4rem 4rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial,
  sans-serif; }
h1 { margin: 0; font-size: 1.8rem; line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 2.8rem 0 .6rem; padding-top: .9rem; border-top: 1px solid var(--rule);
  font-size: 1.25rem; }
h3 { margin: 1.6rem 0 .4rem; font-size: 1.02rem; }
p { max-width: 46rem; margin: .5rem 0; }
.soft, figcaption, dt { color: var(--soft); }
.soft { font-size: .92rem; }
a { color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.4rem; margin: 1.2rem 0; }
dd { margin: 0; overflow-wrap: anywhere; }
code { font: .86rem/1.5 ui-monospace, Consolas, Menlo, monospace; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.4rem 0 .6rem; }
.tile { padding: .8rem 1rem; border-radius: 10px; background: var(--card); }
.tile strong { display: block; font-size: 1.9rem; line-height: 1.15;
  font-variant-numeric: tabular-nums; }
.tile span { color: var(--soft); font-size: .88rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .38rem .8rem; border-bottom: 1px solid var(--rule); text-align: right;
  vertical-align: top; }
thead th { border-bottom: 2px solid var(--rule); font-size: .88rem; vertical-align: bottom; }
th:first-child, td.text, th.text { text-align: left; }
tbody th { min-width: 8.5rem; font-weight: 500; overflow-wrap: break-word; }
td.text { min-width: 16rem; color: var(--soft); font-size: .9rem; }
tr.noted > * { padding-bottom: 0; border-bottom: 0; }
tr.ours > * { background: var(--card); font-weight: 700; }
.swatch { display: inline-block; width: 1rem; height: 1rem; margin-right: .5rem;
  border: 1px solid var(--soft); border-radius: 3px; vertical-align: -.12rem; }
.note { padding: .7rem 1rem; border-left: 4px solid var(--warn-edge); border-radius: 4px;
  background: var(--warn); font-size: .94rem; }
.scroll { max-height: 34rem; overflow: auto; border: 1px solid var(--rule); border-radius: 8px; }
.scroll table { width: 100%; margin: 0; }
.scroll thead th { position: sticky; top: 0; background: var(--card); }
.sortable button { border: 0; padding: 0; color: inherit; background: none; font: inherit;
  font-weight: 700; cursor: pointer; }
.sortable th[aria-sort=ascending] button::after { content: " \\2191"; }
.sortable th[aria-sort=descending] button::after { content: " \\2193"; }
td.bar { background: linear-gradient(to right, var(--bar) calc(var(--v) * 100%), transparent 0); }
figure { margin: 1rem 0 1.6rem; }
figure img { display: block; max-width: 100%; height: auto; border: 1px solid var(--rule);
  border-radius: 8px; background: #ffffff; }
figcaption { margin-bottom: .3rem; overflow-wrap: anywhere; }
svg text { fill: var(--soft); font-size: 12px; }
svg rect { fill: var(--accent); }
svg line { stroke: var(--rule); }
footer { margin-top: 3rem; color: var(--soft); font-size: .88rem; }
@media print { body { max-width: none; padding: 0; font-size: 11pt; }
  .scroll { max-height: none; overflow: visible; border: 0; }
  .scroll thead th { position: static; }
  h2, h3 { break-after: avoid; } figure, tr, .tiles { break-inside: avoid; }
  .tile, .note, .swatch, td.bar, tr.ours > *, svg { print-color-adjust: exact; } }
"""

SCRIPT: Final = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending";
    const value = (row) => row.cells[column].dataset.v;
    const rows = [...table.tBodies[0].rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (x === "" || y === "") return (x === "") - (y === "");
      const order = column === 0 ? x.localeCompare(y, undefined, {numeric: true}) : x - y;
      return down ? -order : order;
    });
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    table.tBodies[0].append(...rows);
  }));
}
"""
