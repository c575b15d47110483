"""Runs `ds01` and says on stderr how long it held the ledger's lock: wall and processor seconds."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

from ds01 import cli, ledger

_transaction = ledger.LedgerStore.transaction


@contextlib.contextmanager
def _watched(store: ledger.LedgerStore) -> Iterator[ledger.Transaction]:
    with _transaction(store) as transaction:
        began, computed = time.perf_counter(), time.process_time()
        try:
            yield transaction
        finally:
            sys.stderr.write(f"held {time.perf_counter() - began} {time.process_time() - computed}\n")


ledger.LedgerStore.transaction = _watched
sys.exit(cli.main())
