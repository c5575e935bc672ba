// The graphs that `onnx/export` writes of each architecture, in Transformers.js: held to the logits
// of transformers, and to what ONNX Runtime computes on this CPU.
//
// Builds a recipe of its own in a workspace below target/, over the tiny models of
// crates/runtime/tests/golden. `graphs.mjs DEVICE` runs all of them on one.
import { spawnSync } from 'node:child_process';
import fs from 'node:fs';
import path from 'node:path';
import { DEMO, MINUTE, check, compile, compileServer, launch, need, run, serve } from './page.mjs';

const TARGET = path.resolve(process.env.CARGO_TARGET_DIR ?? 'target');
const WORKSPACE = path.join(TARGET, 'browser-graphs');
const BUILT = path.join(WORKSPACE, 'artifacts/own');
const GOLDEN = 'crates/runtime/tests/golden';
const ARCHITECTURES = ['llama', 'mistral', 'qwen2', 'qwen3', 'gemma3', 'phi3', 'phi3-short'];
const DTYPES = ['fp32', 'q4', 'int8'];
// SwiftShader is slow, and of the three a page on WebGPU has q4.
const DEVICES = { wasm: DTYPES, webgpu: ['q4'] };
// Of a row of 23 tokens the first are read at once and the others one by one, then the likeliest
// ones: so the cache outgrows each window, and the lengths at which LongRope changes its factors.
const FIRST = 4;
const NEW = 12;
const CLOSE = 1e-4;

const recipe = (a) => `
[${a}]
step    = "command/run"
program = "cp"
args    = ["{config.json}", "{model.safetensors}", "{out}"]
inputs  = ["./own/${a}/config.json", "./own/${a}/model.safetensors"]
kind    = "model"
${DTYPES.map((dtype) => `
[${a}-${dtype}]
step  = "onnx/export"
model = "${a}"
dtype = "${dtype}"
`).join('')}`;

function call(program, args, options) {
  const { status, error, stdout } = spawnSync(program, args, { encoding: 'utf8', ...options });
  if (status !== 0) throw error ?? new Error(`${program} failed`);
  return stdout;
}

/** The code of the real workspace with a recipe of its own; what was built before is kept. */
function build() {
  const recipes = path.join(WORKSPACE, 'recipes');
  fs.rmSync(recipes, { recursive: true, force: true });
  fs.mkdirSync(recipes, { recursive: true });
  for (const name of ['Cargo.toml', 'Cargo.lock', 'rust-toolchain.toml', 'crates', 'xtask', 'recipes/demo']) {
    link(name, path.join(WORKSPACE, name));
  }
  fs.cpSync(GOLDEN, path.join(recipes, 'own'), { recursive: true });
  fs.writeFileSync(path.join(recipes, 'own.toml'), ARCHITECTURES.map(recipe).join(''));
  const env = { ...process.env, CARGO_TARGET_DIR: TARGET };
  call('cargo', ['xtask', '--workspace', WORKSPACE, 'build', 'own'], { env, stdio: 'inherit' });
}

function link(from, to) {
  fs.rmSync(to, { force: true });
  fs.symlinkSync(path.resolve(from), to);
}

/** A page without anything, the vendored libraries, the exports. */
function site() {
  const dir = path.join(WORKSPACE, 'site');
  fs.mkdirSync(dir, { recursive: true });
  fs.writeFileSync(path.join(dir, 'index.html'), '<!doctype html><title>graphs</title>');
  const vendor = need(`${DEMO}/site/vendor`, 'run `cargo xtask build demo` first');
  link(path.join(vendor, fs.readdirSync(vendor)[0]), path.join(dir, 'vendor'));
  link(BUILT, path.join(dir, 'models'));
  return dir;
}

/** The rows of tokens that transformers read, [B, T], and its logits after each, [B * T * V]. */
function expected(architecture) {
  const file = fs.readFileSync(path.join(GOLDEN, architecture, 'expected.safetensors'));
  const start = 8 + Number(file.readBigUInt64LE());
  const header = JSON.parse(file.subarray(8, start));
  const numbers = (name, Type) => {
    const [from, to] = header[name].data_offsets;
    return [...new Type(new Uint8Array(file.subarray(start + from, start + to)).buffer)];
  };
  const ids = numbers('ids', Int32Array);
  const length = header.ids.shape[1];
  const rows = header.ids.shape[0];
  return {
    rows: Array.from({ length: rows }, (_, b) => ids.slice(b * length, (b + 1) * length)),
    logits: numbers('logits', Float32Array),
  };
}

