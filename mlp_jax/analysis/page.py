"""A report as one self-contained HTML page: tables, figures and settings."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from mlp_jax.analysis.tables import format_value, statistic_rows

STYLE = """
:root { color-scheme: light dark; --line: #8884; --faint: #777; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .9rem .25rem 0; text-align: left; }
th, td { white-space: nowrap; } th { font-weight: 600; }
td.number { text-align: right; } p { color: var(--faint); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.5rem; font-size: .92rem; }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; } img { background: white; border-radius: 6px; max-width: 100%; }
@media print { body { margin: 0; max-width: none; } figure, tr { break-inside: avoid; } }
"""

NOTE = "<p>Accuracies and errors in per cent, SDs in percentage points.</p>"  # of each page


def make_page(text: str, summary: dict, figures: Iterable[tuple[str, Any]], settings: dict) -> str:
    """The page of a report; `text` and `settings` are shown as they are, and figures as SVG."""
    title = text.splitlines()[0]
    parts = [f"<h1>{escape(title)}</h1>"]
    parts.append(NOTE)
    for family in summary.get("families", []):
        name = "vary {vary}, learning rate {learning_rate:.9g}: {runs:,} runs".format(**family)
        rows = statistic_rows(family, summary["recipe"])
        heads = ("", "estimate", "95 % interval", "unit", "")
        parts += [f"<h2>{escape(name)}</h2>", table(heads, rows)]
    for crossed in summary.get("crossed", []):
        name = "crossed streams, learning rate {learning_rate:.9g}: {runs:,} runs".format(**crossed)
        parts += [f"<h2>{escape(name)}</h2>", crossed_table(crossed)]
    if cells := summary.get("cells"):
        rows = []
        for cell in cells:
            mean = format_value(cell["mean"], "%")
            rows.append((cell["settings"], f"{cell['learning_rate']:.9g}", cell["runs"], *mean))
        parts.append(table(("settings", "learning rate", "runs", "mean, %", "interval"), rows))
    for name, figure in figures:
        alt = figure.get_suptitle() or name
        parts.append(f'<figure><img src="{to_data_url(figure)}" alt="{escape(alt)}"></figure>')
    # the tables leave out which runs diverged, and the pairs of learning rates
    parts.append(f'<h2>All of it as text</h2>\n<pre class="scroll">{escape(text)}</pre>')
    shown = [f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in settings.items()]
    parts += ["<h2>Settings and origin</h2>", f"<dl>{''.join(shown)}</dl>"]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def crossed_table(crossed: dict) -> str:
    """First-order and total share of the variance of each stream, on both kinds of test set."""
    rows = []
    for key, where in (("test", "this test set"), ("distribution", "an infinite one")):
        if indices := crossed.get(key):
            for stream in crossed["streams"]:
                first, total = (indices[kind][stream] for kind in ("indices", "total"))
                shares = (*format_value(first, ""), *format_value(total, ""))
                rows.append((where, stream, *shares))
            rows.append((where, "interactions", *format_value(indices["interactions"], ""), "", ""))
    heads = ("on", "stream", "first-order", "95 % interval", "total", "95 % interval")
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table; cells that begin like a number are aligned as numbers."""

    def cell(value: Any) -> str:
        text = str(value)
        number = text[:1].isdigit() or (text[:1] == "-" and text[1:2].isdigit())
        return f"<td{' class=number' * number}>{escape(text)}</td>"

    head = "".join(f"<th>{escape(each)}</th>" for each in heads)
    lines = "\n".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>\n{lines}</table></div>'


def to_data_url(figure: Any) -> str:
    """The figure as a data: URL of SVG, always the same bytes."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "mlp_jax"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(drawn.getvalue()).decode()
