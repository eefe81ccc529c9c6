import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nanotrain.config.errors import UserError
from nanotrain.data import chat
from nanotrain.data.chat import encode, encode_rows, render
from nanotrain.data.tokenizer import load_tokenizer_json


def render_ref(messages, *, add_generation_prompt, thinking=None) -> str:
    """The format of the model card, by hand (without tools)."""
    mode = True
    for message in messages:
        if message["role"] in ("system", "user"):
            text = message["content"].replace("</think>", "")
            if "/think" in text:
                mode = True
            elif "/no_think" in text:
                mode = False
    mode = mode if thinking is None else thinking

    def shown(text):
        parts = [part.replace("/think", "").replace("/no_think", "") for part in text.split("</think>")]
        return "</think>".join(parts).strip()

    messages = list(messages)
    system = shown(messages.pop(0)["content"]) if messages and messages[0]["role"] == "system" else ""
    out = f"<SPECIAL_10>System\n{system}\n"
    i = 0
    while i < len(messages):
        message, last = messages[i], i == len(messages) - 1
        if message["role"] == "user":
            out += f"<SPECIAL_11>User\n{shown(message['content'])}\n"
        elif message["role"] == "tool":
            run = []
            while i < len(messages) and messages[i]["role"] == "tool":
                run.append(messages[i]["content"])
                i += 1
            out += f"<SPECIAL_11>User\n<TOOL_RESPONSE>[{', '.join(run)}]</TOOL_RESPONSE>\n"
            continue
        elif last:
            reasoning = message.get("reasoning_content")
            opening = f"<think>\n{reasoning}</think>\n\n" if reasoning else "<think>\n" if mode else "<think></think>"
            out += "<SPECIAL_11>Assistant\n" + opening + message["content"]
            out += "" if add_generation_prompt else "\n<SPECIAL_12>\n"
        else:
            out += "<SPECIAL_11>Assistant\n" + message["content"].split("</think>")[-1].strip() + "\n<SPECIAL_12>\n"
        i += 1
    if add_generation_prompt and not (messages and messages[-1]["role"] == "assistant"):
        out += "<SPECIAL_11>Assistant\n" + ("<think>\n" if mode else "<think></think>")
    return out


words = st.sampled_from(
    ["Hi", " /think ", "/no_think", "</think>", "{{ x }}", "ä<b>", "\n", "2 + 2", '"q"', "/no_think/think"]
)
content = st.lists(words, max_size=4).map("".join)
message = st.one_of(
    st.builds(lambda c: {"role": "user", "content": c}, content),
    st.builds(lambda c: {"role": "tool", "content": c}, st.sampled_from(['{"a": 1}', "7"])),
    st.builds(lambda c: {"role": "assistant", "content": c}, st.sampled_from(["Yes.", "x</think>\n\nYes.", "é"])),
    st.builds(
        lambda r: {"role": "assistant", "content": "4", "reasoning_content": r}, st.sampled_from(["2+2\n", "cut o"])
    ),
)
conversations = st.tuples(
    st.lists(st.builds(lambda c: {"role": "system", "content": c}, content), max_size=1), st.lists(message, max_size=5)
).map(lambda parts: parts[0] + parts[1])


@settings(max_examples=300, deadline=None)
@given(messages=conversations, prompt=st.booleans(), thinking=st.sampled_from([None, True, False]))
def test_the_template_equals_the_description(messages, prompt, thinking):
    expected = render_ref(messages, add_generation_prompt=prompt, thinking=thinking)
    assert render(messages, add_generation_prompt=prompt, thinking=thinking) == expected


