"""The traps that lost other projects their tokens, each driven through the real session loop.

The engine is scripted; the renderer and tokenizer are the demo model's real ones. In each trap the test first
shows that the trap is one (what a re-render would do), then that the session does not fall into it.
"""

from __future__ import annotations

from rollout.rendering import load_renderer
from rollout.sampling import Sampling
from tests.conftest import MODEL
from tests.rollout.sessions import IM_END, Adder, call, play, say, scripted, split

ADD = call("add", '{"a": 2, "b": 3}')


def ids(chat, text: str) -> list[int]:
    return chat.tokenizer.encode(text, add_special_tokens=False)


async def test_a_whole_conversation_token_by_token(chat):
    first, second = f"<think>\nadd\n</think>\n\n{ADD}{IM_END}", f"It is 5.{IM_END}"
    engine = scripted(chat, first, second)
    trajectory = await play(chat, engine)

    (segment,) = trajectory.segments
    between = "\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert segment.prompt_ids.tolist() == chat.render(
        [{"role": "system", "content": "Add."}, {"role": "user", "content": "2+3?"}], [t.spec for t in Adder.tools]
    )
    assert segment.response_ids.tolist() == ids(chat, first) + ids(chat, between) + ids(chat, second)
    assert segment.response_mask.tolist() == (
        [1] * len(ids(chat, first)) + [0] * len(ids(chat, between)) + [1] * len(ids(chat, second))
    )
    # The engine's log-probabilities, in their places: the double gives -(k+1)/1000 to the k-th token of a turn.
    sampled = [round(-1000 * p) for p, m in zip(segment.logprobs, segment.response_mask, strict=True) if m]
    assert sampled == [*range(1, len(ids(chat, first)) + 1), *range(1, len(ids(chat, second)) + 1)]
    assert (trajectory.stop_reason, trajectory.reward, trajectory.error) == ("stop", 1.0, None)
    assert [m["role"] for m in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert trajectory.messages[2]["reasoning_content"] == "add"
    assert trajectory.messages[-1]["content"] == "It is 5."
    assert [(c.name, c.ok) for c in trajectory.tool_calls] == [("add", True)]


async def test_every_prompt_is_the_last_context_plus_more(chat):
    engine = scripted(chat, f"{ADD}{IM_END}", f"{ADD}{IM_END}", f"5{IM_END}")
    trajectory = await play(chat, engine)
    prompts = [prompt.tolist() for _, prompt in engine.prompts]
    segment = trajectory.segments[0]
    everything = segment.prompt_ids.tolist() + segment.response_ids.tolist()
    assert len(prompts) == 3
    assert all(everything[: len(prompt)] == prompt for prompt in prompts)
    assert everything == prompts[-1] + ids(chat, f"5{IM_END}"), "exactly what it saw plus what it last sampled"


async def test_the_newline_after_the_end_of_turn_is_the_templates(chat):
    """Seen in the wild: the dropped newline after <|im_end|>, which no engine ever returns."""
    trajectory = await play(chat, scripted(chat, f"{ADD}{IM_END}", f"5{IM_END}"))
    segment = trajectory.segments[0]
    newline = len(ids(chat, f"{ADD}{IM_END}"))
    assert segment.response_ids[newline - 1] == ids(chat, IM_END)[0]
    assert segment.response_mask[newline - 1] == 1, "the end of turn was sampled"
    assert chat.decode([segment.response_ids[newline]]) == "\n"
    assert segment.response_mask[newline] == 0, "its newline was not"


async def test_json_that_a_template_would_rewrite_stays_as_sampled(chat):
    """Seen in the wild: `false` comes back as `False`, and spaces move, when arguments pass through Python."""
    odd = '<tool_call>\n{"name":"negate" ,"arguments":{"flag":false}}\n</tool_call>'
    engine = scripted(chat, f"{odd}{IM_END}", f"5{IM_END}")
    trajectory = await play(chat, engine)
    rewritten = chat.render(trajectory.messages[:4], [t.spec for t in Adder.tools])
    seen = engine.prompts[1][1].tolist()
    assert rewritten[: len(seen)] != seen, "a re-render would have changed the history"
    assert split(trajectory)[0] == ids(chat, f"{odd}{IM_END}") + ids(chat, f"5{IM_END}")
    assert "false" in chat.decode(seen) and "False" not in chat.decode(seen)
    assert trajectory.tool_calls[0].ok
    assert len(trajectory.segments) == 1


async def test_tokens_that_no_encoder_would_choose_stay_as_sampled(chat):
    """Seen in the wild: BPE merges over what was sampled piece by piece, also across the boundary of a turn."""
    pieces = [token for letter in "The answer is " for token in ids(chat, letter)]
    assert len(pieces) > len(ids(chat, "The answer is ")), "an encoder would merge these"
    answer = ([*pieces, *ids(chat, f"{ADD}{IM_END}")], "stop")
    trajectory = await play(chat, scripted(chat, answer, f"5{IM_END}"))
    assert split(trajectory)[0][: len(pieces)] == pieces
    assert len(trajectory.segments) == 1
    assert trajectory.messages[2]["content"] == "The answer is"


async def test_several_tool_results_are_one_block(chat):
    """Seen in the wild: consecutive tool messages render as one user turn, so they cannot be added one by one."""
    other = call("add", '{"a": 1, "b": 1}')
    both = f"{ADD}\n{other}{IM_END}"
    trajectory = await play(chat, scripted(chat, both, f"5 and 2{IM_END}"))
    between = chat.decode(split(trajectory)[1])
    assert between == (
        "\n<|im_start|>user\n<tool_response>\n5\n</tool_response>\n<tool_response>\n2\n</tool_response>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )
    assert [m["content"] for m in trajectory.messages if m["role"] == "tool"] == ["5", "2"]


async def test_thinking_that_the_template_strips_becomes_a_fork_not_a_lie(chat):
    """Qwen3 drops the thinking of earlier turns when a user speaks again: the old tokens cannot be extended."""
    thinking = f"<think>\nhm\n</think>\n\nFive?{IM_END}"
    trajectory = await play(chat, scripted(chat, thinking, f"Yes, 5.{IM_END}"), Talkative)
    first, second = trajectory.segments
    assert second.fork_reason == "qwen3 does not extend this history"
    assert first.response_ids.tolist() == ids(chat, thinking)
    assert "hm" not in chat.decode(second.prompt_ids), "the template stripped it, and the prompt shows what was seen"
    assert second.response_ids.tolist() == ids(chat, f"Yes, 5.{IM_END}")
    assert sum(s.num_sampled for s in trajectory.segments) == len(ids(chat, thinking)) + len(
        ids(chat, f"Yes, 5.{IM_END}")
    ), "each sampled token is there once"


async def test_thinking_is_kept_without_a_fork_where_the_config_says_so():
    chat = load_renderer(str(MODEL), "qwen3", {"thinking_retention": "all"})
    thinking = f"<think>\nhm\n</think>\n\nFive?{IM_END}"
    trajectory = await play(chat, scripted(chat, thinking, f"Yes, 5.{IM_END}"), Talkative)
    (segment,) = trajectory.segments
    assert chat.decode(segment.response_ids) == (
        f"{thinking}\n<|im_start|>user\nSure?<|im_end|>\n<|im_start|>assistant\nYes, 5.{IM_END}"
    )


async def test_a_model_without_a_renderer_of_its_own_forks_only_where_its_template_rewrites(chat):
    plain = load_renderer(str(MODEL), "default", {"tool_parser": "qwen3", "reasoning_parser": "think"})
    # Canonical text, which the template reproduces: no fork.
    trajectory = await play(plain, scripted(plain, f"{ADD}{IM_END}", f"5{IM_END}"))
    assert trajectory.tool_calls[0].ok
    assert [s.fork_reason for s in trajectory.segments] == [None]
    # The same call in an unusual spelling, which the template would rewrite: a fork, and it says so.
    odd = f'<tool_call>\n{{"name":"add","arguments":{{"a":2,"b":3}}}}\n</tool_call>{IM_END}'
    trajectory = await play(plain, scripted(plain, odd, f"5{IM_END}"))
    assert [s.fork_reason for s in trajectory.segments] == [None, "default does not extend this history"]
    assert trajectory.segments[0].response_ids.tolist() == ids(plain, odd)
    assert (trajectory.stop_reason, trajectory.reward) == ("stop", 1.0)


async def test_a_turn_cut_inside_a_tool_call_runs_nothing(chat):
    cut = ADD[: ADD.index("3")]
    trajectory = await play(chat, scripted(chat, say(chat, cut, "length")), sampling=Sampling(max_tokens=500))
    assert trajectory.stop_reason == "length"
    assert trajectory.tool_calls == []
    assert trajectory.segments[0].response_ids.tolist() == ids(chat, cut)
    assert trajectory.segments[0].response_mask.tolist() == [1] * len(ids(chat, cut))
    assert trajectory.reward == 0.0, "it is scored: the policy wrote it"


async def test_an_end_of_turn_that_was_not_sampled_is_not_trained_on(chat):
    """A stop string ends a turn without <|im_end|>: the template's own is put there, with mask 0."""
    trajectory = await play(chat, scripted(chat, ADD, f"5{IM_END}"))
    segment = trajectory.segments[0]
    end = len(ids(chat, ADD))
    assert segment.response_mask[:end].tolist() == [1] * end
    assert segment.response_ids[end] == ids(chat, IM_END)[0]
    assert segment.response_mask[end] == 0
    assert len(trajectory.segments) == 1


async def test_tokens_after_an_end_of_turn_cannot_be_trimmed_away(chat):
    """With ignore_eos an engine runs past <|im_end|>; extending would drop what was sampled, so it forks."""
    run_on = f"{ADD}{IM_END}more"
    trajectory = await play(chat, scripted(chat, run_on, f"5{IM_END}"))
    first, second = trajectory.segments
    assert first.response_ids.tolist() == ids(chat, run_on)
    assert second.fork_reason == "qwen3 would change sampled tokens"


async def test_malformed_calls_are_answered_and_visible(chat):
    broken = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": }}\n</tool_call>'
    trajectory = await play(chat, scripted(chat, f"{broken}{IM_END}", f"{ADD}{IM_END}", f"5{IM_END}"))
    assert [(c.ok, c.error) for c in trajectory.tool_calls] == [
        (False, "malformed: the tool call is not valid JSON"),
        (True, None),
    ]
    tool_message = trajectory.messages[3]
    assert tool_message["content"] == "Error: the tool call is not valid JSON"
    assert '"b": }' in trajectory.messages[2]["content"], "a person sees what the model wrote"
    assert (trajectory.stop_reason, trajectory.reward) == ("stop", 1.0)


async def test_an_unclosed_call_that_the_model_ended_itself_is_answered(chat):
    unclosed = ADD.removesuffix("\n</tool_call>")
    trajectory = await play(chat, scripted(chat, f"{unclosed}{IM_END}", f"5{IM_END}"))
    assert trajectory.tool_calls[0].error == "malformed: the tool call was not closed"
    assert trajectory.stop_reason == "stop"


class Talkative(Adder):
    """Asks once whether the model is sure."""

    tools = ()

    def reply(self, episode):
        return [{"role": "user", "content": "Sure?"}] if len(episode.turns) == 1 else None
