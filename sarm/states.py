"""Scored-token states on disk: one SQLite file a backbone, keyed by the tokens themselves.

The backbone and SAE are frozen while a head is fitted, so a sequence needs to pass the backbone
once, ever. Every batch is one transaction: after `kill -9` a run goes on where it stopped, and two
data sets that share sequences share rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from sarm.errors import InputError
from sarm.packing import iter_last_states
from sarm.wal import write_ahead


class StateCache:
    """fp32 states of one backbone: key = BLAKE2b of the token ids, value = d_model floats.

    Args:
        path: the SQLite file, made when missing.
        backbone: the cut decoder; its fingerprint is stored, another backbone is refused.
    """

    def __init__(self, path: str | Path, backbone: nn.Module) -> None:
        self.path = Path(path)
        self.backbone = backbone
        self._width = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable():
            # one thread at a time uses it, and it may be another than made it (prefetch)
            self._db = sqlite3.connect(self.path, check_same_thread=False)
        try:
            self._prepare()
        except InputError:
            self._db.close()
            raise

    def _prepare(self) -> None:
        with self._readable():
            write_ahead(self._db)
            self._db.execute("CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT)")
            self._db.execute("CREATE TABLE IF NOT EXISTS states (key BLOB PRIMARY KEY, state BLOB)")
            self._check_owner(fingerprint(self.backbone))

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """SQLite's errors as one line: not a database, damaged, locked, no room on the disk."""
        try:
            yield
        except sqlite3.OperationalError as error:  # of the disk, not of the file
            raise InputError(f"{self.path}: cannot be used now ({error})") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: not a state cache ({error})") from error

    def _check_owner(self, mine: str) -> None:
        self._db.execute("INSERT OR IGNORE INTO meta VALUES ('backbone', ?)", (mine,))
        self._db.commit()
        (owner,) = self._db.execute("SELECT value FROM meta WHERE name = 'backbone'").fetchone()
        if owner != mine:
            raise InputError(
                f"{self.path}: holds states of another backbone ({owner}, this one is {mine}); "
                "give another cache path"
            )

    def __len__(self) -> int:
        return self._db.execute("SELECT count(*) FROM states").fetchone()[0]

    def states(
        self,
        rows: Sequence[Sequence[int]],
        *,
        max_tokens: int | None = None,
        progress: Callable[[int, int], None] = lambda tokens, of: None,
    ) -> Tensor:
        """(N, d_model) fp32 states of token sequences, running the backbone only on new ones.

        `progress(tokens_done, tokens_of_new_sequences)` is called after every batch.
        """
        keys = [token_key(row) for row in rows]
        found = self._lookup(set(keys))
        row_of = dict(zip(keys, rows, strict=True))
        new = [row for key, row in row_of.items() if key not in found]
        total, done = sum(len(r) for r in new), 0
        progress(0, total)
        for indices, states in iter_last_states(self.backbone, new, max_tokens):
            batch = [(token_key(new[i]), states[j].numpy()) for j, i in enumerate(indices)]
            with self._readable(), self._db:  # one transaction a batch
                self._db.executemany(
                    "INSERT OR IGNORE INTO states VALUES (?, ?)",
                    [(key, state.tobytes()) for key, state in batch],
                )
            found.update(batch)
            done += sum(len(new[i]) for i in indices)
            progress(done, total)
        out = np.empty((len(keys), self._width), np.float32)
        for i, key in enumerate(keys):
            out[i] = found[key]
        return torch.from_numpy(out)

    def _lookup(self, keys: set[bytes]) -> dict[bytes, np.ndarray]:
        found: dict[bytes, np.ndarray] = {}
        wanted = list(keys)
        for start in range(0, len(wanted), 500):  # SQLite's bound on variables is 999 in old builds
            part = wanted[start : start + 500]
            marks = ",".join("?" * len(part))
            query = f"SELECT key, state FROM states WHERE key IN ({marks})"
            with self._readable():
                for key, state in self._db.execute(query, part):
                    if len(state) != 4 * self._width:
                        raise InputError(f"{self.path}: damaged, a state of {len(state)} bytes")
                    found[key] = np.frombuffer(state, np.float32)
        return found

    def close(self) -> None:
        """Close the file; committed states are in it."""
        self._db.close()

    def __enter__(self) -> StateCache:
        return self

    def __exit__(self, *exc) -> None:
        self.close()


def token_key(ids: Sequence[int]) -> bytes:
    """16 bytes that name a token sequence."""
    return hashlib.blake2b(array("q", ids).tobytes(), digest_size=16).digest()


def fingerprint(model: nn.Module, samples: int = 4096) -> str:
    """Names a model's weights: every tensor's name, shape, dtype and an even sample of its values.

    Two checkpoints that differ by training differ in nearly every element of a matrix, so a sample
    tells them apart without hashing gigabytes. Vectors and heads (few rows) are hashed whole: two
    steered heads may differ in one element.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().reshape(-1)
        whole = tensor.ndim < 2 or min(tensor.shape) <= 16
        step = 1 if whole else max(1, flat.numel() // samples)
        digest.update(json.dumps([name, list(tensor.shape), str(tensor.dtype)]).encode())
        digest.update(flat[::step].float().cpu().numpy().tobytes())
    return digest.hexdigest()
