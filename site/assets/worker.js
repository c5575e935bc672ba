// The model in a worker: loads it once, answers questions, streams.
// Knows nothing of the page; `engine.js` is its other end.

let transformers, tokenizer, model, stopFlag, limit;
// Parts of a file on their way at once.
const AHEAD = 6;

const post = (type, rest = {}) => self.postMessage({ type, ...rest });

self.onmessage = async ({ data }) => {
  try {
    if (data.type === 'load') await load(data);
    else if (data.type === 'ask') await ask(data);
  } catch (error) {
    post('failed', { id: data.id, message: error?.message ?? String(error) });
  }
};

/** `base` is the site's own address, `device` is `wasm` or `webgpu`, `stop` shared memory or null. */
async function load({ base, site, device, dtype, threads, stop }) {
  stopFlag = stop && new Int32Array(stop);
  const vendor = new URL(site.vendor.path, base).href;
  const progress = meter(site, device, dtype);
  transformers = await import(`${vendor}transformers.min.js`);
  const { AutoTokenizer, AutoModelForCausalLM, env } = transformers;
  // This host and no other: the hashed path takes the place of a hub's address.
  env.allowLocalModels = false;
  env.allowRemoteModels = true;
  env.remoteHost = base;
  env.remotePathTemplate = 'models/{model}/';
  env.fetch = assembling(site.model, base);
  await forget(env.cacheKey, new URL('models/', base).href, site.model.path);

  const { wasm } = env.backends.onnx;
  const build = vendor + runtime(device);
  wasm.numThreads = threads;
  wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  // We fetch the binary: so it counts in the progress, and HTTP's cache keeps it.
  env.useWasmCache = false;
  wasm.wasmBinary = await download(`${build}.wasm`, (done) => progress('runtime', done));

  const { path } = site.model;
  const progress_callback = (p) => {
    if (p.status === 'progress') progress(p.file, p.loaded);
  };
  tokenizer = await AutoTokenizer.from_pretrained(path, { progress_callback });
  model = await AutoModelForCausalLM.from_pretrained(path, { dtype, device, progress_callback });
  delete wasm.wasmBinary;
  limit = (model.config.max_position_embeddings ?? 2048) - site.max_new_tokens;
  post('warming');
  await warm();
  post('ready', { threads: device === 'wasm' ? threads : 1 });
}

const runtime = (device) =>
  `ort-wasm-simd-threaded${device === 'webgpu' ? '.asyncify' : ''}`;

/** One token, so that the first question does not wait for shaders and buffers. */
async function warm() {
  const inputs = prompt([{ role: 'user', content: 'Hello' }]);
  await model.generate({ ...inputs, max_new_tokens: 1, do_sample: false });
}

/** Adds up what was loaded of how much, in bytes. */
function meter(site, device, dtype) {
  const sizes = new Map();
  const suffix = dtype === 'fp32' ? '' : `_${dtype === 'q8' ? 'quantized' : dtype}`;
  for (const { path, bytes } of site.model.files) {
    const graph = path.startsWith('onnx/');
    if (!graph || path.startsWith(`onnx/model${suffix}.onnx`)) sizes.set(path, bytes);
  }
  const binary = `${runtime(device)}.wasm`;
  sizes.set('runtime', site.vendor.files.find((f) => f.path === binary)?.bytes ?? 0);
  const loaded = new Map();
  const total = [...sizes.values()].reduce((a, b) => a + b, 0);
  return (file, bytes) => {
    if (!sizes.has(file)) return;
    loaded.set(file, Math.min(bytes, sizes.get(file)));
    post('progress', { done: [...loaded.values()].reduce((a, b) => a + b, 0), total });
  };
}

