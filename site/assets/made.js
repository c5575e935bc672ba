// How it was made: what each model scored, and the files by digest. Knows only `site.json`.

import { el } from './conversation.js';

const NAMES = {
  exact_match: 'exactly right',
  same_answers: 'same answers',
  top1_agreement: 'same top token',
  perplexity: 'perplexity',
  perplexity_ratio: 'ratio',
  kl: 'divergence',
};
const KINDS = { model: 'safetensors', 'onnx-model': 'ONNX', 'gguf-model': 'GGUF' };
const SHARES = /^(exact_match|same_answers|top1_agreement)$/;
// Said already by another figure, or a check of the evaluation's own.
const LEFT_OUT = /(_drop|^nll|^bits_per_token|^same_tokens)$/;

export function fill(section, site) {
  const reports = site.reports.filter(({ models }) => Object.keys(models).length);
  for (const report of reports) section.append(results(report, site.model.label));
  section.append(files(site));
  section.hidden = false;
}

function results(report, label) {
  const order = (report.order ?? Object.keys(report.models)).filter((m) => report.models[m]);
  const columns = (report.figures ?? figuresOf(report, order)).filter((figure) =>
    !LEFT_OUT.test(figure) && order.some((m) => typeof report.models[m][figure] === 'number'));
  const [main] = columns;
  const bars = order.every((m) => share(main, report.models[m][main] ?? 0));
  const head = el('tr', {}, el('th', { scope: 'col' }, 'model'),
    ...columns.map((figure) => el('th.number', { scope: 'col' }, NAMES[figure] ?? figure.replaceAll('_', ' '))),
    el('th.number', { scope: 'col' }, 'size'));
  const rows = order.map((name) => {
    const model = report.models[name];
    const here = name === label;
    const about = here ? 'on this page' : KINDS[model.kind];
    const cells = columns.map((figure, i) => el('td.number', {},
      i === 0 && bars ? bar(model[figure] ?? 0) : null,
      el('span.figure', {}, show(figure, model[figure]))));
    return el(here ? 'tr.here' : 'tr', {},
      el('th', { scope: 'row' }, name, about ? el('span.about', {}, about) : null),
      ...cells, el('td.number', {}, bytes(model.size_bytes)));
  });
  const id = `report-${report.label}`;
  return el('div.report', {}, el('p', { id }, sentence(report)),
    el('div.scroll', { tabindex: '0', role: 'group', 'aria-labelledby': id },
      el('table.results', {}, el('thead', {}, head), el('tbody', {}, ...rows))));
}

function sentence({ step, rows, split }) {
  const asked = rows ? `${rows.toLocaleString('en')} rows of the ${split ?? 'test'} split` : 'Held-out rows';
  if (step === 'eval/exact-match') return `${asked}, answered greedily. Right is the expected answer to the letter.`;
  if (step === 'eval/perplexity') return `${asked}: how likely each model finds the answers.`;
  return `${asked}, ${step}.`;
}

function figuresOf(report, order) {
  const found = new Set(order.flatMap((m) => Object.keys(report.models[m])));
  return [...found].filter((figure) => figure !== 'kind' && figure !== 'size_bytes').slice(0, 4);
}

const share = (figure, value) => SHARES.test(figure) && value >= 0 && value <= 1;

function show(figure, value) {
  if (typeof value !== 'number') return '–';
  if (share(figure, value)) return `${(100 * value).toFixed(1)} %`;
  if (value > 0 && value < 1e-4) return '< 0.0001';
  return Number(Number(value.toPrecision(4)).toFixed(4)).toString();
}

function bar(value) {
  return el('meter', { min: 0, max: 1, value, 'aria-hidden': 'true' });
}

export function bytes(n) {
  if (typeof n !== 'number') return '–';
  if (n < 1000) return `${n} B`;
  if (n < 1e6) return `${(n / 1e3).toFixed(1)} kB`;
  return `${(n / 1e6).toFixed(n < 1e7 ? 2 : 1)} MB`;
}

/** Every file of the model and of its runtime, by the digest that the build knows it by. */
function files({ model, vendor }) {
  const rows = [
    ...model.files,
    ...vendor.files.map((file) => ({ ...file, parts: [{ path: vendor.path + file.path }] })),
  ].map(({ path, bytes: size, blake3, parts }) =>
    el('tr', {},
      el('th', { scope: 'row' },
        parts.length === 1 ? el('a', { href: parts[0].path }, path) : `${path}, ${parts.length} parts`),
      el('td.number', {}, bytes(size)),
      el('td.digest', { title: blake3 }, blake3.slice(0, 16))));
  const head = el('tr', {}, el('th', { scope: 'col' }, 'file'),
    el('th.number', { scope: 'col' }, 'size'), el('th', { scope: 'col' }, 'BLAKE3'));
  return el('details', {}, el('summary', {}, 'The files, by digest'),
    el('p.note', {}, 'A digest is a file’s name in the store of the build. The same inputs give the same bytes again; '
      + 'the model as a whole is ', el('span.digest', { title: model.digest }, model.digest.slice(0, 16)), '.'),
    el('div.scroll', { tabindex: '0', role: 'group', 'aria-label': 'Files' },
      el('table.files', {}, el('thead', {}, head), el('tbody', {}, ...rows))));
}
