// What programs do with the JavaScript library of OpenAI; the argument is the base URL.
import assert from "node:assert/strict";
import OpenAI from "openai";

const model = "model";
const messages = [{ role: "user", content: "Say something." }];
const client = new OpenAI({ baseURL: process.argv[2], apiKey: "none", maxRetries: 0 });

const whole = await client.chat.completions.create({ model, messages, max_completion_tokens: 8, temperature: 0 });
let text = "";
let usage;
const stream = await client.chat.completions.create({
  model, messages, max_completion_tokens: 8, temperature: 0, stream: true, stream_options: { include_usage: true },
});
for await (const event of stream) {
  text += event.choices[0]?.delta.content ?? "";
  usage = event.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.deepEqual(usage.completion_tokens, whole.usage.completion_tokens);

const completion = await client.completions.create({ model, prompt: "Hello", max_tokens: 4, logprobs: 1 });
assert.equal(completion.choices[0].logprobs.tokens.length, completion.usage.completion_tokens);

const tools = [{
  type: "function",
  function: { name: "pick", parameters: { type: "object", properties: { a: { enum: [1, 2] } }, required: ["a"], additionalProperties: false } },
}];
const runner = client.chat.completions.stream({ model, messages, tools, tool_choice: "required", parallel_tool_calls: false });
const called = (await runner.finalChatCompletion()).choices[0];
assert.equal(called.finish_reason, "tool_calls");
assert.ok([1, 2].includes(JSON.parse(called.message.tool_calls[0].function.arguments).a));

const response = await client.responses.create({ model, input: "Hello", max_output_tokens: 8, temperature: 0 });
const kinds = [];
for await (const event of await client.responses.create({ model, input: "Hello", max_output_tokens: 8, temperature: 0, stream: true })) {
  kinds.push(event.type);
}
assert.equal(kinds[0], "response.created");
assert.ok(response.output_text.length > 0 && /completed|incomplete/.test(kinds.at(-1)));

const vector = (await client.embeddings.create({ model, input: "Hello" })).data[0].embedding;
assert.ok(Math.abs(vector.reduce((sum, x) => sum + x * x, 0) - 1) < 1e-3);
assert.deepEqual((await client.models.list()).data.map((card) => card.id), [model]);

await assert.rejects(client.chat.completions.create({ model, messages, top_p: 2 }), OpenAI.BadRequestError);
await assert.rejects(client.chat.completions.create({ model: "nothing", messages }), OpenAI.NotFoundError);

const left = await client.chat.completions.create({ model, messages, max_completion_tokens: 200, stream: true });
for await (const _ of left) break;
console.log("openai for Node works");
