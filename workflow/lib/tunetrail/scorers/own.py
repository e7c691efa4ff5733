"""A scorer written by the user. It runs in separate processes, so that a call that hangs can be stopped."""

import json
import math
import select
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tunetrail.errors import DataError

# The program of such a process: a line of JSON in, a line of JSON out. What the function prints goes to standard error.
PROGRAM = """
import json, os, runpy, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[1])))
out, sys.stdout = os.fdopen(os.dup(1), "w"), sys.stderr
os.dup2(2, 1)
path, name = sys.argv[1:]
def said(word, error):
    return {word: " ".join(f"{type(error).__name__}: {error}".split())}
try:
    module = runpy.run_path(path)
    function = module.get(name)
    ready = {} if callable(function) else {"missing": sorted(k for k in module if callable(module[k]) and k[0] != "_")}
except BaseException as error:
    ready = said("failed", error)
print(json.dumps(ready), file=out, flush=True)
for line in sys.stdin:
    try:
        value = function(*json.loads(line))
        try:
            reply = {"value": {k: float(v) for k, v in value.items()} if isinstance(value, dict) else float(value)}
        except (TypeError, ValueError):
            reply = {"odd": repr(value)[:80]}
    except BaseException as error:
        reply = said("raised", error)
    print(json.dumps(reply), file=out, flush=True)
"""
WORKERS = 2
IMPORT_SECONDS = 300


class OwnScorer:
    """Calls a function in a Python file, in two processes at once."""

    def __init__(self, name: str, path: Path, function: str, timeout: float):
        """Raises DataError if the file cannot be run or has no such function."""
        self.name, self.path, self.function, self.timeout = name, path, function, timeout
        self.workers = [
            subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(path), function], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            for _ in range(WORKERS)
        ]
        for worker in self.workers:
            ready = self._reply(worker, IMPORT_SECONDS, "while it was imported")
            if "missing" in ready:
                available = ", ".join(ready["missing"]) or "none"
                raise DataError(f"scorers.{name}: {path} has no function {function}; it has {available}")
            if "failed" in ready:
                raise DataError(f"scorers.{name}: {path} cannot be imported: {ready['failed']}")

    def __call__(self, calls: Sequence[tuple[str, str, str | None, dict]]) -> list[float | dict[str, float]]:
        """What the function returns for each (prompt, completion, reference, row).

        Raises DataError that names the row if the function raises, takes too long, or returns no finite number.
        """

        def share_of(n: int) -> list[float | dict[str, float] | DataError]:
            results: list[float | dict[str, float] | DataError] = []
            for call in calls[n :: len(self.workers)]:
                try:
                    results.append(self._call(self.workers[n], call))
                except DataError as error:
                    return [*results, error]
            return results

        with ThreadPoolExecutor(len(self.workers)) as pool:
            parts = list(pool.map(share_of, range(len(self.workers))))
        scores = []
        for i in range(len(calls)):  # in the rows' order, so that the first of two errors is raised
            score = parts[i % len(parts)][i // len(parts)]
            if isinstance(score, DataError):
                raise score
            scores.append(score)
        return scores

    def _call(self, worker: subprocess.Popen, call: tuple[str, str, str | None, dict]) -> float | dict[str, float]:
        where = f"row {call[3].get('id')}"
        assert worker.stdin is not None
        try:
            worker.stdin.write(json.dumps(call).encode() + b"\n")
            worker.stdin.flush()
        except BrokenPipeError:
            raise self._error(f"its process has ended before {where}") from None
        reply = self._reply(worker, self.timeout, f"on {where}")
        if "raised" in reply:
            raise self._error(f"{where} raised {reply['raised']}")
        value: Any = reply.get("value")
        numbers = value.values() if isinstance(value, dict) else [value]
        if "odd" in reply or not all(math.isfinite(number) for number in numbers):
            raise self._error(
                f"{where} gave {reply.get('odd', value)}; it must give a finite number, or a dict of them"
            )
        if isinstance(value, dict) and "total" not in value:
            raise self._error(f"{where} gave a dict without 'total', which is the score; it has {', '.join(value)}")
        return value

    def _error(self, what: str) -> DataError:
        return DataError(f"scorers.{self.name}: {self.path}: {self.function}: {what}")

    def _reply(self, worker: subprocess.Popen, seconds: float, where: str) -> dict[str, Any]:
        assert worker.stdout is not None
        if not select.select([worker.stdout], [], [], seconds)[0]:
            worker.kill()
            raise self._error(f"took longer than {seconds:g} s {where}; speed it up or raise timeout_seconds")
        line = worker.stdout.readline()
        if not line:
            raise self._error(f"its process ended {where}, exit code {worker.wait()}")
        return json.loads(line)

    def __del__(self) -> None:
        for worker in getattr(self, "workers", []):
            worker.kill()
