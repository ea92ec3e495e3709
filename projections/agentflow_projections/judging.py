"""The second process of `pipeline`: says of messages whether they are canonical.

It reads from its standard input chunks of `[subject, data]` pairs, in MessagePack with the
length before them, and answers each with a byte for each message: 1 if it is canonical.
"""

from __future__ import annotations

import gc
import signal
import sys
from typing import BinaryIO

import msgspec

from agentflow.frames import is_canonical
from agentflow_projections.pipeline import LENGTH, UP


def answer(asked: BinaryIO, answers: BinaryIO) -> None:
    """Answer chunk after chunk until there are no more."""
    answers.write(UP)
    answers.flush()
    decoder = msgspec.msgpack.Decoder(list[tuple[str, bytes]])
    while len(head := asked.read(LENGTH.size)) == LENGTH.size:
        messages = decoder.decode(asked.read(*LENGTH.unpack(head)))
        found = bytes(is_canonical(subject, data) for subject, data in messages)
        answers.write(LENGTH.pack(len(found)) + found)
        answers.flush()


def main() -> None:
    """Serve who started this process, until it closes the pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us
    gc.disable()  # what is decoded holds no cycles
    answer(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    main()
