// Pages in headless Chromium, the server that they come from, and what was wrong with them.
import { spawn, spawnSync } from 'node:child_process';
import fs from 'node:fs';
import readline from 'node:readline';
import sparticuz from '@sparticuz/chromium';
import { chromium } from 'playwright-core';

export const DEMO = process.env.ANNEAL_DEMO ?? 'artifacts/demo';
export const MINUTE = 60_000;
// SwiftShader does WebGPU on the CPU. A name that is not ours does not resolve.
const FLAGS = [
  '--headless=shell', '--no-sandbox', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update', '--disable-sync',
  '--enable-unsafe-webgpu', '--use-webgpu-adapter=swiftshader', '--enable-features=Vulkan',
  '--use-vulkan=swiftshader', '--ignore-gpu-blocklist',
  '--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1',
];

const failures = [];
export const children = [];

export function check(what, same, detail = '') {
  console.log(`${same ? 'ok      ' : 'FAILED  '}${what}${same || !detail ? '' : `\n        ${detail}`}`);
  if (!same) failures.push(what);
}

export function need(file, hint) {
  if (fs.existsSync(file)) return file;
  console.error(`error: ${file} is not there\nhint: ${hint}`);
  process.exit(1);
}

/** The path of `name`, an executable that needs its package's worker feature. */
export function compile(name, ...what) {
  const args = ['build', '--release', '--locked', '--features', 'worker', ...what,
    '--message-format', 'json-render-diagnostics'];
  const cargo = spawnSync('cargo', args, { stdio: ['ignore', 'pipe', 'inherit'], maxBuffer: 1 << 28 });
  const built = String(cargo.stdout).split('\n').filter(Boolean).map((line) => JSON.parse(line))
    .find((m) => m.target?.name === name && m.executable);
  if (cargo.status !== 0 || !built) throw new Error(`${name} does not compile`);
  return built.executable;
}

/** The server's binary, built as `cargo xtask serve` builds it. */
export const compileServer = () =>
  compile('serve-worker', '--package', 'serve', '--bin', 'serve-worker');

export async function serve(binary, site, ...options) {
  const child = spawn(binary, [site, '--port', '0', ...options], {
    stdio: ['ignore', 'pipe', 'inherit'],
  });
  children.push(child);
  for await (const line of readline.createInterface({ input: child.stdout })) {
    return JSON.parse(line).listening;
  }
  throw new Error('serve-worker does not start');
}

export async function launch() {
  const executablePath = await sparticuz.executablePath();
  const browser = await chromium.launch({ executablePath, args: FLAGS, timeout: 2 * MINUTE });
  console.log(`        Chromium ${browser.version()}`);
  return browser;
}

/** Runs the checks, and ends the process with what they found. */
export async function run(name, checks) {
  try {
    await checks();
  } catch (error) {
    check('the checks run to their end', false, error.stack);
  } finally {
    for (const child of children) child.kill();
  }
  console.log(`\n${failures.length ? `FAILED: ${failures.join(', ')}` : `${name}: all as it should be`}`);
  process.exit(failures.length ? 1 : 0);
}
