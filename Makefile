# make demo   set up and run config/config.yaml: the whole pipeline on a real model
# make course the slides: one sentence by next-token training, two pairs by DPO, and what each way of fine-tuning costs
# make status how far that run is
# make test   set up and run every test; make test-unit: the quick ones
# make bench  speed next to TRL, transformers and the machine's limit; writes bench.json (ONLY=sft,ppo,sampling,reward,dpo,audit,plan,saving,labels,parts)
PYTHON ?= python3
VENV := .venv
RUN := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo course status test test-unit check bench schema lock clean

demo: $(VENV)/.installed
	$(RUN) snakemake --profile profiles/local

course: $(VENV)/.installed
	$(RUN) snakemake --profile profiles/local --configfile config/examples/course.yaml

# Another run: make status RUN_OF="--configfile my.yaml --profile slurm"
status: $(VENV)/.installed
	@$(RUN) tunetrail status $(RUN_OF)

test: $(VENV)/.tested check
	$(RUN) OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m pytest -n 4 --no-loadscope-reorder --durations 25

# For daily work: no training, no killing, no cluster, no browser.
test-unit: $(VENV)/.tested
	$(RUN) OMP_NUM_THREADS=1 python -m pytest -n 2 -m "not slow" tests/unit

check: $(VENV)/.tested
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy
	$(RUN) snakefmt --check Snakefile workflow/rules
	$(RUN) snakemake --lint --configfile config/examples/tiny.yaml
	$(RUN) python -m pytest -q tests/unit/test_layout.py

bench: $(VENV)/.tested $(VENV)-trl/.installed
	$(RUN) snakemake --profile profiles/local --quiet --until data
	$(RUN) python -m tests.benchmarks

# Generated files; the tests fail where they are stale.
schema: $(VENV)/.installed
	$(RUN) tunetrail config schema > workflow/schemas/config.schema.json
	$(RUN) tunetrail config document --write config/README.md

# The lock is envs/requirements.txt; the conda environment and the container read or repeat it.
lock: $(VENV)/.tested
	$(RUN) python envs/lock.py

$(VENV)/.installed: envs/requirements.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r envs/requirements.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.tested: $(VENV)/.installed envs/requirements-test.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r envs/requirements-test.txt
	touch $@

# The last TRL with PPO, before the packages of the other environment.
$(VENV)-trl/.installed: $(VENV)/.installed
	test -x $(VENV)-trl/bin/python || $(PYTHON) -m venv $(VENV)-trl
	$(VENV)-trl/bin/python -m pip install --quiet --disable-pip-version-check --no-deps trl==1.12.0
	$(VENV)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > $$($(VENV)-trl/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/shared.pth
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-trl .snakemake
