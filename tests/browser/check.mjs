// The built page as a visitor sees it: isolation, streaming, no other host, and the very answers
// that the evaluation had from ONNX Runtime. Each device gets a fresh page: a session that fails
// once spoils those after it.
import fs from 'node:fs';
import path from 'node:path';
import { DEMO, MINUTE, check, compileServer, launch, need, run, serve } from './page.mjs';

const MODEL = 'onnx-int4';
const SHOTS = 'target/browser';
const PROMPTS = { wasm: 20, webgpu: 5 };

/** A fresh page and what it asked for, failed at, and said. */
async function visit(browser, url, prepare = async () => {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 } });
  const page = await context.newPage();
  page.setDefaultTimeout(5 * MINUTE);
  const seen = { requests: [], errors: [] };
  context.on('request', (request) => seen.requests.push(request.url()));
  page.on('pageerror', (error) => seen.errors.push(error.message));
  page.on('console', (message) => {
    if (message.type() === 'error') seen.errors.push(message.text());
  });
  await prepare(page);
  await page.goto(url);
  return { context, page, seen };
}

const ready = (page) => page.evaluate(() => window.anneal.ready);

function quiet(name, { seen }, host) {
  const outside = seen.requests.filter((url) => !url.startsWith(`${host}/`));
  check(`${name}: no request leaves the host`, seen.requests.length > 5 && !outside.length, outside.join(' '));
  check(`${name}: no error in the console`, !seen.errors.length, seen.errors.join('\n        '));
}

async function answers(name, page, examples) {
  const differ = [];
  const speeds = [];
  for (const { prompt, answers } of examples) {
    const { text, ids, tokensPerSecond } = await page.evaluate((p) => window.anneal.ask(p), prompt);
    if (ids.length > 1) speeds.push(tokensPerSecond);
    const [theirs, ours] = [answers[MODEL].trim(), text.trim()];
    if (theirs !== ours) differ.push(`${prompt}: ${JSON.stringify(ours)}, evaluation ${JSON.stringify(theirs)}`);
  }
  speeds.sort((a, b) => a - b);
  const middle = speeds[speeds.length >> 1] ?? 0;
  check(`${name}: ${examples.length} answers are those of the evaluation (${middle.toFixed(1)} tokens/s)`,
    !differ.length && examples.length > 0, differ.join('\n        '));
}

/** Asks through the form and counts the states that the newest card goes through. */
async function streams(name, page, prompt) {
  await page.evaluate(() => {
    window.states = new Set();
    new MutationObserver(() => {
      const answer = document.querySelector('#log [aria-busy="true"]');
      if (answer) window.states.add(answer.textContent);
    }).observe(document.getElementById('log'), { subtree: true, childList: true, characterData: true });
  });
  await page.fill('#question', prompt);
  await page.press('#question', 'Enter');
  await page.waitForSelector('#log [aria-busy="false"]');
  const states = await page.evaluate(() => [...window.states]);
  // The first is the empty card.
  check(`${name}: an answer streams to the page (${states.length - 1} states)`, states.length >= 3, states.join(' | '));
}

async function onDevice(browser, host, device, examples) {
  const visitor = await visit(browser, `${host}/?device=${device}`);
  const { page, context, seen } = visitor;
  await ready(page);
  check(`${device}: the page is isolated`, await page.evaluate(() => self.crossOriginIsolated === true));
  check(`${device}: it runs there`, (await page.evaluate(() => window.anneal.device)) === device);
  const asyncify = seen.requests.some((url) => url.includes('.asyncify.wasm'));
  check(`${device}: with the build for it`, asyncify === (device === 'webgpu'));
  await streams(device, page, examples[0].prompt);
  await answers(device, page, examples.slice(0, PROMPTS[device]));
  quiet(device, visitor, host);
  if (device === 'wasm') await photograph(page, examples);
  await context.close();
}

async function photograph(page, examples) {
  const scroll = (id) => page.evaluate((i) => document.getElementById(i)?.scrollIntoView() ?? scrollTo(0, 0), id);
  const shots = [
    ['desktop-light', 'light', 1280, 900, null],
    ['desktop-dark', 'dark', 1280, 900, null],
    ['desktop-made', 'light', 1280, 900, 'made'],
    ['mobile-light', 'light', 390, 844, null],
    ['mobile-dark', 'dark', 390, 844, null],
    ['mobile-made', 'dark', 390, 844, 'made'],
  ];
  // As a visitor finds it after two questions.
  await page.evaluate(() => document.getElementById('log').replaceChildren());
  for (const { prompt } of examples.slice(0, 2)) await page.evaluate((p) => window.anneal.ask(p), prompt);
  await page.evaluate(() => document.activeElement?.blur());
  for (const [name, colorScheme, width, height, at] of shots) {
    await page.emulateMedia({ colorScheme });
    await page.setViewportSize({ width, height });
    await scroll(at);
    await page.screenshot({ path: path.join(SHOTS, `${name}.png`) });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth > innerWidth);
    check(`${name}: nothing is wider than the screen`, !wide);
  }
}

async function withoutHeaders(browser, host, example) {
  const name = 'no headers';
  const visitor = await visit(browser, `${host}/`);
  const { page, context } = visitor;
  try {
    // The page reloads once, by itself.
    await page.waitForFunction(() => self.crossOriginIsolated === true && window.anneal, null, { timeout: MINUTE });
    check(`${name}: the service worker isolates the page`, true);
    await ready(page);
    await answers(name, page, [example]);
  } catch (error) {
    check(`${name}: the service worker isolates the page`, false, error.message);
  }
  quiet(name, visitor, host);
  await context.close();
}

async function afterDeath(browser, host) {
  const mark = (page) => page.addInitScript(() => localStorage.setItem('anneal:loading', String(Date.now())));
  const { page, context } = await visit(browser, `${host}/`, mark);
  await page.waitForSelector('#trouble:not([hidden]) button');
  const loads = await page.evaluate(() => document.body.dataset.ready === undefined);
  check('after a death while loading: the page asks before it loads again', loads);
  await page.click('#trouble button');
  await ready(page);
  check('after a death while loading: it loads when told to', true);
  await context.close();
}

await run('browser', async () => {
  const hint = 'run `cargo xtask build demo` first';
  need(`${DEMO}/site/index.html`, hint);
  const report = JSON.parse(fs.readFileSync(need(`${DEMO}/eval/eval.json`, hint)));
  const examples = report.examples.slice(0, PROMPTS.wasm);
  check(`eval.json holds ${PROMPTS.wasm} prompts with answers of ${MODEL}`,
    examples.length === PROMPTS.wasm && examples.every((e) => typeof e.answers[MODEL] === 'string'));
  fs.mkdirSync(SHOTS, { recursive: true });
  const binary = compileServer();
  const host = await serve(binary, `${DEMO}/site`);
  const bare = await serve(binary, `${DEMO}/site`, '--no-isolation');
  const browser = await launch();
  try {
    await onDevice(browser, host, 'wasm', examples);
    await onDevice(browser, host, 'webgpu', examples);
    await withoutHeaders(browser, bare, examples[0]);
    await afterDeath(browser, host);
  } finally {
    await browser.close();
  }
});
