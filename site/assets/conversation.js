// Questions and answers as cards. Knows nothing of the model.

import { FIELDS, describe, next, parse } from './crontab.js';

/** An element: `el('p.words', { title }, 'text', child)`. */
export function el(name, attributes = {}, ...children) {
  const [tag, ...classes] = name.split('.');
  const element = document.createElement(tag);
  if (classes.length) element.className = classes.join(' ');
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** A new card in `log`. Its `update` takes the text so far, its `finish` the whole answer. */
export function card(log, kind, question) {
  const body = el('div.answer', { 'aria-busy': 'true' });
  const meta = el('p.meta', {}, 'waiting for the model');
  const item = el('li.card', {}, el('p.question', {}, question), body, meta);
  // The newest is next to the question: on top for lines, at the end for a conversation.
  if (kind === 'crontab') log.prepend(item);
  else log.append(item);
  const view = kind === 'crontab' ? crontab(body) : plain(body);
  view.update('');
  if (kind !== 'crontab') item.scrollIntoView({ block: 'nearest' });
  return {
    update(text) {
      meta.textContent = 'answering';
      view.update(text);
    },
    finish({ text, ids, tokensPerSecond, stopped }) {
      body.setAttribute('aria-busy', 'false');
      view.finish(text.trim(), stopped);
      const speed = ids.length > 1 ? `${ids.length} tokens, ${rate(tokensPerSecond)}` : '';
      meta.replaceChildren(stopped ? 'stopped' : speed, copy(text.trim()));
    },
    fail(message) {
      body.setAttribute('aria-busy', 'false');
      item.classList.add('failed');
      meta.textContent = message;
    },
  };
}

export function rate(tokensPerSecond) {
  const digits = tokensPerSecond < 10 ? 1 : 0;
  return `${tokensPerSecond.toFixed(digits)} tokens/s`;
}

function copy(text) {
  const button = el('button.copy', { type: 'button' }, 'Copy');
  button.addEventListener('click', async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = 'Copied';
    } catch {
      button.textContent = 'Not allowed';
    }
    setTimeout(() => (button.textContent = 'Copy'), 1500);
  });
  return button;
}

function plain(body) {
  const text = el('p.text');
  body.append(text);
  const show = (all) => {
    const followed = hiddenBy(body) < 40;
    text.textContent = all;
    if (followed) scrollBy(0, Math.max(hiddenBy(body), 0));
  };
  // A long answer comes faster than the page can be laid out: once a frame is enough.
  let latest = null;
  const frame = () => {
    if (latest !== null) show(latest);
    latest = null;
  };
  return {
    update(all) {
      if (latest === null) requestAnimationFrame(frame);
      latest = all;
    },
    finish(all) {
      latest = null;
      show(all);
    },
  };
}

/** How many pixels of an answer are below the form that stands at the window's end. */
function hiddenBy(body) {
  return body.getBoundingClientRect().bottom - document.getElementById('ask').getBoundingClientRect().top + 24;
}

/** The line in its five fields, in words, and when it fires next. */
function crontab(body) {
  const cells = FIELDS.map(({ name }) => {
    const value = el('span.value');
    return { value, cell: el('span.field', {}, value, el('span.label', { 'aria-hidden': 'true' }, name)) };
  });
  const line = el('p.line', {}, ...cells.flatMap(({ cell }) => [cell, ' ']));
  const said = el('div.said');
  body.append(line, said);
  const fill = (text) => {
    const words = text.trim().split(/\s+/);
    cells.forEach(({ value }, i) => (value.textContent = words[i] ?? ''));
  };
  return {
    update: fill,
    finish(text, stopped) {
      const cron = parse(text);
      if (!cron.error) {
        fill(text);
        said.replaceChildren(el('p.words', {}, describe(cron)), times(cron));
        return;
      }
      body.classList.add('invalid');
      line.replaceChildren(el('span.raw', {}, text || '(nothing)'));
      const why = stopped ? '' : `Not a crontab line: ${cron.error}.`;
      said.replaceChildren(el('p.words', {}, why));
    },
  };
}

function times(cron) {
  const now = new Date();
  const found = next(cron, now, 3);
  if (!found.length) return el('p.times', {}, 'It never fires: there is no such day.');
  const day = new Intl.DateTimeFormat('en-GB', {
    weekday: 'short', day: 'numeric', month: 'short', year: 'numeric',
  });
  const clock = new Intl.DateTimeFormat('en-GB', { hour: '2-digit', minute: '2-digit' });
  const rows = found.map((at) =>
    el('li', {},
      el('time', { datetime: at.toISOString() }, `${day.format(at)}, ${clock.format(at)}`),
      el('span.away', {}, away(at - now)),
    ));
  return el('ol.times', { 'aria-label': 'The next times it fires' }, ...rows);
}

function away(milliseconds) {
  const format = new Intl.RelativeTimeFormat('en', { numeric: 'always' });
  const minutes = Math.round(milliseconds / 60_000);
  if (minutes < 100) return format.format(Math.max(minutes, 1), 'minute');
  if (minutes < 36 * 60) return format.format(Math.round(minutes / 60), 'hour');
  const days = Math.round(minutes / 1440);
  return days < 120 ? format.format(days, 'day') : format.format(Math.round(days / 30.44), 'month');
}
