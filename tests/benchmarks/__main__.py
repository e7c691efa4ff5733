"""How fast we are compared with others, and with what the machine could do: make bench [ONLY=ppo,sft]

Both sides of a ratio do the same work as fresh processes that alternate, so that a noisy machine disturbs
both alike. Prints a table and writes `bench.json`. Each speed is also a share of the limit that the arithmetic of
the work sets at the machine's best matrix product. Every sequence counts fully, so computing common prefixes once can
take the share above 100%. For sampling, the time to read all weights once per step is also shown as a share.

What keeps us from the limit. Sampling: products of few rows run at half of the best product's rate, and torch's
attention of one token to its past takes a fifth of the time; at 64 rows and two cores the products alone take
longer than reading the weights. PPO: two thirds of an update are products; the rest are the steps between them, casting
weights and gradients of float32 masters, and AdamW over all of them. Float32 masters, gradients and moments take twice
the memory of TRL's with all in bf16. Where a CPU has matrix units (AMX), products are faster and the rest weighs more.

Our side runs in bf16 autocast where the CPU computes in bf16. Where it does not, what is in bf16 is not measured.
"""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from tests.benchmarks.audit import tracing, verifying
from tests.benchmarks.parts import PARTS
from tests.benchmarks.workload import gemm_peak, memory_bandwidth
from tunetrail.files import write_json
from tunetrail.models.runtime import use_bf16

TRL_PYTHON = Path(".venv-trl/bin/python")
OURS = [sys.executable, "-m", "tests.benchmarks.peers"]
TRL_PPO = [str(TRL_PYTHON), "-m", "tests.benchmarks.trl_ppo"]
# case -> ({name of the other side: its precision, None for ours}, rounds)
PEERS: dict[str, tuple[dict[str, str | None], int]] = {
    "sampling": ({"vs_generate_64": None}, 3),
    "sft": ({"vs_trl": None}, 3),
    "reward": ({"vs_trl": None}, 3),
    "dpo": ({"vs_trl": None}, 3),
    "ppo": ({"vs_trl_fp32": "fp32", "vs_trl_bf16": "bf16"}, 2),
}


