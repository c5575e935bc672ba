// The model as the page sees it: which device, loading, one question after another.
// Knows nothing of how things look.

const DTYPES = ['q4', 'q8', 'int8', 'uint8', 'fp16', 'fp32', 'q4f16'];

/** What to run on: `?device=` if it says so, else WebGPU where a real adapter is, else WASM. */
export async function chooseDevice(site, asked) {
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  const software = adapter?.info?.isFallbackAdapter ?? false;
  const possible = DTYPES.filter((dtype) => site.model.dtypes.includes(dtype));
  // Half precision fails late where the adapter has none, so ask first. WASM has none at all.
  const half = adapter?.features.has('shader-f16') ?? false;
  const works = (device) =>
    possible.find((dtype) => !dtype.endsWith('16') || (device === 'webgpu' && half));
  const device = asked ?? (adapter && !software && works('webgpu') ? 'webgpu' : 'wasm');
  if (device === 'webgpu' && !adapter) throw new Error('this browser gives no WebGPU adapter');
  const dtype = works(device);
  if (!dtype) throw new Error(`no file of this model (${possible.join(', ')}) runs on ${device}`);
  return { device, dtype, other: device === 'wasm' ? (adapter ? 'webgpu' : null) : 'wasm' };
}

/** As many threads as are worth it; without shared memory there is one. */
export function chooseThreads(asked) {
  if (!self.crossOriginIsolated) return 1;
  return asked ?? Math.min(navigator.hardwareConcurrency || 1, 4);
}

export class Engine {
  #site;
  #load;
  #worker;
  #stop = self.crossOriginIsolated ? new Int32Array(new SharedArrayBuffer(4)) : null;
  #turn = Promise.resolve();
  #waiting = new Set();
  #current = null;

  constructor(site) {
    this.#site = site;
  }

  /** Loads the model in a fresh worker: one that failed once never loads anything again. */
  load({ device, dtype, threads }, tell) {
    this.#worker?.terminate();
    this.#load = { device, dtype, threads, tell };
    const worker = new Worker(new URL('./worker.js', import.meta.url), { type: 'module' });
    this.#worker = worker;
    return new Promise((resolve, reject) => {
      worker.onerror = (event) => {
        const error = new Error(event.message || 'the worker does not start');
        reject(error);
        this.#current?.reject(error);
      };
      worker.onmessage = ({ data }) => {
        if (data.type === 'ready') resolve(data);
        else if (data.type === 'failed' && data.id === undefined) reject(new Error(data.message));
        else if (data.id === undefined) tell(data);
        else this.#heard(data);
      };
      const { vendor, model, max_new_tokens } = this.#site;
      worker.postMessage({
        type: 'load',
        base: new URL('.', document.baseURI).href,
        site: { vendor, model, max_new_tokens },
        device,
        dtype,
        threads,
        stop: this.#stop?.buffer ?? null,
      });
    });
  }

  /** Answers `{ text, ids, tokensPerSecond, stopped }`; `onText` gets all the text so far. */
  ask(messages, onText) {
    const ticket = { stopped: false };
    this.#waiting.add(ticket);
    const answer = this.#turn.then(() => {
      this.#waiting.delete(ticket);
      if (ticket.stopped) return { text: '', ids: [], tokensPerSecond: 0, stopped: true };
      return this.#ask(messages, onText);
    });
    this.#turn = answer.catch(() => {});
    return answer;
  }

  #ask(messages, onText) {
    return new Promise((resolve, reject) => {
      const id = crypto.randomUUID?.() ?? String(Math.random());
      this.#current = { id, text: '', stopped: false, onText, resolve, reject };
      if (this.#stop) Atomics.store(this.#stop, 0, 0);
      const { max_new_tokens } = this.#site;
      this.#worker.postMessage({ type: 'ask', id, messages, max_new_tokens });
    }).finally(() => (this.#current = null));
  }

  #heard(data) {
    const current = this.#current;
    if (current?.id !== data.id) return;
    if (data.type === 'text') current.onText((current.text = data.text));
    else if (data.type === 'failed') current.reject(new Error(data.message));
    else if (data.type === 'answer') {
      const { text, ids, tokensPerSecond } = data;
      current.resolve({ text, ids, tokensPerSecond, stopped: current.stopped });
    }
  }

  /**
   * Ends the answer under way, and lets go of those that wait. A busy worker reads no messages, only shared memory; where there is
   * none, it is replaced by another.
   */
  async stop() {
    for (const ticket of this.#waiting) ticket.stopped = true;
    const current = this.#current;
    if (!current) return;
    current.stopped = true;
    if (this.#stop) {
      Atomics.store(this.#stop, 0, 1);
      return;
    }
    const { tell, ...load } = this.#load;
    const loaded = this.load(load, tell);
    // Later questions wait for it.
    this.#turn = Promise.all([this.#turn, loaded]).catch(() => {});
    current.resolve({ text: current.text, ids: [], tokensPerSecond: 0, stopped: true });
    await loaded;
  }
}
