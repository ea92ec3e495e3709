"""A process that works under a lock: `python -m tests.acceptance.lock_holder URL LOCK TTL_S JOURNAL ROUNDS`.

It acquires the lock ROUNDS times (0: once, and keeps it), and writes its token to the journal
while it holds it. What happens to it is told on standard output, line by line.
"""

from __future__ import annotations

import asyncio
import fcntl
import sys
from pathlib import Path

import uvloop

from agentflow import Client, Held, LockLost

_WRITES = 3
_PAUSE_S = 0.01


def write(journal: Path, token: int) -> bool:
    """Write under a token, unless the journal has seen a higher one: a fenced resource."""
    with journal.open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        tokens = [int(line) for line in file]
        if tokens and token < max(tokens):
            return False
        file.write(f"{token}\n")
        return True


async def work(held: Held, journal: Path, writes: int | None) -> None:
    """Write again and again, as one who never looks whether the lock is still his."""
    count = 0
    while writes is None or count < writes:
        accepted = write(journal, held.token)
        if count == 0 or not accepted:
            say("wrote" if accepted else "refused", held.token)
        count += 1
        await asyncio.sleep(_PAUSE_S)


def say(what: str, token: int) -> None:
    """Tell what happened."""
    sys.stdout.write(f"{what} {token}\n")
    sys.stdout.flush()


async def run(url: str, lock: str, ttl_s: int, journal: Path, rounds: int) -> None:
    """Hold the lock so many times."""
    async with Client(url, name=f"holder-{journal.stem}") as client:
        for _ in range(max(rounds, 1)):
            try:
                async with client.lock(lock, ttl_s=ttl_s) as held:
                    say("held", held.token)
                    await work(held, journal, _WRITES if rounds else None)
                say("released", held.token)
            except LockLost as lost:
                accepted = write(journal, lost.token)
                say("lost-wrote" if accepted else "lost-refused", lost.token)


if __name__ == "__main__":
    given_url, given_lock, given_ttl_s, given_journal, given_rounds = sys.argv[1:]
    uvloop.run(run(given_url, given_lock, int(given_ttl_s), Path(given_journal), int(given_rounds)))
