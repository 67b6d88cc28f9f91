"""Every ending of a session has its own name, and no failure leaves the session."""

from __future__ import annotations

import asyncio
import time

import pytest

from rollout import tool_calls
from rollout.engine import Generation
from rollout.environment import Environment
from rollout.errors import EngineDied, EngineRefused, ToolError
from rollout.limits import Limits
from rollout.sampling import Sampling
from rollout.testing.scripted_engine import ScriptedEngine
from rollout.tools import tool
from tests.rollout.sessions import IM_END, Adder, call, play, say, scripted, session

ADD = call("add", '{"a": 2, "b": 3}')


async def test_max_turns_answers_the_last_calls_and_records_no_unseen_prompt(chat):
    engine = scripted(chat, *[f"{ADD}{IM_END}"] * 9)
    trajectory = await play(chat, engine, max_turns=2)
    assert trajectory.stop_reason == "max_turns"
    assert len(engine.prompts) == 2
    assert trajectory.messages[-1]["role"] == "tool", "no call is left unanswered in the history"
    assert trajectory.segments[0].response_mask[-1] == 1, "nothing follows what was last sampled"


async def test_length_is_a_turn_cut_by_its_own_limit(chat):
    trajectory = await play(chat, scripted(chat, f"{'5 ' * 50}{IM_END}"), sampling=Sampling(max_tokens=7))
    assert trajectory.stop_reason == "length"
    assert len(trajectory.segments[0].response_ids) == 7


async def test_length_is_also_the_models_context(chat):
    opening = len((await play(chat, scripted(chat, f"5{IM_END}"))).segments[0].prompt_ids)
    engine = scripted(chat, f"{'5 ' * 50}{IM_END}", max_model_len=opening + 9)
    trajectory = await play(chat, engine)
    assert trajectory.stop_reason == "length"
    assert engine.samplings[0]["max_tokens"] == 9


async def test_a_tool_result_that_does_not_fit_the_context_ends_as_length(chat):
    opening = len((await play(chat, scripted(chat, f"5{IM_END}"))).segments[0].prompt_ids)
    first = len(chat.tokenizer.encode(f"{ADD}{IM_END}"))
    engine = scripted(chat, f"{ADD}{IM_END}", f"5{IM_END}", max_model_len=opening + first + 4)
    trajectory = await play(chat, engine)
    assert trajectory.stop_reason == "length"
    assert len(trajectory.segments[0].response_ids) == first, "what the engine never saw is not recorded"


async def test_max_tokens_counts_sampled_and_observed(chat):
    first = len(chat.tokenizer.encode(f"{ADD}{IM_END}"))
    engine = scripted(chat, f"{ADD}{IM_END}", f"{'5 ' * 90}{IM_END}")
    trajectory = await play(chat, engine, max_response_tokens=first + 40)
    assert trajectory.stop_reason == "max_tokens"
    assert len(trajectory.segments[0].response_ids) == first + 40


async def test_max_tokens_before_a_turn_that_would_have_no_room(chat):
    first = len(chat.tokenizer.encode(f"{ADD}{IM_END}"))
    trajectory = await play(chat, scripted(chat, f"{ADD}{IM_END}"), max_response_tokens=first + 1)
    assert trajectory.stop_reason == "max_tokens"
    assert len(trajectory.segments[0].response_ids) == first


async def test_engine_deadline(chat):
    trajectory = await play(chat, scripted(chat, f"5{IM_END}", delay=5), engine_seconds=0.05)
    assert trajectory.stop_reason == "deadline"
    assert trajectory.error == "engine_timeout: no answer within 0.05 s"
    assert not trajectory.retryable


async def test_session_deadline_keeps_what_was_sampled(chat):
    class Slow(Adder):
        async def setup(self, task):
            pass

        async def reply(self, episode):
            await asyncio.sleep(5)

    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), Slow, session_seconds=0.1)
    assert trajectory.stop_reason == "deadline"
    assert trajectory.error == "session_timeout: the session took longer than 0.1 s"
    assert trajectory.segments[0].num_sampled == 2
    assert trajectory.reward == 1.0


async def test_tool_error_limit(chat):
    engine = scripted(chat, *[f"{call('nonsense', '{}')}{IM_END}"] * 9)
    trajectory = await play(chat, engine, max_tool_errors=2)
    assert trajectory.stop_reason == "tool_error"
    assert [c.error[:12] for c in trajectory.tool_calls] == ["unknown_tool"] * 2


async def test_cancelled_keeps_what_it_has_and_closes(chat):
    closed = []

    class Closing(Adder):
        async def close(self):
            closed.append(True)

    engine = scripted(chat, f"{ADD}{IM_END}", f"5{IM_END}")
    task = asyncio.create_task(session(chat, engine, Closing).run())
    engine.delay = 0.05
    await asyncio.sleep(0.08)
    task.cancel()
    trajectory = await task
    assert trajectory.stop_reason == "cancelled"
    assert trajectory.reward is None
    assert trajectory.segments[0].num_sampled == len(chat.tokenizer.encode(f"{ADD}{IM_END}"))
    assert closed == [True]


