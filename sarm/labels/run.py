"""Labels by a language model: explain, then detect, feature by feature."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from sarm.features import Context, FeatureStore
from sarm.labels import prompts
from sarm.labels.contexts import Sampling, Split, Splits
from sarm.labels.detection import Detection, judged
from sarm.labels.endpoint import Endpoint, EndpointError, Refused
from sarm.labels.prompts import Messages, Nonsense
from sarm.labels.records import Claims, Records

#: Features that may fail one after the other for the endpoint's sake before a run stops.
PATIENCE = 5


@dataclass
class Report:
    """What a run did.

    failed: no readable answer, with the reason of each.  left: for another run, because the
    endpoint did not answer.  elsewhere: in the hands of another labeler.  stopped: why the run
    ended before its time.
    """

    labelled: int = 0
    failed: dict[int, str] = field(default_factory=dict)
    left: dict[int, str] = field(default_factory=dict)
    elsewhere: int = 0
    stopped: str | None = None


def pending(
    records: Records, features: Sequence[int], *, redo: bool = False, retry_failed: bool = False
) -> list[int]:
    """The features that still need a label, in their order."""
    done = set() if redo else records.done()
    if not (redo or retry_failed):
        done |= set(records.failures())
    return [f for f in dict.fromkeys(features) if f not in done]


class Labeler:
    """Labels features of a database through an endpoint.

    Args:
        store: opened with mode "rw".
        batch: contexts judged in one detection request.
        redo: also what has a label already.
    """

    def __init__(
        self,
        store: FeatureStore,
        endpoint: Endpoint,
        sampling: Sampling,
        *,
        batch: int = 10,
        redo: bool = False,
    ) -> None:
        self.store, self.endpoint, self.sampling = store, endpoint, sampling
        self.batch, self.redo = batch, redo
        self.records = Records(store, endpoint.settings.model)
        self._splits = Splits(store, sampling)
        self.report = Report()
        self._in_a_row = 0

    async def run(
        self, features: Sequence[int], progress: Callable[[float], None] = lambda features: None
    ) -> Report:
        """Label features, as many at once as the endpoint may be asked at once."""
        claims = Claims(self.store.path, self.records.method)
        todo = iter(features)
        workers = [
            asyncio.create_task(self._work(todo, claims, progress))
            for _ in range(min(self.endpoint.settings.concurrency, len(features)))
        ]
        try:
            if workers:
                # a worker returns when nothing is to be done, or when the run has to stop
                await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                await asyncio.gather(*workers)
        except _Stop as stop:
            self.report.stopped = str(stop)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            claims.close()
        self.report.labelled = self.records.labelled
        return self.report

    async def _work(
        self, todo: Iterator[int], claims: Claims, progress: Callable[[float], None]
    ) -> None:
        for feature in todo:
            with claims.claim(feature) as mine:
                if not mine or (not self.redo and self.records.has(feature)):
                    self.report.elsewhere += 1
                else:
                    await self._one(feature)
            progress(1)

    async def _one(self, feature: int) -> None:
        try:
            await self._label(feature)
            self._in_a_row = 0
        except (Nonsense, Refused) as error:
            self._in_a_row = 0
            reason = prompts.clean(str(error))
            self.report.failed[feature] = reason
            await asyncio.to_thread(self.records.fail, feature, reason)
        except EndpointError as error:
            self.report.left[feature] = str(error)
            self._in_a_row += 1
            if error.fatal:
                raise _Stop(str(error)) from None
            if self._in_a_row >= PATIENCE:
                raise _Stop(f"{error}; {PATIENCE} features in a row") from None

    async def _label(self, feature: int) -> None:
        part = await asyncio.to_thread(self._splits, feature)
        if not part.shown:
            raise Nonsense(f"no context with an activation above {self.sampling.threshold:g}")
        explanation, score = await self._asked(
            prompts.explain(part.shown), "explain", prompts.read_explanation
        )
        detection = await self._detect(feature, explanation, part)
        details = {
            "model": self.endpoint.settings.model,
            "endpoint": self.endpoint.settings.base_url,
            "parameters": dict(self.endpoint.parameters),
            "threshold": self.sampling.threshold,
            "sampling_seed": self.sampling.seed,
            "shown": [c.id for c in part.shown],
            "detection": detection.details(),
        }
        label = prompts.clipped(explanation, prompts.MAX_LABEL)
        await asyncio.to_thread(
            self.records.add, feature, label, explanation, score, detection.accuracy, details
        )

    async def _detect(self, feature: int, explanation: str, part: Split) -> Detection:
        items = part.shuffled(feature + self.sampling.seed)
        batches = [items[i : i + self.batch] for i in range(0, len(items), self.batch)]

        async def judge(batch: list[tuple[Context, bool]]) -> list[tuple[bool, bool | None]]:
            messages = prompts.detect(explanation, [context for context, _ in batch])
            said: Sequence[bool | None]
            try:
                said = await self._asked(
                    messages, "detect", lambda answer: prompts.read_detection(answer, len(batch))
                )
            except (Nonsense, Refused):
                said = [None] * len(batch)
            return [(truth, s) for (_, truth), s in zip(batch, said, strict=True)]

        answers = await asyncio.gather(*map(judge, batches), return_exceptions=True)
        for answer in answers:  # all have ended: none asks on behind our back
            if isinstance(answer, BaseException):
                raise answer
        return judged(pair for answer in answers for pair in answer)  # type: ignore[union-attr]

    async def _asked(self, messages: Messages, name: str, read: Callable):
        """An answer as `read` makes it out; one that it cannot read is asked for once more."""
        answer = await self.endpoint.ask(messages)
        try:
            return read(answer)
        except Nonsense:
            self.endpoint.usage.unreadable += 1
        answer = await self.endpoint.ask(prompts.reminded(messages, answer, name))
        try:
            return read(answer)
        except Nonsense:
            self.endpoint.usage.unreadable += 1
            raise


class _Stop(Exception):
    """The endpoint is of no use at present; says why."""
