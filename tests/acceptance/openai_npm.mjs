// Ask a server through OpenAI's npm client; print what came back as one JSON object.
// Arguments: the address with /v1, and the key.
import OpenAI from "openai";
import { zodFunction, zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const chat = client.chat.completions;

const messages = [{ role: "user", content: "4 82 9 31" }];
const sort = { model: "sort_numbers", messages, temperature: 0 };
// The demo's model wanders in white space where JSON allows it; its tokens are bytes.
const noSpace = { 9: -100, 10: -100, 13: -100, 32: -100 };
const formed = { model: "city", messages, temperature: 0, logit_bias: noSpace };

const City = z.object({ name: z.string().max(12), side: z.enum(["north", "south"]) });
const Weather = z.object({ city: z.string().max(12), days: z.number().int().min(1).max(7) });
const weather = zodFunction({ name: "weather", parameters: Weather });
const oneCall = { tools: [weather], tool_choice: "required", parallel_tool_calls: false };

async function all(stream) {
  const chunks = [];
  for await (const chunk of await stream) chunks.push(chunk);
  return chunks;
}

/** What a call that is refused throws. */
async function refusal(call) {
  try {
    await call();
  } catch (error) {
    const { status, code, param, type, requestID } = error;
    return { class: error.constructor.name, status, code, param, type, hasId: Boolean(requestID) };
  }
  return null;
}

const checks = {
  models: async () => (await all(client.models.list())).map((model) => model.id),
  model: async () => (await client.models.retrieve("sort_numbers")).id,
  chat: () => chat.create(sort),
  stream: () => all(chat.create({ ...sort, stream: true, stream_options: { include_usage: true } })),
  stream_helper: () => chat.stream(sort).finalContent(),
  limit: () => chat.create({ ...sort, max_completion_tokens: 3 }),
  stop: () => chat.create({ ...sort, stop: ["31"] }),
  choices: () => chat.create({ ...sort, n: 3 }),
  logprobs: () => chat.create({ ...sort, logprobs: true, top_logprobs: 2 }),
  fields: () =>
    chat.create({
      ...sort,
      top_p: 0.9,
      seed: 1,
      presence_penalty: 0.1,
      frequency_penalty: 0.1,
      user: "u",
      metadata: { a: "b" },
      service_tier: "auto",
      store: false,
      reasoning_effort: "low",
      verbosity: "low",
    }),
  completions: () =>
    client.completions.create({
      model: "sort_numbers",
      prompt: ["4 82 9 31", "61 5 40 12"],
      temperature: 0,
    }),
  completions_stream: () =>
    all(
      client.completions.create({
        model: "sort_numbers",
        prompt: "4 82 9 31",
        temperature: 0,
        stream: true,
        stream_options: { include_usage: true },
      }),
    ),
  parsed: async () => {
    const answer = await chat.parse({ ...formed, response_format: zodResponseFormat(City, "city") });
    return answer.choices[0].message.parsed;
  },
  choice: () => chat.create({ ...formed, structured_outputs: { choice: ["heads", "tails"] } }),
  tool_call: () => chat.create({ ...formed, ...oneCall }),
  tool_call_parsed: async () => {
    const answer = await chat.parse({ ...formed, ...oneCall });
    return answer.choices[0].message.tool_calls[0].function.parsed_arguments;
  },
  tool_call_streamed: async () => {
    const answer = await chat.stream({ ...formed, ...oneCall }).finalChatCompletion();
    return answer.choices[0];
  },
  wrong_key: () => refusal(() => new OpenAI({ baseURL, apiKey: "wrong" }).models.list()),
  unknown_model: () => refusal(() => chat.create({ ...sort, model: "nope" })),
  unknown_model_streamed: () => refusal(() => chat.create({ ...sort, model: "nope", stream: true })),
  bad_parameter: () => refusal(() => chat.create({ ...sort, temperature: 3 })),
  context: () => refusal(() => chat.create({ ...sort, max_tokens: 600 })),
  unsupported: () => refusal(() => chat.create({ ...sort, functions: [{ name: "f" }] })),
  embeddings: () => refusal(() => client.embeddings.create({ model: "demo", input: "a" })),
};

const results = {};
for (const [name, check] of Object.entries(checks)) results[name] = await check();
console.log(JSON.stringify(results));
