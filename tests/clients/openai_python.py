"""What programs do with the Python library of OpenAI; the argument is the base URL."""

import asyncio
import base64
import json
import struct
import sys

import openai

URL = sys.argv[1]
MODEL = "model"
CHAT = [{"role": "user", "content": "Say something."}]
TOOL = {"type": "function", "function": {"name": "add", "strict": True, "parameters": {"type": "object", "properties": {
    "a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}}, "required": ["a", "b"], "additionalProperties": False}}}
client = openai.OpenAI(base_url=URL, api_key="none", max_retries=0)


def completions():
    whole = client.completions.create(model=MODEL, prompt="Hello", max_tokens=8, temperature=0, logprobs=2, echo=True)
    choice = whole.choices[0]
    assert choice.text.startswith("Hello") and choice.finish_reason in ("length", "stop"), choice
    assert choice.logprobs.token_logprobs[0] is None and len(choice.logprobs.tokens) == len(choice.logprobs.text_offset)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"include_usage": True}
    stream = client.completions.create(model=MODEL, prompt=["Hello", "Good"], max_tokens=8, stream=True, stream_options=options)
    events = list(stream)
    assert {choice.index for event in events for choice in event.choices} == {0, 1}
    assert events[-1].usage.completion_tokens > 0 and not events[-1].choices
    extra = {"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "ignore_eos": True, "return_token_ids": True}
    whole = client.completions.create(model=MODEL, prompt=[1, 2, 3], n=2, max_tokens=4, seed=1, extra_body=extra)
    assert [len(choice.model_extra["token_ids"]) for choice in whole.choices] == [4, 4], whole


def chats():
    whole = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=8, logprobs=True, top_logprobs=2,
        temperature=0, seed=1)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and len(choice.logprobs.content) == whole.usage.completion_tokens
    with client.chat.completions.stream(model=MODEL, messages=CHAT, max_completion_tokens=8, temperature=0) as stream:
        streamed = "".join(event.delta for event in stream if event.type == "content.delta")
    assert streamed == choice.message.content
    stream = client.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=200, stream=True)
    next(iter(stream))
    stream.close()


def structured():
    import pydantic

    class Answer(pydantic.BaseModel):
        fine: bool

    parsed = client.chat.completions.parse(model=MODEL, messages=CHAT, response_format=Answer, max_completion_tokens=40)
    assert isinstance(parsed.choices[0].message.parsed, Answer), parsed
    forced = {"type": "function", "function": {"name": "add"}}
    called = client.chat.completions.create(model=MODEL, messages=CHAT, tools=[TOOL], tool_choice=forced)
    call = called.choices[0].message.tool_calls[0]
    assert call.function.name == "add" and set(json.loads(call.function.arguments)) == {"a", "b"}, call
    assert called.choices[0].finish_reason == "tool_calls"
    with client.chat.completions.stream(model=MODEL, messages=CHAT, tools=[TOOL], tool_choice="required",
            parallel_tool_calls=False) as stream:
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert set(call.function.parsed_arguments) == {"a", "b"}, call
    answered = [*CHAT, {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": {
        "name": "add", "arguments": call.function.arguments}}]}, {"role": "tool", "tool_call_id": call.id, "content": "3"}]
    assert client.chat.completions.create(model=MODEL, messages=answered, tools=[TOOL], max_completion_tokens=4).choices


def responses():
    first = client.responses.create(model=MODEL, input="Hello", max_output_tokens=8, temperature=0)
    assert first.output_text and first.usage.output_tokens == 8 or first.status == "completed", first
    assert client.responses.retrieve(first.id) == first
    with client.responses.stream(model=MODEL, input="Hello", max_output_tokens=8, temperature=0) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == first.output_text == events[-1].response.output_text
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds
    assert client.responses.create(model=MODEL, input="And?", previous_response_id=first.id, max_output_tokens=4).output
    tool = {"type": "function", **TOOL["function"]}
    called = client.responses.create(model=MODEL, input="Add", tools=[tool], tool_choice="required", parallel_tool_calls=False)
    assert called.output[0].type == "function_call" and called.output[0].name == "add", called
    background = client.responses.create(model=MODEL, input="Hello", background=True, max_output_tokens=200)
    assert client.responses.cancel(background.id).status in ("cancelled", "completed", "incomplete")
    client.responses.delete(first.id)
    try:
        client.responses.retrieve(first.id)
        raise AssertionError("it is gone")
    except openai.NotFoundError:
        pass


def embeddings():
    # The library asks for Base64 by itself, and decodes it.
    vectors = client.embeddings.create(model=MODEL, input=["One", "Two"])
    assert [item.index for item in vectors.data] == [0, 1]
    length = sum(x * x for x in vectors.data[0].embedding)
    assert abs(length - 1) < 1e-3, length
    raw = client.embeddings.create(model=MODEL, input="One", encoding_format="base64").data[0].embedding
    floats = struct.unpack(f"<{len(vectors.data[0].embedding)}f", base64.b64decode(raw))
    assert max(abs(a - b) for a, b in zip(floats, vectors.data[0].embedding)) < 1e-6


def errors():
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by
    cases = [
        (openai.BadRequestError, "temperature", {"model": MODEL, "messages": CHAT, "temperature": -1}),
        (openai.NotFoundError, "model", {"model": "nothing", "messages": CHAT}),
    ]
    for kind, param, body in cases:
        try:
            client.chat.completions.create(**body)
            raise AssertionError(body)
        except kind as error:
            assert error.param == param and error.body["message"], error


async def crowd():
    async with openai.AsyncOpenAI(base_url=URL, api_key="none") as many:
        def ask(seed):
            return many.chat.completions.create(model=MODEL, messages=CHAT, max_completion_tokens=8, seed=seed)
        answers = await asyncio.gather(*[ask(seed % 4) for seed in range(16)])
    texts = [answer.choices[0].message.content for answer in answers]
    assert texts[:4] * 4 == texts, "the same seed says the same"


completions()
chats()
structured()
responses()
embeddings()
errors()
asyncio.run(crowd())
print("openai", openai.__version__, "works")
