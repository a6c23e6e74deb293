"""Section of an evaluation page on the cost of each type of error."""

from __future__ import annotations

from html import escape

from m2f.eval.metrics.error_types import ErrorCosts
from m2f.eval.report.charts import BAD, Bar, bar_chart
from m2f.eval.report.page import Cell, grid, paragraph, table

MEANINGS = {
    "classification": "would match an annotation of another class",
    "localisation": "right class, IoU from 0.1 to 0.5",
    "both": "another class, IoU from 0.1 to 0.5",
    "duplicate": "another prediction already matches its annotation",
    "background": "IoU of at most 0.1 with every annotation",
    "missed": "annotation that no corrected prediction would match",
}


def error_costs(costs: ErrorCosts) -> str:
    """Return a chart of the gains and a table of meanings; "" if the metric is undefined."""
    if costs.value is None:
        return ""
    bars = [
        Bar(name, 100 * gain, f"{100 * gain:+.1f} ({costs.counts[name]:,})", BAD) for name, gain in costs.gains.items()
    ]
    meanings = [[name, Cell(escape(MEANINGS[name]), "text")] for name in costs.gains]
    lead = (
        f"Gain in {costs.metric} (now {100 * costs.value:.1f}) if all errors of one type were corrected, with the "
        "number of errors in brackets. Gains are not additive."
    )
    return paragraph(lead, "faint") + grid(
        [bar_chart(f"gain in {costs.metric} by type of error", bars), table(["type", "meaning"], meanings)]
    )
