"""One sample of a run that a remote rollout server plays, while this side samples its turns: the trainer's role.

Invariant: `run` always returns a trajectory and never raises, within the session's deadline and a little. What is
trained on comes from this side alone: tokens from the engine, messages from the calls that were answered. Of the
server's report only the ending and the reward are taken, the ending where we do not know better. A call is answered
once: repeated, it gets the same answer, and never a second sample.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rollout.engine import Engine
from rollout.environment import EnvironmentFactory, Episode
from rollout.errors import (
    ConflictError,
    EngineDied,
    EngineTimeout,
    RefusedError,
    RemoteError,
    RolloutError,
    SessionTimeout,
    describe,
)
from rollout.limits import Limits
from rollout.remote.foreign_client import MAX_SAID_CHARS, ForeignClient
from rollout.remote.foreign_order import Order, request_a, request_b
from rollout.remote.foreign_turns import ForeignTurns, TurnRefused
from rollout.remote.history import same_messages
from rollout.remote.scoring import Scorer, checked_reward
from rollout.remote.wire import ERROR_CATEGORIES, CompletionRequest, CompletionResponse, RolloutResponse
from rollout.rendering import ChatRenderer
from rollout.sampling import Sampling
from rollout.session_keys import session_key
from rollout.tasks import Task
from rollout.trajectory import SessionKey, StopReason, Timing, Trajectory

METADATA_KEY = "remote"
"""What this room writes into a trajectory's metadata is under this key, unless the task has one of that name."""

