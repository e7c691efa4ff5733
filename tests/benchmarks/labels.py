"""How long a labeler waits for a ranking to be stored, with twenty labelers working at once over HTTP.

    python -m tests.benchmarks.labels

`paced`: each labeler rests about half a second before each page and again before each answer, which is many times
faster than people rank. `flat_out`: nobody rests, so each request queues behind those of the other nineteen. PostgreSQL
is measured only if it is installed.
"""

import json
import statistics
import tempfile

from tests.labels import at_once, postgres, postgres_programs, ranking, served_alone
from tunetrail.labeling.app.store import Store

LABELERS, RANKINGS = 20, 50


def latency(url: str, pause: float) -> dict[str, float]:
    """Milliseconds per submit, median and 95th percentile, and the number of submits."""
    store = Store(url)
    tasks = [ranking(f"t{i}", 4) for i in range(LABELERS * RANKINGS // 2)]
    store.publish(tasks, {"overlap": 3})
    with served_alone(url) as (_, address):
        done = at_once(store, address, LABELERS, RANKINGS, pause)
    taken = sorted(1000 * seconds for labeler in done for seconds in labeler.latencies)
    assert store.fault() is None
    return {"median_ms": statistics.median(taken), "p95_ms": taken[int(0.95 * len(taken))], "rankings": len(taken)}


def submitting() -> dict[str, dict[str, float]]:
    """Latencies by database and pace."""
    found = {}
    paces = {"paced": 0.5, "flat_out": 0.0}
    for name, pause in paces.items():
        with tempfile.TemporaryDirectory() as folder:
            found[f"sqlite.{name}"] = latency(f"sqlite:///{folder}/labels.db", pause)
        if postgres_programs():
            with postgres() as url:
                found[f"postgresql.{name}"] = latency(url, pause)
    return found


if __name__ == "__main__":
    print(json.dumps(submitting()))
