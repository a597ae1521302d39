# What a person runs in a clone. Everything lives in .venv, made when it is needed; no root, nothing outside this folder.
#
#     make demo                    train for a few rounds on this machine
#     make test TORCH=legacy       with the torch for Maxwell, Pascal and Volta
#     make test PYTHON=python3.12  with this interpreter (default: the first of python3, python3.13 … that is new enough)

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

TORCH ?= new
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/installed-$(TORCH)

# The modules without network, disk or clock: no branch of theirs may go untested.
PURE := server/rounds.py server/fleet.py server/averaging.py server/optimizers.py server/robust.py
PURE += server/robust_rules.py server/outliers.py common/robustness.py common/compatibility.py
PURE += server/cutting.py server/speeds.py server/deadlines.py server/lateness.py server/buffering.py
PURE += server/pages/words.py server/pages/workers.py server/pages/history.py server/pages/timeline.py server/pages/form.py
PURE += server/privacy.py common/privacy.py common/derivation.py
PURE += server/drift.py common/drift.py
PURE += worker/plan.py worker/cage.py worker/simulation/claims.py common/sharding.py common/ranges.py common/streams.py
PURE += common/shamir.py common/fixed.py common/secure.py common/signing.py server/securing.py
PURE += common/codecs.py common/forecast.py common/pace.py common/link.py common/fitness.py server/paths.py worker/manners.py worker/task_precision.py
PURE += common/begins.py common/then.py common/audit.py server/tally.py server/keeping.py
PURE += common/pins.py common/networks.py
PURE += server/nova.py server/amplification.py common/cautions.py common/advice.py
PURE += server/hosts.py server/buckets.py server/dues.py
PURE += server/calendar.py server/attempts.py server/blame.py server/login.py
PURE += server/evaluation.py worker/task_schedule.py client/partition/statistics.py
PURE += client/service/units.py client/service/given.py client/doctor/judging.py client/doctor/findings.py client/tracking/points.py
PURE += client/packing.py

empty :=
comma := ,
space := $(empty) $(empty)

.PHONY: help demo test check coverage fuzz sbom chaos test-mixed-torch test-flower test-previous docs site bench clean distclean

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 26

$(READY): pyproject.toml requirements_server.txt requirements_$(TORCH)_gpu.txt deploy/environment.sh
	@sh deploy/environment.sh "$(VENV)" "$(TORCH)"

requirements_%_gpu.txt: # there is none for an unknown TORCH: deploy/environment.sh says so
	@:

demo: $(READY) ## train on this machine: a coordinator, three workers, real data, under a minute
	@$(BIN)/lydian demo

# Five at once, whatever the machine has: most of them wait for processes, disks and networks, and one that trains takes
# most of a gigabyte. Whoever is done takes the next from the other.
TESTS_AT_ONCE ?= 5
test: $(READY) ## every test but the ones that build a second environment
	@$(BIN)/python -m pytest -n $(TESTS_AT_ONCE) --dist worksteal -m "not mixed_torch"

check: $(READY) ## style, types, the arrows between the packages, and what bandit has to say
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m tests.scan

coverage: $(READY) ## what the tests reach; the pure modules must be complete
	@$(BIN)/coverage run -m pytest -m "not mixed_torch"
	@$(BIN)/coverage report
	@$(BIN)/coverage report --include="$(subst $(space),$(comma),$(PURE))" --fail-under=100

SECONDS ?= 60
fuzz: $(READY) ## try every parser for SECONDS, led by coverage; needs Python 3.11 and pip install -e '.[fuzz]'
	@$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

sbom: $(READY) ## what is installed here, as CycloneDX: build/sbom.json
	@$(BIN)/python deploy/sbom.py build/sbom.json

chaos: $(READY) ## break everything, with the full numbers of docs/reliability.md; takes an hour or two, most of it as root
	@LYDIAN_FAULTS=full $(BIN)/python -m pytest -n 3 --dist worksteal -vv -rP -o timeout=7200 -m grows
	@$(BIN)/lydian chaos --faults 200

test-mixed-torch: $(READY) ## new and legacy torch in one job; builds a second environment, several GB
	@$(BIN)/python -m pytest -m mixed_torch

FLOWER := build/flower
test-flower: $(READY) ## Flower apps with Flower itself, in a second environment over the first one
	@test -x $(FLOWER)/bin/python || $(BIN)/python -m venv $(FLOWER)
	@$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" > \
		"$$($(FLOWER)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth"
	@$(FLOWER)/bin/pip install -q 'flwr>=1.42'
	@$(FLOWER)/bin/python -m pytest -W ignore::DeprecationWarning tests/test_flower.py

PREVIOUS ?= 8091531
test-previous: $(READY) ## workers and a journal of the version before (PREVIOUS=commit), with this coordinator
	@rm -rf build/previous && mkdir -p build/previous
	@git archive $(PREVIOUS) | tar -x -C build/previous
	@LYDIAN_PREVIOUS=$(abspath build/previous) $(BIN)/python -m pytest tests/acceptance/test_previous.py

docs: $(READY) ## write docs/reference from the code: after a new command, key, error, metric or call
	@$(BIN)/python -m docs.generate

site: $(READY) ## write the documentation as HTML: build/site/index.html; a link that leads nowhere ends it
	@$(BIN)/python -m docs.site

bench: $(READY) ## measure everything beside what the machine could do; writes docs/performance.md, takes half an hour
	@$(BIN)/lydian bench --markdown docs/performance.md

clean: ## remove what tools left behind
	@rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage .coverage.* htmlcov build dist
	@find server worker client common lydian tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environment as well
	@rm -rf $(VENV)