def run(command: list[str]) -> dict:
    """What a side reports on its last line."""
    environment = os.environ | {"PYTHONPATH": ".", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def rounds(case: str, precision: str) -> tuple[list[dict], dict[str, tuple[str, list[dict]]]]:
    """Our runs, and each other side's precision and runs, alternating; without those that this CPU cannot do."""
    others, n = PEERS[case]
    theirs = TRL_PPO if case == "ppo" else [*OURS, case, "stock"]
    found = {name: (other or precision, []) for name, other in others.items() if other != "bf16" or precision == "bf16"}
    ours = []
    for _ in range(n):
        ours.append(run([*OURS, case, "ours", precision]))
        for other, runs in found.values():
            runs.append(run([*theirs, other]))
    return ours, found


def compare(
    case: str, ours: list[dict], precision: str, theirs: list[dict], other: str, peak: float, bandwidth: float
) -> dict:
    """The ratio of each round; above 1 we are faster."""
    speeds = [[side["amount"] / side["seconds"] for side in pair] for pair in zip(ours, theirs, strict=True)]
    # Both get the same data, however each counts it; sampling may end early, so there tokens count.
    same_work = case != "sampling"
    ratios = [
        b["seconds"] / a["seconds"] if same_work else s / t for a, b, (s, t) in zip(ours, theirs, speeds, strict=True)
    ]
    found = {
        "ratio": spread(ratios),
        "unit": "episodes/s" if case == "ppo" else "tokens/s",
        "ours": {"speed": spread([s for s, _ in speeds]), "peak_bytes": max(a["peak_bytes"] for a in ours),
            "precision": precision},
        "theirs": {"speed": spread([t for _, t in speeds]), "peak_bytes": max(b["peak_bytes"] for b in theirs),
            "precision": other},
        "share_of_limit": spread([a["flops"] / a["seconds"] / peak for a in ours]),
    }  # fmt: skip
    if case == "sampling":
        # Every decoding step reads all weights once, whatever the batch.
        found["share_of_bandwidth_limit"] = spread(
            [a["longest"] * a["weight_bytes"] / bandwidth / a["seconds"] for a in ours]
        )
    if case == "ppo":
        found["update_share_of_limit"] = spread([a["update_flops"] / a["update_seconds"] / peak for a in ours])
    return found


def part(name: str, repeats: int = 3) -> dict[str, float]:
    """One of our own optimisations, with and without."""
    command = [sys.executable, "-m", "tests.benchmarks.parts", name]
    return spread([run([*command, "without"])["seconds"] / run([*command, "with"])["seconds"] for _ in range(repeats)])


def said(x: dict[str, float], percent: bool = False) -> str:
    scale, mark = (100, "%") if percent else (1, "")
    digits = 0 if percent else 2
    return f"{x['median'] * scale:.{digits}f}{mark} ({x['low'] * scale:.{digits}f} to {x['high'] * scale:.{digits}f})"


def against_peers(case: str, precision: str, peak: float, bandwidth: float) -> dict:
    """Compares our training or sampling with each peer that this CPU can run, and prints each result at once."""
    results: dict = {}
    ours, others = rounds(case, precision)
    for other in PEERS[case][0].keys() - others.keys():
        results[f"{case}.{other}"] = {"ratio": None, "reason": "this CPU does not compute in bf16"}
        print(f"{case}.{other}: not measured, this CPU does not compute in bf16")
    for other, (their_precision, theirs) in others.items():
        name = f"{case}.{other}"
        found = results[name] = compare(case, ours, precision, theirs, their_precision, peak, bandwidth)
        print(
            f"{name:28} {said(found['ratio'])} times as fast; {found['ours']['speed']['median']:.3g} against "
            f"{found['theirs']['speed']['median']:.3g} {found['unit']}; {said(found['share_of_limit'], True)} of "
            "the limit; peak "
            f"{found['ours']['peak_bytes'] / 2**30:.1f} against {found['theirs']['peak_bytes'] / 2**30:.1f} GiB",
            flush=True,
        )
        for key, what in (
            ("update_share_of_limit", "update alone"),
            ("share_of_bandwidth_limit", "reading the weights alone"),
        ):
            if key in found:
                print(f"{'':28} {what}: {said(found[key], True)} of the limit", flush=True)
    return results


def main() -> None:
    only = [name for name in os.environ.get("ONLY", "").split(",") if name]
    precision = "bf16" if use_bf16("auto") else "fp32"
    results: dict = {"machine": {"cores": os.cpu_count(), "precision": precision, "torch": torch.__version__}}
    for name, dtype in (("gemm.fp32", torch.float32), ("gemm.bf16", torch.bfloat16)):
        results[name] = gemm_peak(dtype) / 1e9
        print(f"{name:28} {results[name]:.0f} GFLOP/s")
    peak, bandwidth = results[f"gemm.{precision}"] * 1e9, memory_bandwidth()
    for case in PEERS:
        if not only or case in only:
            results |= against_peers(case, precision, peak, bandwidth)
    if not only or "audit" in only:
        found = results["audit.vs_sha256sum"] = verifying(Path("results/demo"))
        print(
            f"{'audit.vs_sha256sum':28} {said(found['ratio'])} times as fast; {found['bytes_a_second'] / 1e9:.2f} "
            f"GB/s over {found['bytes'] / 1e9:.2f} GB; the command {found['command_seconds']:.1f} s"
        )
        found = results["audit.trace_10000"] = tracing()
        print(
            f"{'audit.trace_10000':28} {found['up_seconds']:.1f} s up, {found['reverse_seconds']:.1f} s down",
            flush=True,
        )
    if not only or "plan" in only:
        results["plan.2000_shards"] = run([sys.executable, "-m", "tests.benchmarks.planning"])
        for name, found in results["plan.2000_shards"].items():
            if name != "artifacts":
                print(
                    f"{'plan.2000_shards':28} {name}: {found['seconds']:.1f} s ({found['cpu_seconds']:.1f} s of the "
                    f"processor), peak {found['peak_bytes'] / 2**30:.2f} GiB",
                    flush=True,
                )
    if not only or "saving" in only:
        found = results["saving.share_of_training"] = run([sys.executable, "-m", "tests.benchmarks.saving"])
        print(
            f"{'saving.share_of_training':28} {found['share_of_training']:.2%}; {found['seconds']:.1f} s, "
            f"{said(found['of_writing'])} times as long as writing its {found['bytes'] / 1e9:.1f} GB plainly",
            flush=True,
        )
    if not only or "labels" in only:
        found = results["labels.submit"] = run([sys.executable, "-m", "tests.benchmarks.labels"])
        for name, case in found.items():
            print(
                f"{'labels.submit':28} {name}: median {case['median_ms']:.1f} ms, 95% within {case['p95_ms']:.0f} "
                f"ms, of {case['rankings']} rankings by 20 labelers",
                flush=True,
            )
    for name in PARTS:
        if only and "parts" not in only:
            break
        results[name] = part(name)
        print(f"{name}: {said(results[name])} times as fast", flush=True)
    write_json(Path("bench.json"), results)


if __name__ == "__main__":
    main()
