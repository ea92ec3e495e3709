# What there is to do here. Run it as `uv run just`, which needs nothing installed but uv.

set positional-arguments

# Everything continuous integration checks
default: checks proof

# What runs nothing: layout, rules, types, imports
[parallel]
checks: fmt-check lint mypy pyright imports

# The campaign and all tests, and beside them 500 simulated clusters, since the others wait most of the time
[parallel, private]
proof: (sim "--background") campaign-and-tests

[private]
campaign-and-tests: (chaos "--ci") test

# Lay out the code
fmt:
    ruff check --quiet --select I --fix
    ruff format

# Is the code laid out?
fmt-check:
    ruff format --check

# Rules of style and safety
lint:
    ruff check

# Both type checkers, strict
[parallel]
types: mypy pyright

[private]
mypy:
    mypy core nodes projections tests

[private]
pyright:
    pyright

# Do imports point inward, and is the domain free of IO?
imports:
    lint-imports

# All tests: more at a time than there are cores, since most wait most of the time
test *arguments:
    pytest -n 3 --dist worksteal "$@"

# Tests without IO, in seconds
test-unit *arguments:
    pytest -n 2 tests/unit "$@"

# Tests of one real edge: a nats-server, a file, child processes
test-integration *arguments:
    pytest tests/integration "$@"

# Tests of the whole: processes, kills, the README
test-acceptance *arguments:
    pytest tests/acceptance "$@"

# Cut the power under a log on an ext4 image; needs root and loop devices
power-loss *arguments:
    pytest tests/acceptance/test_power_loss.py "$@"

# Faults on real processes while tasks run, then every invariant asked in SQL; the last line is one JSON object
chaos *arguments:
    python -m tests.chaos "$@"

# Whole clusters on simulated time, with faults from a seed; the last line is one JSON object
sim *arguments:
    python -m tests.sim "$@"

# Measure AgentFlow; the last line is one JSON object
bench *arguments:
    python -m tests.bench.bench "$@"

# Measure AgentFlow on three NATS servers, and what the death of one costs
bench-r3 *arguments:
    python -m tests.bench.bench_r3 "$@"

# Measure how long work stands still when a process is killed; the last line is one JSON object
bench-failover *arguments:
    python -m tests.bench.bench_failover "$@"

# Measure other task queues and AgentFlow in the same run, in an environment of their own; needs redis-server
bench-peers *arguments:
    uv run --isolated --group peers python -m tests.bench.bench_peers "$@"

# Measure distributed locks, ours and redis-py's in the same run, in an environment of their own; needs redis-server
bench-locks *arguments:
    uv run --isolated --group peers python -m tests.bench.bench_locks "$@"

# Measure the history: replay, lag, questions, archive; beside event stores, in an environment of their own
bench-history *arguments:
    uv run --isolated --group peers python -m tests.bench.bench_history "$@"

# Bring the generated parts of the documentation in step with the code
docs:
    python -m tests.docs_from_code

# The contract as JSON Schema
schema *arguments:
    agentflow schema "$@"

# Everything on this machine: NATS server, master, worker
up *arguments:
    agentflow up "$@"

# Walk through all interleavings of the protocols of lease and lock; the last line is one JSON object
model *arguments:
    python -m tests.model.check "$@"

# Switch each defence off in turn and see that a test misses it; the last line is one JSON object
mutants *arguments:
    python -m tests.mutants.check "$@"

# Change a cluster over to the next contract level while it works; the last line is one JSON object
bench-rolling *arguments:
    python -m tests.bench.rolling "$@"

# Kill a projector under load again and again, then compare every row with a projection made in one go
projector-kills kills="100":
    AGENTFLOW_PROJECTOR_KILLS={{ kills }} pytest -q tests/acceptance/test_projector.py -k again_and_again
