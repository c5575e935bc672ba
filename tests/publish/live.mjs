// The demo's site, published to a stand-in for AWS and opened in Chromium through a server that plays
// CloudFront: it serves the bucket and adds the headers of the policy that `publish setup` made.
import { spawn } from 'node:child_process';
import fs from 'node:fs';
import http from 'node:http';
import os from 'node:os';
import path from 'node:path';
import readline from 'node:readline';
import { DEMO, MINUTE, check, children, compile, launch, need, run } from '../browser/page.mjs';

const MODEL = 'onnx-int4';
const BUCKET = 'anneal-demo';
const PREFIX = 'site';

/** Prints its address in a line of JSON. */
async function start(program, ...args) {
  const child = spawn(program, args, { stdio: ['ignore', 'pipe', 'inherit'] });
  children.push(child);
  for await (const line of readline.createInterface({ input: child.stdout })) {
    return JSON.parse(line).listening;
  }
  throw new Error(`${args} does not start`);
}

/** The worker's answer to a task, as `cargo xtask publish` asks it. */
async function ask(worker, aws, step, target, task) {
  const dir = fs.mkdtempSync(path.join(os.tmpdir(), 'anneal-publish-'));
  const folder = (name) => {
    fs.mkdirSync(path.join(dir, name));
    return path.join(dir, name);
  };
  const site = { label: 'site', kind: 'site', path: path.resolve(DEMO, 'site'), origin: 'demo/site' };
  const request = {
    format: 1, step, mode: 'act', params: { target, task }, inputs: { site: [site] }, tools: {},
    out: folder('out'), report: folder('report'), scratch: folder('scratch'), threads: 1,
  };
  fs.writeFileSync(path.join(dir, 'request.json'), JSON.stringify(request));
  const env = {
    ...process.env, AWS_ENDPOINT_URL: aws, AWS_ACCESS_KEY_ID: 'test', AWS_SECRET_ACCESS_KEY: 'test',
    AWS_REGION: 'eu-central-1',
  };
  const child = spawn(worker, [path.join(dir, 'request.json')], { env, stdio: ['ignore', 'pipe', 'inherit'] });
  const said = [];
  for await (const line of readline.createInterface({ input: child.stdout })) said.push(line);
  const answer = path.join(dir, 'out', 'answer.json');
  if (!fs.existsSync(answer)) throw new Error(said.find((line) => line.includes('"failed"')) ?? said.join('\n'));
  const told = JSON.parse(fs.readFileSync(answer));
  fs.rmSync(dir, { recursive: true });
  return told;
}

/** CloudFront's answer. The stand-in knows by the signature's scope which service is asked, and no more. */
async function cloudfront(aws, what) {
  const authorization = 'AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/cloudfront/aws4_request, '
    + 'SignedHeaders=host, Signature=0';
  return (await fetch(`${aws}/2020-05-31/${what}`, { headers: { authorization } })).text();
}

const tag = (xml, name) => [...xml.matchAll(new RegExp(`<${name}>([^<]*)</${name}>`, 'g'))].map((m) => m[1]);

