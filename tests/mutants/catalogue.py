"""The defences, each with what stands there when it is off, and the cheapest tests that miss it."""

from __future__ import annotations

from typing import Final

from tests.mutants.domain import DOMAIN
from tests.mutants.leases import LEASES
from tests.mutants.locks import LOCKS
from tests.mutants.log import LOG
from tests.mutants.nodes import NODES

MUTANTS: Final = (*DOMAIN, *LOG, *LEASES, *LOCKS, *NODES)
