"""The style sheet of report.html, with its colours for light and dark."""

from typing import Final

STYLE: Final = """
:root { color-scheme: light dark;
  --page: #ffffff; --card: #fafafa; --ink: #1d2127; --muted: #667080; --grid: #e4e7eb; --band: #f1f3f6;
  --one: #2563a8; --two: #cc6a1a; --three: #9aa5b1; --good: #1f7a4d; --bad: #b3382c; }
@media (prefers-color-scheme: dark) { :root {
  --page: #14171b; --card: #1a1e23; --ink: #e3e6ea; --muted: #98a2ae; --grid: #2b3138; --band: #1c2127;
  --one: #6ba7e5; --two: #e59a55; --three: #5b6672; --good: #5cc28f; --bad: #ec8072; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 24px 64px; }
.top p { margin: 0; color: var(--muted); }
h1 { margin: 0 0 16px; font-size: 30px; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 48px 0 12px; padding-top: 16px; border-top: 1px solid var(--grid); font-size: 19px; font-weight: 650; }
.top dl { display: flex; flex-wrap: wrap; gap: 12px 36px; margin: 0; }
.top dt, .note, caption, .chart figcaption { color: var(--muted); font-size: 13px; }
.top dd { margin: 0; font-size: 18px; font-variant-numeric: tabular-nums; }
.note { margin: 0 0 12px; }
.two, .three { display: grid; gap: 24px 32px; align-items: start; grid-template-columns: repeat(auto-fit, minmax(min(100%, 420px), 1fr)); }
.three { grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 20px; }
.chart { margin: 0; overflow-x: auto; }
.chart figcaption { padding-left: 4px; }
.chart svg { display: block; width: 100%; height: auto; }
.wide svg { min-width: 640px; }
.chart text { font-family: inherit !important; }
.table { overflow-x: auto; margin-bottom: 20px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 6px; }
th, td { padding: 5px 14px 5px 0; border-bottom: 1px solid var(--grid); text-align: left; white-space: nowrap; }
th { color: var(--muted); font-weight: 500; }
.numbers td { font-size: 13px; }
.fell { color: var(--good); font-weight: 650; }
.rose { color: var(--bad); }
.bar { display: inline-block; width: 110px; height: 8px; margin-right: 10px; border-radius: 4px; background: var(--grid); overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--one); }
.samples { columns: 310px 3; column-gap: 20px; }
.sample { break-inside: avoid; margin-bottom: 20px; padding: 12px 14px; border: 1px solid var(--grid); border-radius: 8px; background: var(--card); font-size: 14px; }
.sample header { margin-bottom: 8px; }
.sample .id { color: var(--muted); font-size: 12px; overflow-wrap: anywhere; }
.mark { font-weight: 650; margin-right: 6px; }
.right .mark { color: var(--good); }
.wrong .mark { color: var(--bad); }
.question, .sample dd { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24em; overflow-y: auto; }
.picture { display: inline-block; margin: 2px 6px 2px 0; vertical-align: bottom; white-space: normal; }
.single .picture { display: block; margin-bottom: 6px; }
.picture img { max-width: 100%; height: auto; margin-right: 2px; border-radius: 3px; vertical-align: bottom; }
.picture .pixels { image-rendering: pixelated; }
.picture figcaption { color: var(--muted); font-size: 12px; }
.empty { display: inline-block; width: 36px; height: 28px; border: 1px dashed var(--muted); border-radius: 3px; }
.sample dl { display: grid; grid-template-columns: auto 1fr; gap: 4px 12px; margin: 10px 0 0; padding-top: 8px; border-top: 1px solid var(--grid); }
.sample dt { color: var(--muted); }
.sample dd { margin: 0; font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
ul { margin: 0; padding-left: 20px; }
@media print { :root { color-scheme: light; } .question, .sample dd { max-height: none; } }
"""
