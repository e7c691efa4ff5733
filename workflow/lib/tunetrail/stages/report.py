"""The report: one self-contained HTML page, and its figures as SVG files.

    python -m tunetrail.stages.report --config C.json --input base=…/manifest.json --input data=… [--input sft=…]
        [--input comparisons=…] [--input reward=…] [--input retention=…] --input policy.NAME=… --input evaluation.NAME=…
        --output results/RUN/report/manifest.json --state state/RUN/report

Writes `report.html`, which loads nothing and opens from disk, and `figures/<name>.svg`, one for each
name in `tunetrail.reporting.figures.FIGURES`, always.
"""

import sys

from tunetrail.config.evaluation import ReportConfig
from tunetrail.contract.stage import Stage
from tunetrail.reporting.charts import svg
from tunetrail.reporting.collect import collect
from tunetrail.reporting.figures import FIGURES
from tunetrail.reporting.page import draw, render
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    config = ReportConfig(**stage.config)
    found = collect(
        stage.output.parent.name,
        {role: parent.folder for role, parent in stage.inputs.items()},
        stage.output,
        stage.attempt.digests,
    )
    figures = draw([found], FIGURES)
    (stage.work / "figures").mkdir()
    for name in FIGURES:
        wide = figures[name][0] if name in figures else svg(None)
        (stage.work / "figures" / f"{name}.svg").write_text(wide, encoding="utf-8")
    (stage.work / "report.html").write_text(render([found], figures, config.title, config.samples), encoding="utf-8")
    return {
        m.name: {"win_rate": (found.match_of(m) or {}).get("win_rate"), "gold": m.interval("gold")}
        for m in found.models
    }


if __name__ == "__main__":
    sys.exit(start("report", run))