@pytest.mark.parametrize(
    ("failure", "error", "retryable"),
    [
        (EngineDied("gone"), "engine_died: gone", True),
        (EngineRefused("bad parameter"), "engine_refused: bad parameter", False),
        (RuntimeError("surprise"), "internal: RuntimeError: surprise", False),
    ],
)
async def test_engine_failures_are_errors_with_a_category(chat, failure, error, retryable):
    trajectory = await play(chat, ScriptedEngine(lambda *_: failure))
    assert (trajectory.stop_reason, trajectory.error, trajectory.retryable) == ("error", error, retryable)
    assert trajectory.reward is None, "not scored is never 0"


async def test_a_request_that_failed_in_the_engine_is_never_scored(chat):
    ids = chat.tokenizer.encode("5", add_special_tokens=False)
    trajectory = await play(chat, ScriptedEngine(lambda *_: (ids, "error")))
    assert (trajectory.stop_reason, trajectory.reward, trajectory.retryable) == ("error", None, False)
    assert trajectory.error == "engine: the engine ended the request with 'error'"
    assert trajectory.num_sampled == 0


async def test_a_session_in_a_process_full_of_hanging_calls_may_be_played_elsewhere(chat, monkeypatch):
    class Synchronous(Adder):
        def setup(self, task):
            """Never called."""

    monkeypatch.setattr(tool_calls, "MAX_ABANDONED_THREADS", 0)
    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), Synchronous)
    assert (trajectory.stop_reason, trajectory.retryable) == ("error", True)
    assert trajectory.error is not None and trajectory.error.startswith("environment: ")
    assert "earlier synchronous calls in this worker never returned" in trajectory.error


async def test_an_aborted_request_is_a_death(chat):
    trajectory = await play(chat, ScriptedEngine(lambda *_: ([], "abort")))
    assert (trajectory.stop_reason, trajectory.retryable) == ("error", True)


async def test_an_engine_whose_lengths_disagree_is_caught_by_the_ledger(chat):
    class Broken(ScriptedEngine):
        async def generate(self, prompt_ids, sampling, *, session_id, timeout) -> Generation:
            generation = await super().generate(prompt_ids, sampling, session_id=session_id, timeout=timeout)
            generation.logprobs.pop()
            return generation

    answer = say(chat, f"5{IM_END}")
    trajectory = await play(chat, Broken(lambda *_: answer))
    assert trajectory.stop_reason == "error"
    assert trajectory.error == "ledger: 2 sampled tokens came with 1 log-probabilities"


async def test_a_prompt_longer_than_the_context_names_both_numbers(chat):
    trajectory = await play(chat, scripted(chat, "5", max_model_len=10))
    assert trajectory.stop_reason == "error"
    assert "fills the model's context of 10" in trajectory.error


class FailsAt(Adder):
    where = ""

    def _maybe(self, where):
        if where == self.where:
            raise RuntimeError("boom")

    def __init__(self):
        self._maybe("init")

    def setup(self, task):
        self._maybe("setup")

    def reply(self, episode):
        self._maybe("reply")

    def turn_reward(self, turn, episode):
        self._maybe("turn_reward")

    def close(self):
        self._maybe("close")


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("init", "environment: could not be made: RuntimeError: boom"),
        ("setup", "environment: setup raised RuntimeError: boom"),
        ("reply", "environment: reply raised RuntimeError: boom"),
        ("turn_reward", "environment: turn_reward raised RuntimeError: boom"),
    ],
)
async def test_an_environment_that_raises_is_its_own_sessions_error(chat, where, error):
    broken = type("Broken", (FailsAt,), {"where": where})
    good = play(chat, scripted(chat, f"5{IM_END}"), task_id="good")
    bad = play(chat, scripted(chat, f"5{IM_END}"), broken, task_id="bad")
    first, second = await asyncio.gather(good, bad)
    assert (first.stop_reason, first.reward) == ("stop", 1.0)
    assert (second.stop_reason, second.error, second.reward) == ("error", error, None)


class CancelsItself(Adder):
    async def reply(self, episode):
        """What a library does that gives up on a task of its own."""
        inner = asyncio.ensure_future(asyncio.sleep(60))
        inner.cancel()
        await inner


async def test_an_environment_that_cancels_its_own_work_is_no_cancelled_session(chat):
    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), CancelsItself)
    assert trajectory.stop_reason == "error"
    assert trajectory.error.startswith("environment: reply raised CancelledError")


async def test_a_close_that_raises_does_not_undo_the_trajectory(chat):
    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), type("Broken", (FailsAt,), {"where": "close"}))
    assert (trajectory.stop_reason, trajectory.reward) == ("stop", 1.0)
    assert trajectory.error == "environment: close raised RuntimeError: boom"


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), "environment: reward returned nan, which is no reward"),
        ("high", "environment: reward returned str, not a number or None"),
    ],
)
async def test_a_reward_that_is_none_fails_loudly(chat, value, error):
    broken = type("Odd", (Adder,), {"reward": lambda self, episode: value})
    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), broken)
    assert (trajectory.stop_reason, trajectory.error, trajectory.reward) == ("error", error, None)