@settings(max_examples=60, deadline=None)
@given(messages=conversations.filter(bool), prompt=st.booleans())
def test_transformers_renders_the_saved_template_alike(messages, prompt, tokenizer_folder):
    tokenizer = _transformers(tokenizer_folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert text == render(messages, add_generation_prompt=prompt)


_LOADED: dict = {}


def _transformers(folder):
    if folder not in _LOADED:
        _LOADED[folder] = AutoTokenizer.from_pretrained(str(folder))
    return _LOADED[folder]


def test_the_published_example():
    messages = [{"role": "user", "content": "Hi"}]
    assert render(messages, add_generation_prompt=True) == (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\nHi\n<SPECIAL_11>Assistant\n<think>\n"
    )


@pytest.mark.parametrize(
    ("flags", "opening"),
    [
        (["/no_think", "Hi"], "<think></think>"),
        (["/no_think", "Hi /think"], "<think>\n"),
        (["/think", "/no_think"], "<think></think>"),
        (["", "/no_think and /think"], "<think>\n"),
        (["", "a </think> b"], "<think>\n"),
        (["/no_think", "a </think> b"], "<think></think>"),
    ],
)
def test_the_last_flag_decides_and_flags_are_deleted(flags, opening):
    messages = [{"role": "system", "content": flags[0]}, {"role": "user", "content": flags[1]}]
    text = render(messages, add_generation_prompt=True)
    assert text.endswith(f"<SPECIAL_11>Assistant\n{opening}")
    assert "/no_think" not in text and "/think" not in text.replace("</think>", "")


def test_tools_calls_and_responses():
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}, {"name": "süb"}]
    call = {"function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1+1"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call, {"name": "süb", "arguments": '{"b": 2}'}]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": {"value": 3}},
    ]
    text = render(messages, add_generation_prompt=True, tools=tools)
    assert text.startswith("<SPECIAL_10>System\nBe brief.\n\n")
    listed = text.split("<AVAILABLE_TOOLS>")[1].split("</AVAILABLE_TOOLS>")[0]
    assert json.loads(listed) == [{"name": "add", "parameters": {}}, {"name": "süb"}] and "süb" in listed
    assert (
        "<SPECIAL_11>Assistant\nLet me see.\n\n"
        '<TOOLCALL>[{"name": "add", "arguments": {"a": 1}}, {"name": "süb", "arguments": {"b": 2}}]</TOOLCALL>'
        '\n<SPECIAL_12>\n<SPECIAL_11>User\n<TOOL_RESPONSE>[2, {"value": 3}]</TOOL_RESPONSE>\n<SPECIAL_11>Assistant\n<think>\n'
    ) in text
    no_system = render(messages[1:], add_generation_prompt=True, tools=tools)
    assert no_system.startswith("<SPECIAL_10>System\nThese tools")
    call_only = [messages[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    assert render(call_only, add_generation_prompt=False, thinking=False).endswith(
        '<think></think><TOOLCALL>[{"name": "add", "arguments": {"a": 1}}]</TOOLCALL>\n<SPECIAL_12>\n'
    )


def trained_text(messages, tokenizer) -> tuple[str, str]:
    ids, mask = encode(messages, tokenizer)
    plain = [i for i, trained in zip(ids, mask, strict=True) if not trained]
    trained = [i for i, trained in zip(ids, mask, strict=True) if trained]
    return tokenizer.decode(trained, skip_special_tokens=False), tokenizer.decode(plain, skip_special_tokens=False)


def test_exactly_what_the_assistant_writes_is_trained(tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    messages = [
        {"role": "user", "content": "What is 2 + 2? The answer is 4."},
        {"role": "assistant", "content": "<think>\nold\n</think>\n\nFour."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "reasoning_content": "2 + 2\n= 4\n", "content": "The answer is 4."},
    ]
    trained, plain = trained_text(messages, tokenizer)
    assert trained == "Four.\n<SPECIAL_12><think>\n2 + 2\n= 4\n</think>\n\nThe answer is 4.\n<SPECIAL_12>"
    assert plain == (
        "<SPECIAL_10>System\n\n<SPECIAL_11>User\nWhat is 2 + 2? The answer is 4.\n<SPECIAL_11>Assistant\n\n"
        "<SPECIAL_11>User\nSure?\n<SPECIAL_11>Assistant\n\n"
    )
    off, _ = trained_text([messages[0], {"role": "assistant", "content": "The answer is 4."}], tokenizer)
    assert off == "<think></think>The answer is 4.\n<SPECIAL_12>"


def test_training_tokens_are_those_that_inference_meets(tokenizer_folder):
    """A prompt, a forced `</think>` and what follows are encoded apart at inference; training must show the same ids."""
    tokenizer = load_tokenizer_json(tokenizer_folder)
    question = [{"role": "user", "content": "What is 2 + 2?"}]
    for trace, answer in (("2 + 2\n= 4\n", "The answer"), ("cut of", "The answer"), (None, "The answer")):
        reply = {"role": "assistant", "content": answer} | ({"reasoning_content": trace} if trace else {})
        ids, _ = encode([*question, reply], tokenizer)
        prompt = tokenizer.encode(render(question, add_generation_prompt=True, thinking=trace is not None)).ids
        assert ids[: len(prompt)] == prompt
        parts = [trace, "</think>", "\n\n" + answer + "\n"] if trace else [answer + "\n"]
        rest = [token for part in parts for token in tokenizer.encode(part).ids]
        assert ids[len(prompt) :] == [*rest, 12, *tokenizer.encode("\n").ids]


def test_rows_are_encoded_together_as_alone_and_decode_to_the_template(tokenizer_folder):
    tokenizer = load_tokenizer_json(tokenizer_folder)
    tools = [{"name": "add"}]
    rows = [
        {"messages": [{"role": "user", "content": "ä"}, {"role": "assistant", "content": "b"}]},
        {
            "messages": [{"role": "user", "content": "t"}, {"role": "assistant", "content": "c"}],
            "metadata": {"tools": tools},
        },
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "content": "y", "reasoning_content": "z"},
            ]
        },
    ]
    for row, (ids, mask) in zip(rows, encode_rows(rows, tokenizer), strict=True):
        row_tools = tools if "metadata" in row else None
        alone = encode(row["messages"], tokenizer, tools=row_tools)
        assert (ids.tolist(), mask.tolist()) == alone
        thinking = chat.is_thinking(row["messages"])
        text = render(row["messages"], add_generation_prompt=False, thinking=thinking, tools=row_tools)
        assert tokenizer.decode(ids.tolist(), skip_special_tokens=False) == text


def test_marks_in_a_text_are_refused():
    with pytest.raises(UserError, match="content holds a control character"):
        render([{"role": "user", "content": "a\x02b"}], add_generation_prompt=True)
