"""Best-of-n: a policy that samples n responses from the SFT model and keeps the one with the highest reward.

    python -m tunetrail.stages.best_of_n --config C.json --input policy=… --input reward=… --output … --state …

Nothing is trained: `policy.json` names the model to sample from and the reward model that chooses. The KL to the SFT
model is at most log n - (n-1)/n (Stiennon et al. 2020, appendix G.3), and exactly that if no two samples tie.
"""

import os
import sys

from tunetrail.config.best_of_n import BestOfNConfig
from tunetrail.contract.stage import Stage
from tunetrail.evaluation.stats import best_of_n_kl
from tunetrail.files import write_json
from tunetrail.provenance.manifest import sha256_json
from tunetrail.stages.registry import start


def run(stage: Stage) -> dict:
    config = BestOfNConfig(**stage.config)
    members = {
        role: {"path": os.path.relpath(stage.inputs[role].folder), "manifest": sha256_json(stage.inputs[role].manifest)}
        for role in ("policy", "reward")
    }
    write_json(stage.work / "policy.json", {"n": config.n} | members)
    return {"n": config.n, "kl_bound": best_of_n_kl(config.n)}


if __name__ == "__main__":
    sys.exit(start("best_of_n", run))
