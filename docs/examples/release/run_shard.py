"""Run the unittest tests named in $TESTS, a JSON list; tell $AGENTFLOW_RESULT how it went.

Run in the folder of the sources. Exits 1 if a test failed, so that the task fails too.
"""

from __future__ import annotations

import json
import os
import sys
import time
import unittest
from pathlib import Path


def main() -> int:
    """Run the shard."""
    sys.path[:0] = [str(Path.cwd()), str(Path.cwd() / "src")]
    suite = unittest.defaultTestLoader.loadTestsFromNames(json.loads(os.environ["TESTS"]))
    started = time.perf_counter()
    outcome = unittest.TextTestRunner(verbosity=2).run(suite)
    counts = {
        "ran": outcome.testsRun,
        "failed": len(outcome.failures) + len(outcome.errors),
        "seconds": round(time.perf_counter() - started, 3),
    }
    Path(os.environ["AGENTFLOW_RESULT"]).write_text(json.dumps(counts))
    return 0 if outcome.wasSuccessful() else 1


if __name__ == "__main__":
    raise SystemExit(main())
