"""The report: one self-contained HTML page, and its figures as SVG files.

    python -m tunetrail.stages.report --config C.json --input base=…/manifest.json --input data=… [--input sft=…]
        [--input comparisons=…] [--input reward=…] [--input retention=…] --input policy.NAME=… --input evaluation.NAME=…
        --output results/RUN/report/manifest.json --state state/RUN/report

Writes `report.html`, which loads nothing and can be opened from disk, and always one `figures/<name>.svg` for each name
in `tunetrail.reporting.figures.FIGURES`.
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
    collected = collect(
        stage.output.parent.name,
        {role: parent.folder for role, parent in stage.inputs.items()},
        stage.output,
        stage.attempt.digests,
    )
    figures = draw([collected], FIGURES)
    (stage.work / "figures").mkdir()
    for name in FIGURES:
        wide = figures[name][0] if name in figures else svg(None)
        (stage.work / "figures" / f"{name}.svg").write_text(wide, encoding="utf-8")
    (stage.work / "report.html").write_text(
        render([collected], figures, config.title, config.samples), encoding="utf-8"
    )
    return {
        m.name: {"win_rate": (collected.match_of(m) or {}).get("win_rate"), "gold": m.interval("gold")}
        for m in collected.models
    }


if __name__ == "__main__":
    sys.exit(start("report", run))