/** What the page computes: logits of the rows in one batch; then the first row as `decode` reads it. */
async function inPage({ device, dtype, model: name, rows, first, count }) {
  const { AutoModelForCausalLM, Tensor, env } = await import('/vendor/transformers.min.js');
  env.allowLocalModels = false;
  env.remoteHost = `${location.origin}/`;
  env.remotePathTemplate = 'models/{model}/';
  const { wasm } = env.backends.onnx;
  const build = `/vendor/ort-wasm-simd-threaded${device === 'webgpu' ? '.asyncify' : ''}`;
  wasm.numThreads = 1;
  wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  // What runs on the GPU submits to it at least once for each token.
  let submits = 0;
  const { submit } = GPUQueue.prototype;
  GPUQueue.prototype.submit = function count(...commands) {
    submits += 1;
    return submit.apply(this, commands);
  };
  const model = await AutoModelForCausalLM.from_pretrained(name, { dtype, device });

  const tensor = (values) =>
    new Tensor('int64', BigInt64Array.from(values.flat(), BigInt), [values.length, values[0].length]);
  const inputs = (of) =>
    ({ input_ids: tensor(of), attention_mask: tensor(of.map((row) => row.map(() => 1))) });
  const { logits } = await model(inputs(rows));
  const [row] = rows;
  const steps = [];
  // The row's own tokens come first, whatever is likely.
  const follow = (ids, scores) => {
    steps.push(...scores.data);
    const next = row[ids[0].length];
    if (next !== undefined) scores.data.fill(-Infinity).fill(0, next, next + 1);
    return scores;
  };
  const read = await model.generate({
    ...inputs([row.slice(0, first)]),
    max_new_tokens: row.length - first + count,
    do_sample: false,
    eos_token_id: null,
    logits_processor: [follow],
  });
  const ids = [...read.data].slice(row.length).map(Number);
  return { logits: [...logits.data], steps, ids, onGpu: submits > steps.length / logits.dims[2] };
}

/** The largest difference; of lists of unequal length, no number. */
function apart(a, b) {
  if (a.length !== b.length || !a.length) return NaN;
  return a.reduce((most, x, i) => Math.max(most, Math.abs(x - b[i])), 0);
}

async function compare(context, host, device, architecture, dtype, golden, onCpu) {
  const model = `${architecture}-${dtype}`;
  const name = `${device} ${model}`;
  // A session that fails once spoils those after it.
  const page = await context.newPage();
  page.setDefaultTimeout(MINUTE);
  let found;
  try {
    await page.goto(host);
    const { rows } = golden;
    found = await page.evaluate(inPage, { device, dtype, model, rows, first: FIRST, count: NEW });
  } catch (error) {
    check(`${name}: it runs`, false, error.message);
    return;
  } finally {
    await page.close();
  }
  const near = (what, ours, theirs) => {
    const most = apart(ours, theirs);
    check(`${name}: ${what}, off by ${most.toExponential(1)}`, most < CLOSE);
  };
  check(`${name}: it runs there`, found.onGpu === (device === 'webgpu'));
  if (dtype === 'fp32') near('logits of transformers', found.logits, golden.logits);
  near('logits of ONNX Runtime, read at once', found.logits.slice(0, onCpu.whole.length), onCpu.whole);
  near('logits of ONNX Runtime, read one by one', found.steps, onCpu.steps);
  check(`${name}: its next ${NEW} tokens`, found.ids.length === NEW && `${found.ids}` === `${onCpu.ids}`,
    `${found.ids}, not ${onCpu.ids}`);
}

await run('graphs', async () => {
  const [, , only] = process.argv;
  const devices = only ? { [only]: DTYPES } : DEVICES;
  build();
  const decode = compile('decode', '--package', 'runtime', '--example', 'decode');
  const host = await serve(compileServer(), site());
  const browser = await launch();
  try {
    const context = await browser.newContext();
    for (const architecture of ARCHITECTURES) {
      const golden = expected(architecture);
      const folders = DTYPES.map((dtype) => path.join(BUILT, `${architecture}-${dtype}`));
      const lines = call(decode, [FIRST, NEW, golden.rows[0].join(), ...folders].map(String));
      const onCpu = lines.trim().split('\n').map((line) => JSON.parse(line));
      for (const [device, dtypes] of Object.entries(devices)) {
        for (const dtype of dtypes) {
          await compare(context, host, device, architecture, dtype, golden, onCpu[DTYPES.indexOf(dtype)]);
        }
      }
    }
  } finally {
    await browser.close();
  }
});
