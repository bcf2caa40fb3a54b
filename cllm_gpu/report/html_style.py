"""The style sheet of the report page, for light and dark mode and any width."""

from __future__ import annotations

STYLE = """
:root { --page: #fff; --text: #1c2024; --soft: #5c6670; --rule: #dde1e6; --panel: #f6f7f9;
  --c0: #0067b1; --c1: #c8501e; --c2: #00845c; --c3: #a83f80;
  --c4: #8a6d00; --c5: #5b4fc4; --c6: #b3262e; --c7: #4a5560 }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --text: #e6e9ec; --soft: #9aa5b0; --rule: #343b43; --panel: #1e2328;
    --c0: #5ab0f2; --c1: #f0915f; --c2: #3fc79a; --c3: #e58cc4;
    --c4: #d9b840; --c5: #a79df5; --c6: #f27d83; --c7: #aab4be }
}
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 90rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif }
h1, h2, h3, figcaption { line-height: 1.25; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; margin: .5rem 0 }
h2 { font-size: 1.25rem; margin: 2rem 0 .75rem; border-bottom: 1px solid var(--rule); padding-bottom: .25rem }
h3 { font-size: 1rem; margin: 1rem 0 .5rem }
p, small { color: var(--soft) }
small { font-weight: normal }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: max-content; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule) }
th:first-child { padding-left: 0 }
.text { text-align: left }
thead th { color: var(--soft); font-weight: normal }
tbody th { font-weight: 600 }
th { max-width: 18rem; white-space: normal; overflow-wrap: anywhere }
pre { margin: .5rem 0; padding: .75rem; overflow: auto; max-height: 28rem; background: var(--panel); border-radius: 6px;
  font: 13px/1.45 ui-monospace, monospace; tab-size: 4 }
details { margin: .25rem 0 }
summary { cursor: pointer }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 1.5rem }
figure { margin: 0; min-width: 0 }
figcaption { font-weight: 600 }
figcaption ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .25rem 0; padding: 0;
  font-size: .875rem; font-weight: normal; color: var(--soft) }
figure > svg { display: block; width: 100%; height: auto }
figcaption li { display: flex; align-items: center; min-width: 0 }
.swatch { flex: none; width: 24px; height: 8px; margin-right: .4rem }
svg text { font-size: 13px; fill: var(--soft) }
.rule { stroke: var(--rule) }
.axis { stroke: var(--soft) }
.line { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.dotted { stroke-dasharray: 5 4 }
.faint { stroke-width: 1; opacity: .25 }
@media (max-width: 40rem) { body { padding: .75rem } th { max-width: 9.5rem }
  svg text { font-size: 19px } .line { stroke-width: 2.4 }  .faint { stroke-width: 1 } }
@media print { pre { max-height: none } }
""" + "".join(f".c{n} {{ stroke: var(--c{n}) }} circle.c{n} {{ fill: var(--c{n}); stroke: none }}\n" for n in range(8))
