"""Whether a played rollout went as the protocol says, decided from what the rollout server was seen to do.

Invariant: a judgement is a function of the record alone: the calls and reports that a scripted trainer got, and what
it answered. Where the trainer had to refuse a call, what followed from that is not counted a second time.
"""

from __future__ import annotations

from typing import Any

from pydantic import ValidationError

from rollout.remote.conformance import Call, Deviation, Played, Report, shown
from rollout.remote.conformance_plan import RETRY_AFTER_SECONDS
from rollout.remote.history import first_difference
from rollout.remote.wire import COMPLETED_PATH, COMPLETION_PATHS, ERROR_CATEGORIES, INIT_PATH, RolloutResponse
from rollout.tasks import Message

# Clocks of two processes, and timers that fire early.
SLACK_SECONDS = 0.1
# Shorter pauses between repetitions help nobody: the protocol's are 1, 2 and 4 s.
MIN_PAUSE_SECONDS = 0.4


def judge(played: Played) -> list[Deviation]:
    """All that is wrong with a played scenario."""
    return _Judge(played).run()


class _Judge:
    def __init__(self, played: Played) -> None:
        self._played = played
        self._scenario = played.scenario
        self._found: list[Deviation] = []
        self._answered = [call for call in played.calls if call.message is not None]

    def run(self) -> list[Deviation]:
        played, most = self._played, self._scenario.calls[1]
        if self._scenario.begun > 1 and len(played.calls) > most:
            # Its second history is none of the first's, which says no more than this.
            self._off("duplicate", f"begun again with the same id, it was played again: {len(played.calls)} calls, "
                                   f"not {most}")  # fmt: skip
            return self._found
        for call in played.calls:
            self._found += call.problems
        self._keys()
        self._paths()
        if not self._accepted():
            return self._found
        # A call that the trainer had to refuse: how the rollout ends then is no news.
        refused = any(
            not problem.advice and problem.check in ("call", "history", "mask", "path") for problem in self._found
        )
        end = self._end()
        if end is None or refused:
            return self._found
        self._retries()
        self._turns()
        self._ending(end)
        if end.status == "COMPLETED":
            self._final_messages(end)
            self._metrics(end)
        return self._found

    def _off(self, check: str, text: str, advice: bool = False) -> None:
        self._found.append(Deviation(check, self._scenario.name, text, advice))

    def _keys(self) -> None:
        wanted = f"Bearer {self._played.key}"
        posts: list[Call | Report] = [*self._played.calls, *self._played.reports]
        wrong = [post for post in posts if post.authorization != wanted]
        if wrong:
            what = "no Authorization" if wrong[0].authorization is None else "another Authorization than the key's"
            self._off("bearer", f"{len(wrong)} of {len(posts)} posts to the trainer had {what}")

    def _paths(self) -> None:
        played = self._played
        found_out = played.generation == "A1" and len(played.elsewhere) == 1 and played.calls
        if played.elsewhere and not found_out:
            wanted = COMPLETION_PATHS[played.generation]
            wrong = ", ".join(sorted(set(played.elsewhere)))
            self._off("path", f"{len(played.elsewhere)} calls went to {wrong}, not to {wanted}")

    def _accepted(self) -> bool:
        """Whether the rollout was taken."""
        wanted = 202 if self._played.generation == "B" else 200
        for number, begun in enumerate(self._played.begun):
            if begun.status == wanted:
                continue
            check = "duplicate" if number else ("unknown-fields" if self._scenario.extra_fields else "answer")
            if begun.status is None:
                self._off(check, f"the request that begins the rollout got no proper answer: {shown(begun.said)}")
            else:
                self._off(check, f"it was begun with {begun.status} instead of {wanted}: {shown(begun.said)}")
            return False
        return True

    def _end(self) -> RolloutResponse | None:
        played = self._played
        if played.generation == "B":
            for begun in played.begun:
                given = begun.said.get("rollout_id") if isinstance(begun.said, dict) else None
                if given != played.rollout_id:
                    self._off("answer", f"the 202 has rollout_id {shown(given)}, not {played.rollout_id!r}")
            self._reports()
            if not played.begun:
                self._off("answer", f"POST {INIT_PATH} was not answered within {played.seconds:.0f} s")
                return None
            if not played.reports:
                self._off("report", f"no report of the end came within {played.seconds:.0f} s")
                return None
            body = played.reports[0].body
        elif played.timed_out or not played.begun:
            self._off("answer", f"POST /rollout was not answered within {played.seconds:.0f} s")
            return None
        else:
            body = played.begun[0].said
        try:
            end = RolloutResponse.model_validate(body)
        except ValidationError as failure:
            first = failure.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(str(part) for part in first["loc"]) or "the body"
            self._off("answer", f"the end is none of the protocol: {place}: {first['msg']}")
            return None
        if end.rollout_id != played.rollout_id:
            self._off("answer", f"the end has rollout_id {shown(end.rollout_id)}, not {played.rollout_id!r}")
        return end

    def _reports(self) -> None:
        reports, refusals = self._played.reports, len(self._scenario.report_statuses)
        taken = [number for number, report in enumerate(reports) if report.status == 200]
        if reports and not taken:
            self._off(
                "report",
                f"{COMPLETED_PATH} answered {self._scenario.report_statuses[0]}, and the report did not come again: "
                f"{len(reports)} of at least {refusals + 1} posts came",
            )
        elif taken and len(reports) > taken[0] + 1:
            self._off("idle", f"{len(reports) - taken[0] - 1} reports came after one was answered 200")
        if refusals and len(reports) > refusals:
            pause = reports[1].at - reports[0].at
            if pause < MIN_PAUSE_SECONDS:
                self._off("retry", f"the report came again after {pause:.2f} s, without a pause", advice=True)
        if reports and (late := [call for call in self._played.calls if call.at > reports[0].at]):
            self._off("idle", f"{len(late)} calls came after the report of the end")

    def _retries(self) -> None:
        calls, scenario = self._played.calls, self._scenario
        for number, call in enumerate(calls):
            if call.message is not None:
                continue
            what = "a broken connection" if call.status is None else f"status {call.status}"
            following = calls[number + 1] if number + 1 < len(calls) else None
            if call.status is None or call.status >= 500:
                if following is None and number + 1 < scenario.calls[0]:
                    self._off("retry", f"{what} for call {number + 1}, and it was not made again")
                elif following is not None and following.at - call.answered_at < MIN_PAUSE_SECONDS:
                    pause = following.at - call.answered_at
                    text = f"the call came again {pause:.2f} s after {what}, without a pause"
                    self._off("retry", text, advice=True)
            elif following is not None:
                pause = following.at - call.answered_at
                if call.status != 429:
                    self._off("retry", f"{what} for call {number + 1}, and it was made again")
                elif pause < RETRY_AFTER_SECONDS - SLACK_SECONDS:
                    self._off("retry", f"{pause:.2f} s after a 429 whose Retry-After was {RETRY_AFTER_SECONDS:g} s")
        tries = len(calls)
        if calls and all(call.message is None for call in calls) and tries > scenario.calls[1]:
            self._off("retry", f"{tries} calls to a trainer that never answered; at most {scenario.calls[1]}")

    def _turns(self) -> None:
        fewest, most = self._scenario.calls
        number = len(self._played.calls)
        if not self._answered and number:
            return
        elif number > most:
            self._off("turns", f"{number} calls came, at most {most} were expected: {self._scenario.about}")
        elif number < fewest and all(call.message is not None for call in self._played.calls):
            self._off("turns", f"{number} calls came, {fewest} were expected: {self._scenario.about}")
        if self._scenario.name == "max_tokens":
            spent = sum(call.sampled_tokens for call in self._played.calls)
            limit = self._scenario.max_tokens_total + max((call.sampled_tokens for call in self._answered), default=0)
            if spent > limit:
                self._off("turns", f"{spent} tokens were sampled with a max_tokens_total of "
                                   f"{self._scenario.max_tokens_total}")  # fmt: skip

    def _ending(self, end: RolloutResponse) -> None:
        scenario = self._scenario
        category = end.extra_fields.get("error_category")
        told = f" ({category}: {shown(end.error_message)})" if end.status == "ERROR" else ""
        # The one scenario that has two good ends.
        gave_up = scenario.name == "rate_limited" and len(self._played.calls) == 1
        wanted = "ERROR" if gave_up else scenario.status
        if end.status != wanted:
            check = "tool-answers" if scenario.name == "tool_error" else "finish-reason"
            self._off(check, f"status is {end.status}{told}, and {wanted} was expected: {scenario.about}")
            return
        if end.status == "COMPLETED" and end.finish_reason not in scenario.finish:
            expected = " or ".join(str(reason) for reason in scenario.finish)
            self._off("finish-reason", f"is {end.finish_reason}, and {expected} was expected: {scenario.about}")
        if end.status == "ERROR":
            if not end.error_message:
                self._off("error", "an ERROR without an error_message")
            elif "Traceback" in end.error_message or 'File "' in end.error_message:
                self._off("error", "error_message shows the server's own code", advice=True)
            if category not in ERROR_CATEGORIES:
                self._off("error", f"error_category is {shown(category)}; use one of {', '.join(ERROR_CATEGORIES)}")
            elif scenario.categories and category not in scenario.categories:
                expected = " or ".join(scenario.categories)
                text = f"error_category is {category}, and {expected} fits: {scenario.about}"
                self._off("error", text, advice=True)

    def _final_messages(self, end: RolloutResponse) -> None:
        final = end.final_messages
        if not self._answered:
            return
        last = self._answered[-1]
        sent = (last.body or {}).get("messages") or []
        for number, (one, other) in enumerate(zip(sent, final, strict=False)):
            if (difference := first_difference(one, other)) is not None:
                self._off("final-messages", f"message {number} of the last call came back changed: {difference}")
                return
        if len(final) < len(sent):
            self._off("final-messages", f"has {len(final)} messages, and the last call alone had {len(sent)}")
            return
        assert last.message is not None
        answer = final[len(sent)] if len(final) > len(sent) else None
        if answer is None or answer.get("role") != "assistant":
            self._off("final-messages", f"the model's last answer is missing after message {len(sent) - 1}")
            return
        # The calls of a turn that was cut may be left out.
        said = {**last.message, "tool_calls": answer.get("tool_calls")}
        if (difference := first_difference(said, answer)) is not None:
            self._off("final-messages", f"the model's last answer came back changed: {difference}")
        # A list: what stands there is the server's, and need not be text.
        ids = [message.get("tool_call_id") for message in final if message.get("role") == "tool"]
        asked = [identifier for message in final for identifier in _call_ids(message)]
        if open_calls := [identifier for identifier in asked if identifier not in ids]:
            names = ", ".join(map(shown, open_calls))
            self._off("final-messages", f"{len(open_calls)} tool calls have no answer: {names}")

    def _metrics(self, end: RolloutResponse) -> None:
        metrics = end.metrics
        if metrics is None:
            self._off("metrics", "there are none")
            return
        answered, made = len(self._answered), len(self._played.calls)
        if not answered <= metrics.num_llm_calls <= made + len(self._played.elsewhere):
            counted = f"{answered}" if answered == made else f"{answered} (or {made}, with those that failed)"
            self._off("metrics", f"num_llm_calls is {metrics.num_llm_calls}; there were {counted}")
        asked = [len((call.message or {}).get("tool_calls") or []) for call in self._answered]
        fewest = 0 if self._scenario.name == "tool_error" else sum(asked[:-1])
        if not fewest <= metrics.num_tool_calls <= sum(asked):
            counted = f"{fewest}" if fewest == sum(asked) else f"{fewest} to {sum(asked)}"
            self._off("metrics", f"num_tool_calls is {metrics.num_tool_calls}; there were {counted}")
        sampled = sum(call.sampled_tokens for call in self._answered)
        if metrics.response_tokens != sampled:
            self._off("metrics", f"response_tokens is {metrics.response_tokens}; {sampled} were sampled")
        prompts = [call.prompt_tokens for call in self._answered]
        if prompts and metrics.prompt_tokens not in (sum(prompts), prompts[0], prompts[-1]):
            text = f"prompt_tokens is {metrics.prompt_tokens}; the prompts had {', '.join(map(str, prompts))} tokens"
            self._off("metrics", text, advice=True)
        whole = [call.prompt_tokens + call.sampled_tokens for call in self._answered]
        if whole and not max(prompts) <= metrics.max_context_tokens <= max(whole):
            text = f"max_context_tokens is {metrics.max_context_tokens}; the largest context had {max(whole)} tokens"
            self._off("metrics", text, advice=True)
        waited = 1000 * sum(call.answered_at - call.at for call in self._answered)
        if metrics.total_latency_ms < metrics.llm_latency_ms or metrics.llm_latency_ms < 0.9 * waited:
            text = (
                f"total_latency_ms is {metrics.total_latency_ms:.0f} and llm_latency_ms is "
                f"{metrics.llm_latency_ms:.0f}; the calls alone took {waited:.0f} ms here"
            )
            self._off("metrics", text, advice=True)


def _call_ids(message: Message) -> list[Any]:
    """Of a server's own message, whose calls may be anything; what is no call has none."""
    calls = message.get("tool_calls")
    found = calls if isinstance(calls, list) else []
    return [call.get("id") for call in found if isinstance(call, dict)]