/** Serves the bucket as the distribution says; `drop` names a header that it leaves out. */
async function front(aws, distribution) {
  const config = await cloudfront(aws, `distribution/${distribution}/config`);
  const [origin] = tag(config, 'OriginPath');
  const [root] = tag(config, 'DefaultRootObject');
  const [id] = tag(config, 'ResponseHeadersPolicyId');
  const policy = await cloudfront(aws, `response-headers-policy/${id}`);
  const values = tag(policy, 'Value');
  const added = tag(policy, 'Header').map((name, i) => [name, values[i]]);
  if (policy.includes('ContentTypeOptions')) added.push(['X-Content-Type-Options', 'nosniff']);
  const state = { drop: null };
  const server = http.createServer(async (request, response) => {
    const at = new URL(request.url, 'http://x').pathname;
    const got = await fetch(`${aws}/${BUCKET}${origin}/${at === '/' ? root : at.slice(1)}`, { headers: { 'accept-encoding': 'identity' } });
    const headers = {};
    for (const name of ['content-type', 'cache-control', 'etag']) {
      if (got.headers.has(name)) headers[name] = got.headers.get(name);
    }
    for (const [name, value] of added) if (name.toLowerCase() !== state.drop?.toLowerCase()) headers[name] = value;
    // fetch has decoded what the bucket holds compressed.
    const body = Buffer.from(await got.arrayBuffer());
    response.writeHead(got.status, { ...headers, 'content-length': body.length });
    response.end(body);
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  server.unref();
  return { url: `http://127.0.0.1:${server.address().port}/`, state, added, origin, root };
}

await run('publish', async () => {
  const hint = 'run `cargo xtask build demo` first';
  need(`${DEMO}/site/index.html`, hint);
  const report = JSON.parse(fs.readFileSync(need(`${DEMO}/eval/eval.json`, hint)));
  const worker = compile('publish-worker', '--package', 'publish', '--bin', 'publish-worker');
  const aws = await start(process.env.PYTHON, 'tests/publish/aws.py');
  const target = {
    bucket: BUCKET, prefix: PREFIX, region: 'eu-central-1', endpoint: null, path_style: true, distribution: null, url: null,
  };
  const s3 = (task, more = {}) => ask(worker, aws, 'publish/s3', { ...target, ...more }, task);

  const made = await s3('setup');
  const how = (told) => told.done.map((one) => `${one.what}: ${one.how}`).join('; ');
  check('setup makes bucket, access, headers and distribution', made.done.length === 6
    && made.done.every(({ how }) => /made|closed/.test(how)), how(made));
  check('setup prints what publisher and setup must be allowed',
    JSON.stringify(made.policies.publisher).includes('cloudfront:CreateInvalidation'));
  const again = await s3('setup');
  check('setup, run again, changes nothing', again.done.every((one) => one.how === 'as it is')
    && again.distribution === made.distribution, how(again));
  const policy = await (await fetch(`${aws}/${BUCKET}?policy`)).json();
  check('the bucket lets the distribution read the folder, and nobody else', policy.Statement.length === 1
    && policy.Statement[0].Resource === `arn:aws:s3:::${BUCKET}/${PREFIX}/*`
    && policy.Statement[0].Condition.StringEquals['AWS:SourceArn'].endsWith(made.distribution), JSON.stringify(policy));

  const cloud = await front(aws, made.distribution);
  check('the distribution serves the folder', cloud.origin === `/${PREFIX}` && cloud.root === 'index.html');
  check('its policy has the three isolation headers', cloud.added.length === 4, JSON.stringify(cloud.added));
  const more = { distribution: made.distribution, url: cloud.url };
  const task = { publish: { dry_run: false, documents: {} } };
  const first = await s3(task, more);
  check(`publish sends the site and finds it whole (${first.new.length} objects, ${first.bytes_sent} bytes)`,
    first.new.length > 20 && first.check.wrong.length === 0, JSON.stringify(first.check.wrong));
  check('WebAssembly that CloudFront would not compress is compressed',
    first.new.filter((file) => file.encoding === 'gzip').length === 2);
  const second = await s3(task, more);
  check('publish, run again, sends nothing', second.bytes_sent === 0 && second.moved.length === 0);
  const gone = await cloudfront(aws, `distribution/${made.distribution}/invalidation`);
  check('one invalidation was made', tag(gone, 'Quantity')[0] === '1', gone);

  cloud.state.drop = 'Cross-Origin-Embedder-Policy';
  const told = await ask(worker, aws, 'publish/check', null, { url: cloud.url, release: null });
  check('without COEP the check fails and says so', told.wrong.length > 20
    && told.wrong.every(({ wrong }) => wrong === 'Cross-Origin-Embedder-Policy is missing'), JSON.stringify(told.wrong[0]));
  cloud.state.drop = null;

  const browser = await launch();
  try {
    const page = await browser.newPage();
    page.setDefaultTimeout(5 * MINUTE);
    const errors = [];
    page.on('pageerror', (error) => errors.push(error.message));
    await page.goto(`${cloud.url}?device=wasm`);
    await page.evaluate(() => window.anneal.ready);
    check('the published page is isolated', await page.evaluate(() => self.crossOriginIsolated === true));
    const { prompt, answers } = report.examples[0];
    const { text } = await page.evaluate((p) => window.anneal.ask(p), prompt);
    check('the published page answers as the evaluation did', text.trim() === answers[MODEL].trim(), text);
    check('the published page has no error', !errors.length, errors.join('\n'));
  } finally {
    await browser.close();
  }
});