async def test_no_reward_is_null_not_zero(chat):
    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), Environment)
    assert (trajectory.stop_reason, trajectory.reward, trajectory.turn_rewards) == ("stop", None, None)


async def test_turn_rewards_in_order(chat):
    class Graded(Adder):
        async def turn_reward(self, turn, episode):
            return turn.index + 0.5 if turn.tool_calls else None

    trajectory = await play(chat, scripted(chat, f"{ADD}{IM_END}", f"5{IM_END}"), Graded)
    assert trajectory.turn_rewards == [0.5, None]


async def test_a_hanging_sync_reward_meets_its_deadline_and_not_the_event_loop(chat):
    class Hanging(Adder):
        def reward(self, episode):
            time.sleep(0.6)
            return 1.0

    started = time.perf_counter()
    hanging = asyncio.create_task(play(chat, scripted(chat, f"5{IM_END}"), Hanging, environment_seconds=0.1))
    other = await play(chat, scripted(chat, f"5{IM_END}"), task_id="other")
    assert time.perf_counter() - started < 0.5, "the other session did not wait for it"
    trajectory = await hanging
    assert (other.stop_reason, trajectory.stop_reason) == ("stop", "error")
    assert trajectory.error == "environment: reward took longer than 0.1 s"


async def test_a_reply_may_not_speak_for_the_policy(chat):
    class Impostor(Adder):
        def reply(self, episode):
            return [{"role": "assistant", "content": "5"}]

    trajectory = await play(chat, scripted(chat, f"5{IM_END}"), Impostor)
    assert trajectory.error.startswith("environment: reply returned an assistant message")


async def test_tools_of_one_turn_run_at_the_same_time_under_their_deadline(chat):
    @tool
    async def slow(seconds: float) -> str:
        """Wait."""
        await asyncio.sleep(seconds)
        return "done"

    @tool
    def stuck() -> str:
        """Hang."""
        time.sleep(0.8)
        return "late"

    @tool
    async def fails() -> str:
        """Fail."""
        raise ToolError("no luck")

    class Busy(Environment):
        tools = (slow, stuck, fails)

    turn = "\n".join([call("slow", '{"seconds": 0.1}')] * 3 + [call("stuck", "{}"), call("fails", "{}")])
    started = time.perf_counter()
    engine = scripted(chat, f"{turn}{IM_END}", f"5{IM_END}")
    trajectory = await play(chat, engine, Busy, tool_seconds=0.2, sampling=Sampling(max_tokens=999))
    assert time.perf_counter() - started < 0.6
    assert [m["content"] for m in trajectory.messages if m["role"] == "tool"] == [
        "done", "done", "done", "Error: stuck did not answer within 0.2 s", "Error: no luck",
    ]  # fmt: skip
    assert [c.ok for c in trajectory.tool_calls] == [True, True, True, False, False]
    assert 0.1 < trajectory.timing.tool_s < 0.5


async def test_methods_decorated_as_tools_keep_state_of_their_own_session(chat):
    class Counter(Environment):
        def __init__(self):
            self.count = 0

        @tool
        def increment(self) -> int:
            """Count up."""
            self.count += 1
            return self.count

        def reward(self, episode):
            return self.count

    def one(index):
        engine = scripted(chat, f"{call('increment', '{}')}{IM_END}", f"5{IM_END}")
        return play(chat, engine, Counter, index=index)

    trajectories = await asyncio.gather(*(one(i) for i in range(4)))
    assert [t.reward for t in trajectories] == [1.0] * 4


async def test_an_environments_limits_win(chat):
    limited = type("Limited", (Adder,), {"limits": Limits(max_turns=1)})
    trajectory = await play(chat, scripted(chat, f"{ADD}{IM_END}"), limited, max_turns=7)
    assert trajectory.stop_reason == "max_turns"


async def test_the_engine_gets_the_models_stop_tokens_and_a_seed_for_each_turn(chat):
    def engines():
        return scripted(chat, f"{ADD}{IM_END}", f"5{IM_END}")

    first, second = engines(), engines()
    sampling = Sampling(max_tokens=64, seed=7, stop_token_ids=[3])
    await play(chat, first, sampling=sampling, index=0)
    await play(chat, second, sampling=sampling, index=1)
    seeds = [s["seed"] for s in first.samplings + second.samplings]
    assert len(set(seeds)) == 4, "one seed for all would make a group one sample"
    again = engines()
    await play(chat, again, sampling=sampling, index=0)
    assert [s["seed"] for s in again.samplings] == seeds[:2]
    assert first.samplings[0]["stop_token_ids"] == [*chat.stop_token_ids, 3]


async def test_ignore_eos_gives_no_stop_tokens(chat):
    engine = scripted(chat, f"5{IM_END}")
    await play(chat, engine, sampling=Sampling(max_tokens=8, ignore_eos=True))
    assert "stop_token_ids" not in engine.samplings[0]
    assert engine.samplings[0]["ignore_eos"] is True
