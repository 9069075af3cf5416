// Starts GraphiQL on this origin's own endpoint. The token never reaches GraphiQL or any storage: it lives in the input
// of the page and goes into the header of each request. Queries and variables stay in memory too, since variables can
// hold confirmation tokens.
"use strict";

// GraphiQL's menus and dialogs insert a style element; their library takes the policy's nonce from this name.
globalThis.__webpack_nonce__ = document.currentScript.nonce;

const token = document.getElementById("token");

// The result, or, of a subscription, the results as they come.
async function send(parameters) {
  const bearer = token.value.trim();
  if (!bearer) {
    return { errors: [{ message: "Paste a bearer token above first." }] };
  }
  const stop = new AbortController();
  const response = await fetch("/graphql", {
    method: "POST",
    headers: {
      "Content-Type": "application/json",
      Accept: "application/graphql-response+json, application/json;q=0.9, text/event-stream;q=0.8",
      Authorization: `Bearer ${bearer}`,
    },
    body: JSON.stringify(parameters),
    credentials: "omit",
    signal: stop.signal,
  });
  if (!response.headers.get("Content-Type").startsWith("text/event-stream")) {
    return response.json();
  }
  const results = resultsOf(response.body.pipeThrough(new TextDecoderStream()), stop.signal);
  return {
    [Symbol.asyncIterator]() {
      return this;
    },
    next: () => results.next(),
    return() {
      stop.abort(); // ends the read that `results` waits for, too
      return results.return();
    },
  };
}

async function* resultsOf(stream, stop) {
  const reader = stream.getReader();
  let text = "";
  try {
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      const events = (text + read.value).split("\n\n");
      text = events.pop();
      for (const event of events.filter((one) => one.startsWith("event: next\n"))) {
        yield JSON.parse(event.slice(event.indexOf("data: ") + "data: ".length));
      }
    }
  } catch (error) {
    if (!stop.aborted) {
      throw error;
    }
  }
}

const memory = new Map();
const storage = {
  get length() {
    return memory.size;
  },
  getItem: (key) => memory.get(key) ?? null,
  setItem: (key, value) => memory.set(key, value),
  removeItem: (key) => memory.delete(key),
  clear: () => memory.clear(),
};

const root = ReactDOM.createRoot(document.getElementById("graphiql"));

function render() {
  root.render(
    React.createElement(GraphiQL, {
      // Another function for another token: GraphiQL asks for the schema again when it changes.
      fetcher: (parameters) => send(parameters),
      storage,
      shouldPersistHeaders: false,
      isHeadersEditorEnabled: false,
      defaultEditorToolsVisibility: true,
      defaultQuery: "# Paste a token above. Ctrl-Space completes, Ctrl-Enter runs.\n\n{\n  __typename\n}\n",
    }),
  );
}

token.addEventListener("change", render);
document.getElementById("caller").addEventListener("submit", (event) => {
  event.preventDefault();
  render();
});
render();
