// Starts the page: isolation, the manifest, the model, the form. The only module that knows all.

import { card, el, rate } from './conversation.js';
import { Engine, chooseDevice, chooseThreads } from './engine.js';
import { bytes, fill } from './made.js';
import { mark, read, write } from './memory.js';

const $ = (id) => document.getElementById(id);
const query = new URLSearchParams(location.search);
const state = { device: null, threads: 1, other: null, speed: null, ready: null };

// What tests and the curious use: `await anneal.ready; await anneal.ask('every day at noon')`.
const ready = new Promise((resolve, reject) => (state.ready = { resolve, reject }));
ready.catch(() => {});
window.anneal = {
  ready,
  ask: (prompt) => ready.then(() => ask(prompt, { alone: true })),
  get device() {
    return state.device;
  },
};

let site, engine;
let busy = 0;
const turns = [];

if (await isolate()) {
  try {
    await start();
  } catch (error) {
    fail(error);
  }
}

/** Where the host sends no isolation headers a service worker does; that takes one reload. */
async function isolate() {
  const key = 'anneal:isolating';
  const session = () => sessionStorage;
  if (self.crossOriginIsolated || !navigator.serviceWorker || read(session, key)) {
    write(session, key, null);
    return true;
  }
  try {
    await navigator.serviceWorker.register('isolate.js');
    const late = new Promise((_, reject) => setTimeout(reject, 3000));
    await Promise.race([navigator.serviceWorker.ready, late]);
  } catch {
    // One thread, then.
    return true;
  }
  write(session, key, 'yes');
  location.reload();
  return false;
}

async function start() {
  const response = await fetch(new URL('./site.json', import.meta.url));
  if (!response.ok) throw new Error(`site.json: ${response.status} ${response.statusText}`);
  site = await response.json();
  document.title = site.title;
  document.body.dataset.answer = site.answer;
  $('title').textContent = site.title;
  $('about').textContent = site.about ?? '';
  $('question').placeholder = site.placeholder;
  for (const example of site.examples) {
    const button = el('button', { type: 'button' }, example);
    button.addEventListener('click', () => ask(example).catch(console.warn));
    $('examples').append(el('li', {}, button));
  }
  fill($('made'), site);
  $('ask').addEventListener('submit', (event) => {
    event.preventDefault();
    const question = $('question').value.trim();
    if (!question) return;
    $('question').value = '';
    ask(question).catch(console.warn);
  });
  $('stop').addEventListener('click', () => engine.stop());

  engine = new Engine(site);
  if (mark.died() && !query.has('threads')) await offerAgain();
  await load();
}

async function load() {
  const asked = { wasm: 'wasm', webgpu: 'webgpu' }[query.get('device')];
  const threads = chooseThreads(Number(query.get('threads')) || undefined);
  let choice = await chooseDevice(site, asked);
  state.other = choice.other;
  try {
    await loadOn(choice, threads);
  } catch (error) {
    // WebGPU that gives an adapter may still not run the model; WASM runs everywhere.
    if (asked || choice.device !== 'webgpu') throw error;
    console.warn(`WebGPU did not work (${error.message}); going on with WASM`);
    choice = await chooseDevice(site, 'wasm');
    await loadOn(choice, threads);
  }
  state.ready.resolve({ device: state.device, threads: state.threads });
}

async function loadOn(choice, threads) {
  $('loading').hidden = false;
  $('trouble').hidden = true;
  mark.set();
  try {
    const loaded = await engine.load({ ...choice, threads }, loading);
    state.device = choice.device;
    state.threads = loaded.threads;
  } finally {
    mark.clear();
  }
  $('loading').hidden = true;
  document.body.dataset.ready = 'true';
  status();
}

function loading({ type, done, total }) {
  if (type === 'progress') {
    $('progress').value = total ? done / total : 0;
    $('phase').textContent = `Loading the model: ${bytes(done)} of ${bytes(total)}`;
  } else {
    $('progress').removeAttribute('value');
    $('phase').textContent = 'Warming up';
  }
}

/** Asks and shows. A crontab line is a question for itself; a conversation goes on. */
async function ask(question, { alone = site.answer === 'crontab' } = {}) {
  const shown = card($('log'), site.answer, question);
  busy += 1;
  $('stop').hidden = false;
  $('send').hidden = true;
  try {
    await ready;
    const user = { role: 'user', content: question };
    const messages = alone ? [user] : [...turns, user];
    const answer = await engine.ask(messages, shown.update);
    shown.finish(answer);
    if (!alone) turns.push(user, { role: 'assistant', content: answer.text });
    if (answer.ids.length > 1) state.speed = answer.tokensPerSecond;
    status();
    return answer;
  } catch (error) {
    shown.fail(error.message);
    throw error;
  } finally {
    busy -= 1;
    $('stop').hidden = busy === 0;
    $('send').hidden = busy > 0;
  }
}

function status() {
  const device = state.device === 'webgpu' ? 'WebGPU' : 'WASM';
  const threads = state.threads === 1 ? '1 thread' : `${state.threads} threads`;
  $('status').hidden = false;
  const facts = [
    `${site.model.label}, ${bytes(site.model.bytes)}`,
    state.device === 'webgpu' ? device : `${device}, ${threads}`,
    self.crossOriginIsolated ? 'isolated' : 'not isolated',
    state.speed === null ? null : rate(state.speed),
  ];
  $('status').replaceChildren(...facts.filter(Boolean).map((fact) => el('span', {}, fact)));
  if (state.other) {
    const name = state.other === 'webgpu' ? 'WebGPU' : 'WASM';
    $('status').append(el('a', { href: `?device=${state.other}` }, `run on ${name}`));
  }
}

function fail(error) {
  console.error(error);
  $('loading').hidden = true;
  const text = el('p', {}, `The model did not load: ${error.message}`);
  const links = el('p', {}, el('a', { href: '?device=wasm&threads=1' }, 'Try again on WASM with one thread'));
  $('trouble').replaceChildren(text, links);
  $('trouble').hidden = false;
  state.ready.reject(error);
}

/** A page that died while it was loading asks before it does so again. */
function offerAgain() {
  $('loading').hidden = true;
  const again = el('button', { type: 'button' }, 'Load the model again');
  const text = el('p', {}, 'The last time, this tab was closed by the browser while the model was loading: most likely for want of memory.');
  const lighter = el('a', { href: '?device=wasm&threads=1' }, 'load it on one thread');
  $('trouble').replaceChildren(text, el('p', {}, again, ' or ', lighter));
  $('trouble').hidden = false;
  return new Promise((resolve) => {
    again.addEventListener('click', resolve);
  });
}
