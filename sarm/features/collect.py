"""One pass over responses that fills a feature database; a killed run is taken up where it was.

Every response passes the backbone once, as in scoring; beside the scored token, the states of the
`window` tokens that end with it are encoded (64 of 400 tokens are 64 / 400 of the last layer and of
the SAE, beside all layers for all tokens), so that contexts have an activation at each token.

Memory beside the model: F x (64 bytes of sums + 392 of histogram) and F x contexts x 32 bytes for F
features, and a block's tails, rows x window x (d_model x 4 + k x 8) bytes. On disk a context takes
4 bytes a token, and the tokens of each response that has one about 8, whatever is read: the
database holds at most F x contexts x 2 contexts.

A block of records is one transaction: statistics, contexts and the place in the input change
together. Blocks are cut by record count alone and an occurrence's place in a sample is decided by
its hash, so a resumed run writes the bits that an unbroken one does.
"""

from __future__ import annotations

import itertools
import json
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sarm.data import BadRecords, Record
from sarm.errors import InputError
from sarm.features import contexts
from sarm.features.background import BackgroundResponse, keep, rank
from sarm.features.best import EMPTY, BestOccurrences, uniform
from sarm.features.contexts import Entry, Span
from sarm.features.identity import identity
from sarm.features.rows import Response, digest, read_all, responses_of
from sarm.features.statistics import Statistics
from sarm.features.store import FeatureStore
from sarm.features.style import length, markdown_marks
from sarm.features.tails import Tail, encoded_tails
from sarm.features.text import TokenTexts
from sarm.scorer import SARMScorer
from sarm.tokens import Conversation, Encoded

KINDS = ("top", "sample")
PLACES = 1 << 20  # positions of a row that an occurrence's number has room for
SPANS = 10_000  # that may wait for a sweep


