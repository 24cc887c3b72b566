"""`SARMScorer`: rewards for conversations, their exact explanation, and steering."""

from __future__ import annotations

import copy
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sarm import ops
from sarm.backbone import load_tokenizer
from sarm.checkpoint import replace_files
from sarm.data import join_turns
from sarm.errors import InputError
from sarm.explanation import Contribution, Explanation, explain_state
from sarm.modeling import SarmForSequenceClassification
from sarm.packing import Budget, PrefixCache, iter_last_states
from sarm.packing.budget import in_halves
from sarm.report import Reports, ScoreReport
from sarm.steering import Heads, Profile, SteeringProfile, as_profile
from sarm.steering.files import profile_fields
from sarm.steering.heads import combined, own_profile
from sarm.tokens import Conversation, ConversationEncoder, Encoded, usable_length

__all__ = ["Contribution", "Explanation", "SARMScorer", "ScoreReport"]

#: Conversations tokenised at once; a tokenizer keeps hundreds of bytes a token until it returns.
ENCODE_AT_ONCE = 256
#: MiB of keys and values kept across calls: 23,000 tokens of SmolLM2's lower half in fp32, 8,000
#: of Llama-3-8B's in bf16.
PREFIX_CACHE_MIB = 512.0

Rows = Sequence[Sequence[int]]


