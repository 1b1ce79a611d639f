# Speed and memory against their targets; see docs/performance.md.

PYTHON ?= python
FOLDER ?= build/bench
OPTIONS ?=

.PHONY: bench bench-full bench-table

# Small sizes: a look at every row in some minutes.
bench:
	$(PYTHON) benchmarks/table.py --short --folder $(FOLDER)/short $(OPTIONS)

# The sizes that the targets speak of: for a quiet machine; puts the table into the document.
bench-full:
	$(PYTHON) benchmarks/table.py --full --folder $(FOLDER)/full --write docs/performance.md $(OPTIONS)

# The table again from the numbers of the last full run.
bench-table:
	$(PYTHON) benchmarks/table.py --collect --folder $(FOLDER)/full --write docs/performance.md