/** A `fetch` that knows the model's files, each made of parts that lie under their own digests. */
function assembling({ path, files }, base) {
  const known = new Map(files.map((file) => [new URL(`models/${path}/${file.path}`, base).href, file]));
  return async (url, options) => {
    const file = known.get(String(url));
    if (!file) return fetch(url, options);
    const headers = { 'content-length': String(file.bytes) };
    // It asks for a range only to learn the size.
    if (new Headers(options?.headers).has('range')) return new Response(null, { headers });
    const rest = file.parts.map((part) => new URL(part.path, base).href);
    const coming = [];
    const body = new ReadableStream({
      async pull(controller) {
        while (rest.length && coming.length < AHEAD) coming.push(part(rest.shift()));
        if (coming.length) controller.enqueue(await coming.shift());
        else controller.close();
      },
    });
    return new Response(body, { headers });
  };
}

function part(url) {
  const bytes = fetch(url).then((response) => {
    if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
    return response.bytes?.() ?? response.arrayBuffer().then((buffer) => new Uint8Array(buffer));
  });
  // One that fails while another is waited for is told of when its turn comes.
  bytes.catch(() => {});
  return bytes;
}

async function download(url, tell) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url}: ${response.status} ${response.statusText}`);
  const parts = [];
  let done = 0;
  const reader = response.body.getReader();
  for (;;) {
    const { done: end, value } = await reader.read();
    if (end) break;
    parts.push(value);
    tell((done += value.length));
  }
  return new Blob(parts).arrayBuffer();
}

/** Drops earlier models of this site from the browser's cache: their paths never come back. */
async function forget(key, models, current) {
  if (!self.caches) return;
  const cache = await caches.open(key);
  for (const { url } of await cache.keys()) {
    if (url.startsWith(models) && !url.startsWith(`${models}${current}/`)) await cache.delete(url);
  }
}

function prompt(messages) {
  return tokenizer.apply_chat_template(messages, {
    add_generation_prompt: true,
    tokenize: true,
    return_dict: true,
  });
}

/** Answers greedily. The oldest turns go where the conversation outgrows the model's context. */
async function ask({ id, messages, max_new_tokens }) {
  let inputs = prompt(messages);
  while (messages.length > 1 && inputs.input_ids.dims.at(-1) > limit) {
    messages = messages.slice(2);
    inputs = prompt(messages);
  }
  const length = inputs.input_ids.dims.at(-1);
  if (length > limit) {
    throw new Error(`the question is ${length} tokens long; the model takes ${limit}`);
  }
  const stopping = new transformers.InterruptableStoppingCriteria();
  const decode = (ids) =>
    tokenizer.decode(ids, { skip_special_tokens: true, clean_up_tokenization_spaces: false });
  const began = performance.now();
  let first = 0;
  let last = 0;
  const streamer = new Streamer((ids) => {
    last = performance.now();
    first ||= last;
    const text = decode(ids);
    // Half a character waits for its other half.
    if (!text.endsWith('\ufffd')) post('text', { id, text });
    if (stopFlag && Atomics.load(stopFlag, 0)) stopping.interrupt();
  });
  const output = await model.generate({
    ...inputs,
    max_new_tokens,
    do_sample: false,
    streamer,
    stopping_criteria: [stopping],
  });
  const ids = [...output.data].map(Number).slice(length);
  const text = decode(ids);
  // The first token also pays for reading the prompt, so it does not count.
  const seconds = (ids.length > 1 ? last - first : last - began) / 1000;
  const tokensPerSecond = Math.max(ids.length - 1, 1) / Math.max(seconds, 1e-3);
  post('answer', { id, text, ids, tokensPerSecond });
}

/** Tells of every token, where the library's own TextStreamer waits for a whole word. */
class Streamer {
  #tell;
  #ids = null;

  constructor(tell) {
    this.#tell = tell;
  }

  /** First comes the prompt, then token after token. */
  put([ids]) {
    if (this.#ids === null) this.#ids = [];
    else this.#tell((this.#ids = [...this.#ids, ...ids.map(Number)]));
  }

  end() {}
}