class SARMScorer:
    """Scores conversations with a SARM; drops into RLHF loops. Not an `nn.Module`; holds one.

    The scorer owns the tokenisation: chat template, one BOS, the end-of-turn token as the scored
    token, truncation from the left at `max_length`. Scores are fp32.

    Several threads may use one scorer and its steered copies: forward passes run one at a time,
    and `report` is that of the calling thread's last call.

    A pass that does not fit into memory is run in halves; the size that fits is remembered, and
    doubled again after 64 passes without a failure.

    What sequences begin with is kept across calls (`prefix_cache`, shared with steered copies)
    where it has shown that it comes back: prompts of groups, conversations that grow. Rewards with
    and without it differ as those of two batches do: not at all in int8, 1e-5 relative in fp32.

    Args:
        model: a `SarmForSequenceClassification`; `score` gives its first reward.
        tokenizer: its tokenizer, with a chat template.
        max_length: tokens of a conversation that are kept, from its end.
        max_batch_tokens: tokens a forward pass; None: by device.
        prefix_cache_mib: bound of the prefix cache's keys and values; 0: none are kept.
    """

    def __init__(
        self,
        model: SarmForSequenceClassification,
        tokenizer=None,
        *,
        max_length: int = 4096,
        max_batch_tokens: int | None = None,
        prefix_cache_mib: float = PREFIX_CACHE_MIB,
    ) -> None:
        if not prefix_cache_mib >= 0:
            raise InputError(f"prefix_cache_mib must be at least 0, got {prefix_cache_mib}")
        self.model = model.eval()
        self.max_length = usable_length(model.config, max_length)
        self.max_batch_tokens = max_batch_tokens
        self.tokenizer = tokenizer
        self._encoder = ConversationEncoder(tokenizer, self.max_length) if tokenizer else None
        self.prefix_cache = PrefixCache(int(prefix_cache_mib * 2**20))
        self._budget = Budget()
        self._reports = Reports()

    def __getstate__(self) -> dict:
        """Without the reports: they belong to this object's threads."""
        return {name: value for name, value in vars(self).items() if name != "_reports"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, _reports=Reports())

    @property
    def report(self) -> ScoreReport:
        """What the calling thread's last `score`, `score_token_ids` or call cut from its items."""
        return self._reports.last

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        quantization: str | None = None,
        max_length: int = 4096,
        max_batch_tokens: int | None = None,
        decoder: bool = True,
        revision: str | None = None,
        prefix_cache_mib: float = PREFIX_CACHE_MIB,
    ) -> SARMScorer:
        """Load a SARM (ours or the published layout) and its tokenizer.

        Args:
            path_or_id: directory or hub id.
            device: None: cuda when there is one, else cpu.
            dtype: of the backbone and SAE; None: the checkpoint's (see `load_backbone`).
            quantization: of the backbone: None, "int8" (fastest; scores are then bitwise the same
                in any batch, on a CPU) or "bnb-int8"; see `load_backbone`. A checkpoint saved in
                8 bits needs no mention.
            max_length: tokens kept of a conversation, from its end.
            prefix_cache_mib: see the class.
            decoder: False leaves the SAE's decoder out, half its memory; a scorer does without.
        Raises:
            FileNotFoundError, InputError: see `SarmForSequenceClassification.from_pretrained`.
        """
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model = SarmForSequenceClassification.from_pretrained(
            path_or_id,
            dtype=dtype,
            device=device,
            revision=revision,
            quantization=quantization,
            decoder=decoder,
        )
        folder = Path(path_or_id).expanduser()
        tokenizer = None  # a SARM saved without one scores token ids
        if not folder.is_dir() or any(folder.glob("*token*")):
            tokenizer = load_tokenizer(path_or_id, revision=revision)
        return cls(
            model,
            tokenizer,
            max_length=max_length,
            max_batch_tokens=max_batch_tokens,
            prefix_cache_mib=prefix_cache_mib,
        )

    # ---- scoring ---------------------------------------------------------------------------

    def encode(
        self,
        conversations: Sequence[Conversation],
        where: Callable[[int], str] = lambda i: f"conversation {i}",
    ) -> list[Encoded]:
        """Token ids as `score` sees them, and what was cut; see `ConversationEncoder`."""
        return [item for piece in self._encoded(conversations, where) for item in piece]

    def _encoded(
        self, conversations: Sequence[Conversation], where: Callable[[int], str]
    ) -> Iterator[list[Encoded]]:
        """`encode`, a bounded number of conversations at a time."""
        if self._encoder is None:
            raise InputError("this scorer has no tokenizer: use score_token_ids")
        for start in range(0, len(conversations), ENCODE_AT_ONCE):
            some = conversations[start : start + ENCODE_AT_ONCE]
            yield self._encoder.encode(some, partial(_shifted, where, start))

    def score(
        self,
        conversations: Sequence[Conversation],
        *,
        where: Callable[[int], str] = lambda i: f"conversation {i}",
        progress: Callable[[int, int], None] | None = None,
        profiles: Sequence[Profile | SteeringProfile] | None = None,
    ) -> Tensor:
        """(N,) fp32 rewards of chat-message lists, in order; `self.report` says what was cut.

        Args:
            where: names item i in an error message.
            progress: called with (done, total) after every batch.
            profiles: P steering profiles, each {feature: factor} or a `SteeringProfile`: the
                result is (N, P), from one pass of the backbone and SAE; column p is what
                `steer(profiles[p]).score` gives.
        Raises:
            InputError: names the first conversation that is empty, malformed or refused by the
            chat template, or whose reward is not finite, or the profile that is wrong.
        """
        heads = self._heads(profiles)
        rewards = self._score(self._rows(conversations, where), where, progress, heads)
        return rewards[:, 0] if profiles is None else rewards

    def score_token_ids(
        self,
        token_ids: Rows,
        *,
        progress: Callable[[int, int], None] | None = None,
        profiles: Sequence[Profile | SteeringProfile] | None = None,
    ) -> Tensor:
        """(N,) fp32 rewards of token sequences as they are: nothing is added or cut.

        Each row is a list of ids or a 1-D tensor, scored at its last token; `progress` and
        `profiles` as in `score`.
        """
        heads = self._heads(profiles)
        rows = []
        for i, row in enumerate(token_ids):
            if isinstance(row, Tensor) and row.ndim != 1:
                raise InputError(f"item {i}: expected a 1-D tensor, got shape {tuple(row.shape)}")
            try:
                rows.append(row.tolist() if isinstance(row, Tensor) else list(row))
            except TypeError:
                got = type(row).__name__
                raise InputError(f"item {i}: expected token ids, got {got}") from None
        self._reports.last = ScoreReport([0] * len(rows), [len(row) for row in rows])
        rewards = self._score(rows, lambda i: f"item {i}", progress, heads)
        return rewards[:, 0] if profiles is None else rewards

    def score_heads(
        self,
        conversations: Sequence[Conversation],
        *,
        where: Callable[[int], str] = lambda i: f"conversation {i}",
        progress: Callable[[int, int], None] | None = None,
    ) -> Tensor:
        """(N, num_labels) fp32: the rewards of all heads of a model that has several."""
        heads = Heads(self.model, self.model.score.weight)
        return self._score(self._rows(conversations, where), where, progress, heads)

    def _heads(self, profiles: Sequence[Profile | SteeringProfile] | None) -> Heads:
        """The first head as it is, or under each profile."""
        if profiles is None:
            return Heads(self.model, self.model.score.weight[:1])
        return Heads.of(self.model, profiles)

    def _rows(
        self, conversations: Sequence[Conversation], where: Callable[[int], str]
    ) -> list[array]:
        """Token ids of conversations in 4 bytes each (a list of integers takes 40); reports."""
        rows: list[array] = []
        dropped: list[int] = []
        for piece in self._encoded(conversations, where):
            rows += [array("i", item.ids) for item in piece]
            dropped += [item.dropped for item in piece]
        self._reports.last = ScoreReport(dropped, [len(row) for row in rows])
        return rows

    def _score(
        self,
        rows: Rows,
        where: Callable[[int], str],
        progress: Callable[[int, int], None] | None,
        heads: Heads,
    ) -> Tensor:
        """(N, P) rewards."""
        width = len(heads.weight)
        rewards = torch.empty(len(rows), width, dtype=torch.float32)
        done = 0
        for indices, states in self._states(rows):
            rewards[indices] = in_halves(partial(self._rewards, heads), states)
            done += len(indices)
            if progress is not None:
                progress(done, len(rows))
        bad = (~torch.isfinite(rewards)).nonzero()
        if len(bad):
            i, p = bad[0].tolist()
            named = "the reward" if width == 1 else f"reward {p}"
            n_bad = len(bad[:, 0].unique())
            raise InputError(
                f"{where(i)}: {named} is {rewards[i, p].item()} ({n_bad} items in all)"
            )
        return rewards

    def _states(self, rows: Rows) -> Iterator[tuple[list[int], Tensor]]:
        return iter_last_states(
            self.model.model,
            rows,
            self.max_batch_tokens,
            cache=self.prefix_cache,
            budget=self._budget,
        )

    @torch.inference_mode()
    def _rewards(self, heads: Heads, states: Tensor) -> Tensor:
        return heads(states.to(self.model.device)).float().cpu()

    def __call__(self, prompts=None, completions=None, **columns) -> list[float | None]:
        """TRL's reward-function contract: rewards of completions to prompts, None for None.

        Conversational: prompts[i] and completions[i] are message lists. Plain: strings, taken as a
        user message and the assistant's answer. Other dataset columns are ignored. `report` has an
        entry for every completion; a trainer that passes `log_extra` and `log_metric` gets the
        number of tokens cut from each, and the share of completions that were cut.
        """
        if completions is None or prompts is None:
            raise InputError("SARMScorer: needs prompts and completions")
        if len(prompts) != len(completions):
            raise InputError(
                f"SARMScorer: {len(prompts)} prompts but {len(completions)} completions"
            )
        items = [i for i, c in enumerate(completions) if c is not None]
        rewards = self.score(
            [join_turns(prompts[i], completions[i], f"item {i}") for i in items],
            where=lambda at: f"item {items[at]}",
        )
        report = self._reports.last = self.report.spread(items, len(completions))
        if callable(log_extra := columns.get("log_extra")):
            log_extra("sarm_dropped_tokens", list(report.dropped))
        if items and callable(log_metric := columns.get("log_metric")):
            log_metric("sarm/truncated", report.n_truncated / len(items))
        out: list[float | None] = [None] * len(completions)
        for i, reward in zip(items, rewards.tolist(), strict=True):
            out[i] = reward
        return out

    # ---- explaining and steering -----------------------------------------------------------

    def explain(self, conversation: Conversation, top: int = 20) -> Explanation:
        """The reward of one conversation as a sum over features; `top` of them by size."""
        if top < 0:
            raise InputError(f"explain: top must be >= 0, got {top}")
        (encoded,) = self.encode([conversation])
        ((_, states),) = self._states([encoded.ids])
        return explain_state(self.model, states.to(self.model.device), encoded, top)

    def steer(self, profile: Profile | SteeringProfile) -> SARMScorer:
        """A new scorer whose reward a profile changes; all weights but the head's are shared.

        Args:
            profile: {feature: factor}; 0 switches a feature off, 2 doubles it, -1 flips it. Or a
                `SteeringProfile`: multiply, add and ablate become head weights; clamps and a gate
                go into the model's config, which `save_pretrained` writes.
        Raises:
            InputError: a feature outside [0, n_latents) or a factor that is not finite; clamps or
            a gate where the model has them already or is linear in all latents.
        """
        found = as_profile(profile, "steer", self.model.sae.n_latents)
        rest = combined(self.model, own_profile(self.model), found, "steer")
        weight = self.model.score.weight.detach()
        scorer = copy.copy(self)
        scorer.model = SarmForSequenceClassification.from_parts(
            self.model.model,
            self.model.sae,
            weight.clone() if found.when else found.head(weight),
            self.model.config.sarm["activation"],
        )
        scorer.model.config.sarm["steering"] = profile_fields(rest) if rest else None
        return scorer

    def without_prefix_cache(self) -> SARMScorer:
        """The same scorer keeping nothing across calls: a reward's last bits in fp32 and bf16 then
        depend on its call alone, not on those before.
        """
        scorer = copy.copy(self)
        scorer.prefix_cache = PrefixCache(0)
        return scorer

    def save_pretrained(self, directory: str | os.PathLike) -> None:
        """Write model and tokenizer, both or neither; `from_pretrained` reads them back."""
        with replace_files(directory) as staging:
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(staging)
            self.model.save_pretrained(staging)

    def latents(self, conversations: Sequence[Conversation]) -> ops.SparseLatents:
        """(N, k) active latents and indices at the scored token of every conversation."""
        encoded = self.encode(conversations)
        d_model = self.model.sae.d_model
        states = torch.empty(len(encoded), d_model)
        for indices, part in self._states([e.ids for e in encoded]):
            states[indices] = part
        with torch.inference_mode():
            return self.model.sae.encode(states.to(self.model.device))


def _shifted(where: Callable[[int], str], start: int, i: int) -> str:
    return where(start + i)
