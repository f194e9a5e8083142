"""A process of the pool in workers.py: `python -m fourfold.dataset.worker HANDLE`.

Receives the data sets and the tokeniser and says None when it has them; then receives spans of rows, and answers each
with its result or the error it met, until the connection closes.
"""

from __future__ import annotations

import signal
import sys
import traceback
from multiprocessing.connection import Connection

from fourfold.base.errors import FourfoldError
from fourfold.dataset.raw import RawRows
from fourfold.dataset.tokenise import ChunkTokeniser


def serve(connection: Connection) -> None:
    """Answer until the other side is gone."""
    mix: RawRows
    tokeniser: ChunkTokeniser
    try:
        mix, tokeniser = connection.recv()
        connection.send(None)
        while True:
            start, stop = connection.recv()
            try:
                connection.send(tokeniser.run(mix.read(start, stop)))
            except FourfoldError as error:
                connection.send(error)
            except Exception:
                connection.send(RuntimeError(f"while tokenising rows {start} to {stop}:\n{traceback.format_exc()}"))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    serve(Connection(int(sys.argv[1])))