# Endings that are not scored: the system failed, not the policy.
_NOT_SCORED = ("error", "cancelled")
# A server that was told that no call is answered any more gets so long to report, as it may bring a reward.
REPORT_GRACE_S = 30.0
# Calls that wait for one answer: the first, and the client's three repetitions.
MAX_WAITING = 4
_ENDINGS: dict[str | None, StopReason] = {
    None: "stop",
    "stop": "stop",
    "custom": "stop",
    "max_turns": "max_turns",
    "max_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class Trainer:
    """This side, as all sessions of a worker have it."""

    engine: Engine
    chat: ChatRenderer
    address: str
    """The URL that rollout servers are told, without a slash at its end."""
    secret: bytes
    """Makes the keys of rollouts."""
    tokenizer: str
    """Model directory or hub name; generation A counts tokens with it."""
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class _End:
    stop_reason: StopReason
    error: BaseException | None = None
    reward: float | None = None
    """As the server reported it."""


class ForeignSession:
    """One attempt at one task, at a remote rollout server. Its calls come in through `complete` and `completed`."""

    def __init__(
        self,
        key: SessionKey,
        task: Task,
        *,
        trainer: Trainer,
        client: ForeignClient,
        sampling: Sampling,
        limits: Limits,
        environment: EnvironmentFactory | None = None,
        attempt: int = 1,
        queue_s: float = 0.0,
        on_end: Callable[[ForeignSession], None] = lambda _session: None,
    ) -> None:
        """`environment`: scores the episode; None: the server's reward counts. `on_end`: told once, when no call is
        answered any more."""
        self.key = key
        self.task = task
        # Of this attempt alone: the calls of a lost one must not reach its successor.
        self.rollout_id = uuid.uuid4().hex
        self._trainer = trainer
        self._client = client
        self._sampling = sampling
        self._limits = limits
        self._scorer = None if environment is None else Scorer(environment, limits.environment_seconds)
        self._attempt = attempt
        self._queue_s = queue_s
        self._on_end = on_end
        self._generation = client.spec.generation
        self._turns = ForeignTurns(
            key, trainer.engine, trainer.chat, sampling, limits, masked=self._generation != "B"
        )
        loop = asyncio.get_running_loop()
        self._tools: asyncio.Future[list[dict[str, Any]]] = loop.create_future()
        self._end: asyncio.Future[_End] = loop.create_future()
        self._verdict: StopReason | None = None
        """How it ends whatever the server reports: no call is answered any more."""
        self._deadline = math.inf
        self._over = False
        self._call: asyncio.Task[CompletionResponse] | None = None
        self._asked: CompletionRequest | None = None
        """What the last call asked, answered or not."""
        self._waiting = 0
        self._failure: EngineDied | None = None
        """Why the last call was not answered."""

    # The session

    async def run(self) -> Trajectory:
        """Have the session played to its end and scored."""
        started = time.perf_counter()
        end = await self._play_guarded()
        stop_reason, error, reward = end.stop_reason, end.error, None
        if stop_reason not in _NOT_SCORED:
            try:
                reward = await self._score(end)
            except asyncio.CancelledError:
                stop_reason, error = "cancelled", None
            except RolloutError as failure:
                stop_reason, error = "error", failure
        try:
            if self._scorer is not None:
                await self._scorer.close()
        except asyncio.CancelledError:
            stop_reason, error = "cancelled", None
        except RolloutError as failure:
            # The trajectory is whole and scored; that its environment did not close is worth a word, no more.
            error = error or failure
        total = time.perf_counter() - started
        engine = self._turns.engine_seconds
        return Trajectory(
            key=self.key,
            segments=self._turns.segments,
            stop_reason=stop_reason,
            messages=self._turns.messages or list(self.task.messages),
            reward=reward if stop_reason not in _NOT_SCORED else None,
            tool_calls=self._turns.tool_calls,
            # All time outside the engine is the rollout server's, which is the environment here.
            timing=Timing(queue_s=self._queue_s, engine_s=engine, env_s=max(0.0, total - engine), total_s=total),
            error=None if error is None else describe(error),
            metadata={METADATA_KEY: self._about(), **self.task.metadata},
            attempts=self._attempt,
            retryable=self._retryable(error),
        )

    async def _play_guarded(self) -> _End:
        try:
            async with asyncio.timeout(self._limits.session_seconds) as deadline:
                self._deadline = deadline.when() or math.inf
                if self._scorer is not None:
                    await self._scorer.open(self.task)
                return await self._play()
        except TimeoutError as failure:
            if not deadline.expired():
                return _End("error", failure)
            if self._verdict is not None:
                return _End(self._verdict)
            return _End(
                "deadline", SessionTimeout(f"the session took longer than {self._limits.session_seconds:g} s")
            )
        except asyncio.CancelledError:
            return _End("cancelled")
        except Exception as failure:
            return _End("error", failure)
        finally:
            self._close()

    async def _play(self) -> _End:
        begun = asyncio.create_task(self._begin())
        either: set[asyncio.Future[Any]] = {begun, self._end}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not self._end.done():
                try:
                    report = begun.result()
                except RemoteError:
                    if self._verdict is None:
                        raise
                    return _End(self._verdict)
                if report is not None:
                    return self._ended_as(report)
            return await self._end
        finally:
            begun.cancel()
            await asyncio.gather(begun, return_exceptions=True)

    async def _begin(self) -> RolloutResponse | None:
        """Hand the rollout over. Returns A's report; None: the server will call `completed`."""
        if self._generation == "B":
            answer = await self._client.init(request_b(self._order()))
            if answer.rollout_id != self.rollout_id:
                raise RemoteError("the rollout server accepted another rollout than the one that it was sent")
            self._tools.set_result(answer.tools)
            return None
        request = request_a(self._order())
        self._tools.set_result(await self._client.tools())
        report = await self._client.rollout(request)
        if report.rollout_id != self.rollout_id:
            raise RemoteError("the rollout server reported the end of another rollout")
        return report

    def _order(self) -> Order:
        trainer = self._trainer
        key = session_key(trainer.secret, self.rollout_id)
        return Order(
            self.rollout_id,
            trainer.address,
            key,
            self.task,
            self._sampling,
            self._limits,
            trainer.tokenizer,
            trainer.revision,
        )

    # What the server calls

    async def complete(self, request: CompletionRequest) -> CompletionResponse:
        """The next assistant turn.

        Raises ConflictError after the end and beside another call, RefusedError for a call that breaks the protocol
        or finds no room (the rollout has then come to its end), EngineError where the engine failed.
        """
        self._check_open()
        if self._verdict is not None:
            raise ConflictError(f"the rollout has come to its end ({self._verdict}); report it")
        call = self._call
        repeated = call is not None and self._asked is not None and _same_call(self._asked, request)
        if call is not None and not call.done():
            if not repeated or self._waiting >= MAX_WAITING:
                raise ConflictError("another call of this rollout is being answered; make one after the other")
        elif call is None or not repeated or call.cancelled() or call.exception() is not None:
            self._asked = request
            call = self._call = asyncio.create_task(self._answer(request))
            # Its failure is told to whoever waits; where nobody does any more, it is no news.
            call.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._waiting += 1
        try:
            await asyncio.wait({call})
        finally:
            self._waiting -= 1
        if call.cancelled():
            self._check_open()
            raise ConflictError("the call was given up")
        return call.result()

    async def completed(self, report: RolloutResponse) -> None:
        """The server says that the rollout has ended. The first report counts; repeats change nothing.

        Raises RefusedError for a generation that reports in another way.
        """
        if self._generation != "B":
            raise RefusedError(f"generation {self._generation} reports with its answer to POST /rollout")
        if not self._over:
            self._finish(self._ended_as(report))

    async def _answer(self, request: CompletionRequest) -> CompletionResponse:
        try:
            # B's first call may come before its 202.
            tools = await asyncio.shield(self._tools)
            answer = await self._turns.answer(request, tools, deadline=self._deadline)
        except TurnRefused as refusal:
            if refusal.ending == "error":
                self._finish(_End("error", RemoteError(refusal.message)))
            else:
                self._expect_report(refusal.ending)
            raise RefusedError(refusal.message, refusal.field) from None
        except EngineDied as failure:
            # Nothing was recorded: the server may ask again.
            self._failure = failure
            raise
        except EngineTimeout as failure:
            self._finish(_End("deadline", failure))
            raise
        except Exception as failure:
            self._finish(_End("error", failure))
            if isinstance(failure, RolloutError):
                raise RefusedError(describe(failure)) from None
            raise
        self._failure = None
        return answer

    def _check_open(self) -> None:
        if self._over or self._end.done():
            raise ConflictError("the rollout has ended")

    # The end

    def _expect_report(self, ending: StopReason) -> None:
        if self._verdict is None:
            self._verdict = ending
            asyncio.get_running_loop().call_later(REPORT_GRACE_S, self._finish, _End(ending))

    def _finish(self, end: _End) -> None:
        if not self._end.done():
            self._end.set_result(end)

    def _ended_as(self, report: RolloutResponse) -> _End:
        # Generation A knows no reward.
        reward = report.reward if self._generation == "B" else None
        if self._verdict is not None:
            return _End(self._verdict, None, reward)
        if report.status == "ERROR" or report.finish_reason == "error":
            if self._failure is not None:
                # It ended for what we did to it.
                return _End("error", self._failure)
            category = report.extra_fields.get("error_category")
            named = category if category in ERROR_CATEGORIES else "an error"
            said = (report.error_message or "without a message")[:MAX_SAID_CHARS]
            return _End("error", RemoteError(f"the rollout server reported {named}: {said}"))
        if not self._turns.turns:
            return _End("error", RemoteError("the rollout server ended the rollout without asking for a single turn"))
        ending = _ENDINGS[report.finish_reason]
        if ending == "stop" and self._turns.cut is not None:
            # Half a turn is none, whatever its reader made of it.
            ending = self._turns.cut
        return _End(ending, None, reward)

    def _close(self) -> None:
        self._over = True
        if self._call is not None:
            self._call.cancel()
        self._tools.cancel()
        self._on_end(self)

    async def _score(self, end: _End) -> float | None:
        reward = None
        if self._scorer is not None:
            turns = self._turns
            reward = await self._scorer.reward(Episode(self.task, turns.messages, turns.turns, end.stop_reason))
        return reward if reward is not None else checked_reward("the rollout server reported", end.reward)

    def _about(self) -> dict[str, Any]:
        about: dict[str, Any] = {"rollout_id": self.rollout_id, "generation": self._generation}
        if self._turns.overruled:
            about["sampling_overruled"] = dict(self._turns.overruled)
        return about

    def _retryable(self, error: BaseException | None) -> bool:
        if not isinstance(error, RolloutError) or not error.retryable:
            return False
        # What a server has begun is its own; only where nothing was sampled is a fresh attempt the same one.
        return not isinstance(error, RemoteError) or self._turns.num_sampled == 0


def _same_call(one: CompletionRequest, other: CompletionRequest) -> bool:
    """Whether a call repeats another: it says the same and has the same mask."""
    return one.response_mask == other.response_mask and same_messages(one.messages, other.messages)
