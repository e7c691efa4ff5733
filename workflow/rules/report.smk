FIGURES = {  # name -> where `snakemake --report` lists it
    "next_tokens": ("Probes", "Two positions, before and after"),
    "preference_curves": ("Preferences", "Log-probabilities during training"),
    "methods": ("Forgetting", "Methods of fine-tuning"),
    "win_rates": ("Win rates", "Against the model that policies start from"),
    "win_rates_base": ("Win rates", "Against the base model"),
    "win_matrix": ("Win rates", "All against all"),
    "strengths": ("Win rates", "Bradley-Terry strengths"),
    "gold": ("Win rates", "Gold scores"),
    "reward_kl": ("Reward and KL", "Frontier"),
    "over_optimisation": ("Reward and KL", "During PPO"),
    "learning": ("Learning curves", "Every trained stage"),
    "probes": ("Probes", "Next tokens, before and after"),
    "preferences": ("Preferences", "Log-probabilities"),
    "preference_shift": ("Preferences", "Changes through training"),
    "reward_accuracy": ("Reward model", "Accuracy"),
    "calibration": ("Reward model", "Reliability"),
    "forgetting": ("Forgetting", "Unrelated text and multiple choice"),
    "contamination": ("Data", "Overlap with training texts"),
}


use rule stage as report with:
    input:
        unpack(reads("report")),
    output:
        manifest=f"{RESULTS}/report/manifest.json",
        page=report(
            f"{RESULTS}/report/report.html",
            category="Report",
            labels={"figure": "The whole run"},
            caption="../report/report.rst",
        ),
        figures=[
            report(
                f"{RESULTS}/report/figures/{name}.svg",
                category=category,
                labels={"figure": label},
                caption=f"../report/{name}.rst",
            )
            for name, (category, label) in FIGURES.items()
        ],
    pathvars:
        artifact="report",
    localrule: is_submitted("report")