@dataclass(frozen=True)
class CollectOptions:
    """contexts: of each kind a feature.  window: tokens of a context.  block: records that are made
    durable together.  seed: of the sampled contexts.
    """

    contexts: int = 20
    window: int = 64
    block: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("contexts", 1), ("window", 1), ("block", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class CollectReport:
    """Responses in the database, how many of them an earlier run had collected, alive features,
    contexts, conversations cut and records left out.
    """

    rows: int
    resumed: int
    alive: int
    contexts: int
    truncated: int
    bad: int


def collect(
    scorer: SARMScorer,
    sources: Sequence[str | Path],
    out: str | Path,
    options: CollectOptions | None = None,
    *,
    bad: BadRecords | None = None,
    overwrite: bool = False,
    progress: Callable[[int], None] = lambda responses: None,
) -> CollectReport:
    """Fill the database `out` with the features of all responses of `sources`.

    Args:
        sources: files, folders or hub names with preferences, conversations, prompts with
            responses, or texts (`sarm.features.rows`).
        progress: called with the responses done since the last call.
    Raises:
        InputError: malformed record; `out` is complete already, or a partial run of something
        else; no usable response; the disk is full; a SARM without sparse features.
    """
    options, bad = options or CollectOptions(), bad or BadRecords()
    if scorer.model.config.sarm["activation"] == "none":
        raise InputError("features: a SARM with activation 'none' has no sparse features")
    if not sources:
        raise InputError("features: no input")
    if scorer.tokenizer is None:
        raise InputError("features: the model has no tokenizer; contexts are text")
    names = [str(source) for source in sources]
    if overwrite and Path(out).exists():
        _check_usable(names, bad)  # before what is there is given up for it
        remove(out)
    fresh = not Path(out).exists()
    with FeatureStore(out, "rw") as store:
        run = _Run(store, scorer.without_prefix_cache(), names, options)
        try:
            run.everything(bad, progress)
        except BaseException:
            if fresh and not run.rows and store.alone():
                store.close()
                remove(out)
            raise
        return run.report(bad)


def _check_usable(sources: list[str], bad: BadRecords) -> None:
    """Raise what the first record raises; with `bad.skip`, unless a later one is usable."""
    trial = BadRecords(skip=bad.skip)
    for record in read_all(sources, trial):
        try:
            responses_of(record)
            return
        except InputError as error:
            trial.report(str(error))
    raise InputError(f"{', '.join(sources)}: no usable response")


def remove(path: str | Path) -> None:
    """Delete a database and what SQLite keeps beside it."""
    for suffix in ("", "-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)


class _Run:
    """The state of one collection; what `_save` writes is all that a resumed one needs."""

    def __init__(
        self, store: FeatureStore, scorer: SARMScorer, sources: list[str], options: CollectOptions
    ) -> None:
        self.store, self.scorer, self.sources, self.options = store, scorer, sources, options
        sae = scorer.model.sae
        self.n_features = sae.n_latents
        self.weight = scorer.model.score.weight[0].detach().double().cpu().numpy()
        self.statistics = Statistics(self.n_features)
        self.best = {kind: BestOccurrences(self.n_features, options.contexts) for kind in KINDS}
        self.texts = TokenTexts(scorer.tokenizer)
        self.records = self.refused = self.resumed = 0
        self.spans = self.swept = 0  # in the database; what the last sweep left
        self._claim()

    @property
    def rows(self) -> int:
        """Responses so far."""
        return int(self.statistics.total("rows"))

    # ---- what the database remembers -------------------------------------------------------

    def _claim(self) -> None:
        """Take up an unfinished run of the same thing, or begin one."""
        sarm = self.scorer.model.config.sarm
        mine = {
            **identity(self.scorer.model),
            "input": digest(self.sources),
            "options": json.dumps(asdict(self.options)),
            "max_length": str(self.scorer.max_length),
            "backbone": f"{sarm['quantization'] or self.scorer.model.dtype}",
        }
        with self.store.transaction():
            found = self.store.meta
            if found.get("complete") == "true":
                raise InputError(
                    f"{self.store.path}: exists already; choose another file or pass --overwrite"
                )
            for name, value in mine.items():
                if name in found and found[name] != value:
                    raise InputError(
                        f"{self.store.path}: an unfinished run with another {name} "
                        f"({found[name]}, now {value}); delete it or pass --overwrite"
                    )
            sae = self.scorer.model.sae
            self.store.set_meta(
                **mine,
                n_latents=sae.n_latents,
                k=sarm["k"],
                d_model=sae.d_model,
                activation=sarm["activation"],
                source_layer=sarm["source_layer"],
                sources=self.sources,
                complete="false",
            )
            self._load()

    def _arrays(self) -> dict[str, np.ndarray]:
        found = dict(self.statistics.arrays())
        for kind, best in self.best.items():
            found |= {f"{kind}.key": best.key, f"{kind}.occurrence": best.occurrence}
        return found

    def _load(self) -> None:
        rows = self.store.rows("SELECT name, value FROM progress")
        saved = dict(rows)
        if not saved:
            return
        self.records, self.refused = json.loads(saved["place"])
        for name, array in self._arrays().items():
            try:
                array[...] = np.frombuffer(saved[name], array.dtype).reshape(array.shape)
            except (KeyError, ValueError) as error:
                raise InputError(f"{self.store.path}: damaged, {name}: {error}") from error
        self.resumed = self.rows
        ((self.spans,),) = self.store.rows("SELECT count(*) FROM span")

    def _save(self, before: int) -> None:
        """Within the transaction of a block that began after `before` records."""
        found = self.store.rows("SELECT value FROM progress WHERE name = 'place'")
        if (json.loads(found[0][0])[0] if found else 0) != before:
            raise InputError(f"{self.store.path}: another process is collecting into it")
        place = json.dumps([self.records, self.refused])
        with self.store.transaction() as db:
            db.executemany(
                "INSERT OR REPLACE INTO progress VALUES (?, ?)",
                [("place", place), *((n, a.tobytes()) for n, a in self._arrays().items())],
            )

    # ---- the pass --------------------------------------------------------------------------

    def everything(self, bad: BadRecords, progress: Callable[[int], None]) -> None:
        """Every block that is left, and the end."""
        progress(self.rows)
        records = read_all(self.sources, bad)
        for _ in itertools.islice(records, self.records):
            pass  # counts what the reader skips once more; what was refused later is remembered
        bad.count += self.refused
        for block in _blocks(records, self.options.block):
            before = self.rows
            self._block(block, bad)
            progress(self.rows - before)
        if not self.rows:
            raise InputError(f"{', '.join(self.sources)}: no usable response")
        self._finish()

    def _block(self, block: list[Record], bad: BadRecords) -> None:
        at, first, refused = self.records, self.rows, bad.count
        ready: list[tuple[Response, Encoded]] = []
        for record in block:
            try:
                for response in responses_of(record):
                    turns, where = self._turns(response), response.where
                    (encoded,) = self.scorer.encode([turns], lambda _: where)  # noqa: B023
                    ready.append((response, encoded))
            except InputError as error:
                bad.report(str(error))
        self.refused += bad.count - refused
        self.records += len(block)
        tails = encoded_tails(self.scorer, [e.ids for _, e in ready], self.options.window)
        spans = [
            Span(row, r.where, len(e.ids) - 1, self.texts(e.ids[-self.options.window :]))
            for row, (r, e) in enumerate(ready, first)
        ]
        entries: list[Entry] = []
        if ready:
            self._check(ready, tails)
            entries = self._add(ready, tails)
        used = {entry.span for entry in entries}
        with self.store.transaction() as db:
            contexts.write(db, (span for span in spans if span.id in used), entries)
            self.spans += len(used)
            if self.spans > 2 * self.swept + SPANS:
                self._sweep(db)
            keep(db, self._background(spans, tails))
            self._save(at)

    def _sweep(self, db: sqlite3.Connection) -> None:
        held = np.concatenate(
            [best.occurrence[best.occurrence != EMPTY] for best in self.best.values()]
        )
        used = np.unique(held // PLACES)
        contexts.sweep(db, used)
        self.spans = self.swept = len(used)

    def _background(
        self, spans: list[Span], tails: list[Tail]
    ) -> Iterator[tuple[float, BackgroundResponse]]:
        """A block's responses with their ranks in the sample."""
        for span, tail in zip(spans, tails, strict=True):
            active = frozenset(tail.idx[-1][tail.vals[-1] != 0].tolist())
            found = BackgroundResponse(span.source, span.position, list(span.tokens), active)
            yield rank(span.id, self.options.seed), found

    def _turns(self, response: Response) -> Conversation:
        """A text alone may need an empty question before it: some chat templates want one."""
        if len(response.conversation) == 1:
            try:
                self.scorer.encode([response.conversation])
            except InputError:
                return [{"role": "user", "content": ""}, *response.conversation]
        return response.conversation

    def _check(self, ready: list[tuple[Response, Encoded]], tails: list[Tail]) -> None:
        for (response, _), tail in zip(ready, tails, strict=True):
            if not np.isfinite(tail.vals).all():
                raise InputError(f"{response.where}: a feature's activation is not finite")

    def _add(self, ready: list[tuple[Response, Encoded]], tails: list[Tail]) -> list[Entry]:
        """Count a block's responses; returns the contexts that it brings."""
        first = self.rows
        width = max(tail.idx.shape[1] for tail in tails)
        idx = np.zeros((len(tails), width), np.int64)
        vals = np.zeros((len(tails), width), np.float32)
        for i, tail in enumerate(tails):
            idx[i, : tail.idx.shape[1]] = tail.idx[-1]
            vals[i, : tail.vals.shape[1]] = tail.vals[-1]
        texts = [response.text for response, _ in ready]
        self.statistics.add(
            idx,
            vals,
            np.array([length(text) for text in texts]),
            np.array([markdown_marks(text) for text in texts]),
            np.array([response.side for response, _ in ready]),
            {
                "tokens": sum(len(encoded.ids) for _, encoded in ready),
                "truncated": sum(encoded.dropped > 0 for _, encoded in ready),
                "reward": float((self.weight[idx] * vals.astype(np.float64)).sum()),
            },
        )
        row, column = np.nonzero(vals)
        feature, activation = idx[row, column], vals[row, column].astype(np.float64)
        ends = np.array([len(encoded.ids) - 1 for _, encoded in ready])
        occurrence = (first + row) * PLACES + ends[row]
        keys = {
            "top": activation,
            "sample": uniform(occurrence, feature, self.options.seed),
        }
        entries: list[Entry] = []
        for number, kind in enumerate(KINDS):
            new, slot = self.best[kind].offer(feature, keys[kind], occurrence)
            ids = (number * self.n_features + feature[new]) * self.options.contexts + slot
            entries += self._entries(
                tails, first, kind, ids, row[new], feature[new], activation[new]
            )
        return entries

    def _entries(
        self,
        tails: list[Tail],
        first: int,
        kind: str,
        ids: np.ndarray,
        rows: np.ndarray,
        features: np.ndarray,
        activations: np.ndarray,
    ) -> Iterator[Entry]:
        """Rows of `context`, response by response: what they share is made once."""
        order = np.argsort(rows, kind="stable").tolist()
        for row, group in itertools.groupby(order, key=rows.__getitem__):
            chosen = list(group)
            lines = contexts.packed(tails[row].of(features[chosen], self.n_features))
            values = ids[chosen].tolist(), features[chosen].tolist(), activations[chosen].tolist()
            for id, feature, activation, line in zip(*values, lines, strict=True):
                yield Entry(id, feature, kind, activation, first + int(row), line)

    # ---- the end ---------------------------------------------------------------------------

    def _finish(self) -> None:
        """Statistics, samples that are not among the top, the words of contexts."""
        store, total = self.store, self.statistics.total
        with store.transaction() as db:
            db.executemany(
                f"INSERT OR REPLACE INTO feature VALUES ({','.join('?' * 13)})",
                self.statistics.table(self.weight),
            )
            db.executemany("DELETE FROM context WHERE id = ?", self._samples_among_top())
            self._sweep(db)
            store.index(db)
            if store.full_text:
                contexts.index_words(db)
            db.execute("DELETE FROM progress")
            store.set_meta(
                rows=self.rows,
                tokens=int(total("tokens")),
                truncated=int(total("truncated")),
                chosen=int(total("chosen")),
                rejected=int(total("rejected")),
                reward_mean=total("reward") / self.rows,
                complete="true",
            )

    def _samples_among_top(self) -> list[tuple[int]]:
        """Ids of sampled contexts that are top ones as well."""
        top, sample = (self.best[kind].occurrence for kind in KINDS)
        slots = self.options.contexts
        feature, slot = np.nonzero(
            (sample != EMPTY) & np.stack([(top == s[:, None]).any(1) for s in sample.T], axis=1)
        )
        return [(i,) for i in ((self.n_features + feature) * slots + slot).tolist()]

    def report(self, bad: BadRecords) -> CollectReport:
        """What there is now."""
        ((contexts,),) = self.store.rows("SELECT count(*) FROM context")
        alive = int((self.statistics.sums[0] > 0).sum())
        cut = int(self.statistics.total("truncated"))
        return CollectReport(self.rows, self.resumed, alive, contexts, cut, bad.count)


def _blocks(records: Iterator[Record], size: int) -> Iterator[list[Record]]:
    while block := list(itertools.islice(records, size)):
        yield block
