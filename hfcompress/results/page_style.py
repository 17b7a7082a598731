"""How the report's page looks: on phones and wide screens, light and dark, on paper."""

from __future__ import annotations

LIGHT = """
color-scheme: light; --paper: #ffffff; --ink: #1b2430; --soft: #56616f; --line: #dde2e8; --raised: #f5f7f9; --row: #eef4f9;
--reference: #c2410c; --step: #0068a3; --last: #007f5c; --trail: #8a96a3; --good: #00704f; --bad: #b3261e; --link: #005a8f;"""
DARK = """
color-scheme: dark; --paper: #12171d; --ink: #e6eaef; --soft: #a3aebb; --line: #2f3944; --raised: #1a2129; --row: #1b2733;
--reference: #f58a51; --step: #5db4ea; --last: #3ecf9f; --trail: #71808f; --good: #4fd0a1; --bad: #ff8f86; --link: #7cc4f2;"""

STYLE = f"""
:root {{{LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{{DARK} }} }}
@media print {{ :root {{{LIGHT} }} }}
* {{ box-sizing: border-box; }}
html {{ -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }}
body {{ margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }}
main {{ max-width: 1140px; margin: 0 auto; padding: 48px 24px 72px; }}
h1 {{ font-size: 1.05rem; font-weight: 600; color: var(--soft); margin: 0; line-height: 1.4; }}
h2 {{ font-size: 1.25rem; font-weight: 650; letter-spacing: -0.01em; margin: 64px 0 16px; line-height: 1.3; }}
h3 {{ font-size: 0.95rem; font-weight: 600; margin: 0 0 8px; }}
p {{ margin: 0 0 12px; max-width: 75ch; }}
a {{ color: var(--link); }}
.verdict {{ font-size: clamp(1.35rem, 0.9rem + 1.6vw, 2rem); line-height: 1.3; font-weight: 650; letter-spacing: -0.015em;
  margin: 10px 0 12px; max-width: 34em; }}
.verdict.long {{ font-size: clamp(1.2rem, 0.9rem + 1vw, 1.5rem); max-width: 46em; }}
.note, .from {{ color: var(--soft); font-size: 0.875rem; }}
.note {{ margin-top: 12px; max-width: 95ch; }}
.legend .note {{ margin: 0; }}
ul, ol {{ list-style: none; margin: 0; padding: 0; }}
.goal {{ margin: 20px 0 0; }}
.goal li {{ position: relative; padding: 2px 0 2px 28px; }}
.goal svg {{ position: absolute; left: 0; top: 7px; fill: none; stroke: var(--good); stroke-width: 2.5;
  stroke-linecap: round; }}
.goal .missed svg {{ stroke: var(--bad); }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 215px), 1fr)); gap: 16px; margin: 36px 0 0; }}
.tile {{ background: var(--raised); border-radius: 10px; padding: 18px 20px; }}
.tile dt {{ color: var(--soft); font-size: 0.875rem; }}
.tile dd {{ margin: 0; }}
.tile .value {{ font-size: 1.9rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.3; margin: 2px 0 4px;
  font-variant-numeric: tabular-nums; }}
.tile .more {{ color: var(--soft); font-size: 0.875rem; line-height: 1.45; }}
.scroll {{ overflow-x: auto; }}
.scroll:focus-visible {{ outline: 2px solid var(--link); outline-offset: 4px; }}
table {{ border-collapse: collapse; font-size: 0.84rem; overflow-wrap: normal; width: 100%;
  font-variant-numeric: tabular-nums; }}
th, td {{ padding: 9px 10px; text-align: right; vertical-align: top; white-space: nowrap; font-weight: 400;
  border-bottom: 1px solid var(--line); }}
thead th {{ color: var(--soft); border-bottom: 1px solid var(--trail); }}
th:first-child {{ text-align: left; padding-left: 10px; white-space: normal; min-width: 10.5em; max-width: 20em;
  overflow-wrap: anywhere; }}
tbody tr.result > * {{ background: var(--row); font-weight: 600; }}
.pair {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); gap: 32px; }}
.pair > * {{ min-width: 0; margin: 0; }}
svg.figure {{ display: block; width: 100%; height: auto; max-width: 620px; }}
svg text {{ font-family: inherit; font-size: 12px; fill: var(--soft); }}
svg .tick, svg .middle, svg .number, svg .cell text {{ text-anchor: middle; }}
svg .y {{ text-anchor: end; }}
svg .place {{ text-anchor: start; }}
svg .number {{ fill: var(--ink); font-weight: 650; }}
svg .label {{ fill: var(--ink); }}
svg .cell text {{ font-size: 11px; }}
svg .grid {{ stroke: var(--line); fill: none; }}
svg .axis {{ stroke: var(--trail); fill: none; }}
svg .trail {{ stroke: var(--trail); fill: none; stroke-width: 1.2; }}
svg .spread {{ stroke: var(--trail); fill: none; }}
svg .loss {{ stroke: var(--step); fill: none; stroke-width: 2; stroke-linejoin: round; }}
svg .gone {{ fill: var(--paper); stroke: var(--trail); }}
svg .left {{ fill: var(--ink); }}
.mark {{ stroke: var(--paper); stroke-width: 1; }}
.reference {{ fill: var(--reference); }}
.step {{ fill: var(--step); }}
.last {{ fill: var(--last); }}
.same, .compiled {{ fill: var(--paper); stroke: var(--reference); stroke-width: 2; }}
.legend {{ columns: 2; column-gap: 32px; margin-top: 16px; font-size: 0.875rem; }}
.legend li {{ break-inside: avoid; padding: 2px 0 2px 50px; position: relative; }}
.legend .swatch {{ position: absolute; left: 24px; top: 5px; }}
.legend b {{ position: absolute; left: 0; width: 18px; text-align: right; }}
.bits {{ display: inline-block; min-width: 30px; text-align: center; font-size: 0.75rem; padding: 1px 4px; }}
pre {{ background: var(--raised); border-radius: 10px; padding: 18px 20px; margin: 0 0 12px; overflow-x: auto;
  font: 0.84rem/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: normal; }}
code {{ font: inherit; }}
.machine {{ display: grid; grid-template-columns: max-content 1fr; gap: 4px 24px; margin: 0; font-size: 0.875rem; }}
.machine dt {{ color: var(--soft); }}
.machine dd {{ margin: 0; }}
footer {{ margin-top: 64px; color: var(--soft); font-size: 0.875rem; }}
@media (max-width: 640px) {{
  main {{ padding: 28px 16px 48px; }}
  h2 {{ margin-top: 48px; }}
  .legend {{ columns: 1; }}
  .machine {{ grid-template-columns: 1fr; gap: 0; }}
  .machine dd {{ margin-bottom: 8px; }}
}}
@media print {{
  body {{ font-size: 10.5pt; }}
  main {{ max-width: none; padding: 0; }}
  h2 {{ margin-top: 28px; break-after: avoid; }}
  .scroll, pre {{ overflow: visible; }}
  pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); }}
  .tile {{ border: 1px solid var(--line); padding: 10px 12px; }}
  .tiles {{ grid-template-columns: repeat(4, 1fr); gap: 10px; }}
  .tile .value {{ font-size: 1.4rem; }}
  .pair {{ grid-template-columns: 1fr 1fr; }}
  table {{ font-size: 7.5pt; }}
  th, td {{ white-space: normal; padding: 4px 5px; }}
  th:first-child {{ min-width: 0; }}
  svg.layers {{ max-width: 100%; height: auto; }}
  svg, .tile, tr, figure {{ break-inside: avoid; }}
  svg rect, svg .mark, .bits {{ print-color-adjust: exact; -webkit-print-color-adjust: exact; }}
}}
"""
