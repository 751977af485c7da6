# make run    train the main job on the embedded chest phantom (ten minutes on two cores)
# make test   the tests, under twelve minutes on two cores;  make test-slow  the long ones
# make lint   ruff

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DELETE_ON_ERROR:
.PHONY: run hour test test-slow lint clean

run: $(VENV)/run.stamp
	$(BIN)/python launch.py --config=configs/dense121.py:phantom_quick

hour: $(VENV)/run.stamp
	$(BIN)/python launch.py --config=configs/dense121.py:phantom_hour

test: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/test.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV)

# A stamp is written when everything is installed, so an interrupted set-up starts again.
$(VENV)/run.stamp: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || (echo "Python >= 3.11 is needed: make PYTHON=python3.11" && false)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/test.stamp: requirements-test.txt $(VENV)/run.stamp
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@
