// A crontab line: whether it is one, what it says in words, when it fires next.
// Knows nothing of the page. Times are the visitor's own.

const MONTHS = ['January', 'February', 'March', 'April', 'May', 'June', 'July', 'August',
  'September', 'October', 'November', 'December'];
const DAYS = ['Sunday', 'Monday', 'Tuesday', 'Wednesday', 'Thursday', 'Friday', 'Saturday'];
const short = (names) => names.map((name) => name.slice(0, 3).toLowerCase());

export const FIELDS = [
  { name: 'minute', min: 0, max: 59 },
  { name: 'hour', min: 0, max: 23 },
  { name: 'day', min: 1, max: 31 },
  { name: 'month', min: 1, max: 12, names: short(MONTHS), first: 1 },
  // 7 is Sunday too.
  { name: 'weekday', min: 0, max: 7, names: short(DAYS), first: 0 },
];

/** A line's fields, or `{ error }` with what is wrong in words. */
export function parse(line) {
  const words = line.trim().split(/\s+/).filter(Boolean);
  if (words.length !== 5) {
    const count = ['none', 'one', 'two', 'three', 'four'][words.length] ?? words.length;
    return { error: `five fields are needed, this has ${count}` };
  }
  const fields = [];
  for (const [i, spec] of FIELDS.entries()) {
    const field = parseField(words[i], spec);
    if (field.error) return { error: field.error };
    fields.push(field);
  }
  const [minute, hour, day, month, weekday] = fields;
  return { minute, hour, day, month, weekday };
}

// Its text, whether it begins with a star, its step where it is a star with or without one, and
// its values in order.
function parseField(text, spec) {
  const values = new Set();
  for (const part of text.split(',')) {
    const match = /^(\*|([a-z0-9]+)(?:-([a-z0-9]+))?)(?:\/(\d+))?$/i.exec(part);
    const wrong = { error: `\`${text}\` is no ${spec.name}` };
    if (!match) return wrong;
    const [, all, from, to, by] = match;
    let low = spec.min;
    let high = spec.name === 'weekday' ? 6 : spec.max;
    if (all !== '*') {
      low = number(from, spec);
      // `5/10` is from 5 on.
      high = to !== undefined ? number(to, spec) : by !== undefined ? spec.max : low;
    }
    const step = by === undefined ? 1 : Number(by);
    const inside = (n) => Number.isInteger(n) && n >= spec.min && n <= spec.max;
    if (!inside(low) || !inside(high) || low > high || step < 1) {
      return { error: `${wrong.error}: ${spec.name}s go from ${spec.min} to ${spec.max}` };
    }
    for (let n = low; n <= high; n += step) values.add(spec.name === 'weekday' ? n % 7 : n);
  }
  const step = /^\*(?:\/(\d+))?$/.exec(text);
  return {
    text,
    star: text.startsWith('*'),
    every: step ? Number(step[1] ?? 1) : null,
    values: [...values].sort((a, b) => a - b),
  };
}

function number(text, spec) {
  if (/^\d+$/.test(text)) return Number(text);
  const at = spec.names?.indexOf(text.toLowerCase()) ?? -1;
  return at < 0 ? NaN : at + spec.first;
}

/** What a parsed line says. */
export function describe(cron) {
  const { minute, hour } = cron;
  const days = describeDays(cron);
  let when;
  let clock = false;
  const one = (field) => field.values.length === 1;
  if (hour.every === 1) {
    if (minute.every === 1) when = 'Every minute';
    else if (minute.every) when = `Every ${minute.every} minutes`;
    else if (minute.text === '0') when = 'Every hour, on the hour';
    else when = `Every hour, at ${plural(minute.values, 'minute')}`;
  } else if (minute.every) {
    const often = minute.every === 1 ? 'minute' : `${minute.every} minutes`;
    when = `Every ${often}${during(hour)}`;
  } else if (hour.every && one(minute)) {
    const past = minute.values[0] === 0 ? '' : `, at ${plural(minute.values, 'minute')}`;
    when = `Every ${hour.every} hours${past}`;
  } else if (minute.values.length * hour.values.length <= 6) {
    const times = hour.values.flatMap((h) => minute.values.map((m) => time(h, m)));
    when = `At ${list(times)}`;
    clock = true;
  } else {
    const past = minute.text === '0' ? 'On the hour' : `At ${plural(minute.values, 'minute')}`;
    when = `${past}${during(hour)}`;
  }
  if (days) return `${when}, ${days}.`;
  return clock ? `${when}, every day.` : `${when}.`;
}

function during(hour) {
  if (hour.every) return hour.every === 1 ? '' : `, in every ${ordinal(hour.every)} hour`;
  const runs = ranges(hour.values).map(([a, b]) => `${time(a, 0)} to ${time(b, 59)}`);
  return `, from ${list(runs)}`;
}

function describeDays({ day, month, weekday }) {
  const parts = [];
  const anyDay = day.every === 1;
  const anyWeekday = weekday.every === 1;
  const onDay = day.every
    ? `on every ${ordinal(day.every)} day`
    : `on the ${list(runs(day.values, ordinal))}`;
  const named = list(weekdays(weekday.values));
  const onWeekday = / to /.test(named) ? named : `on ${named}`;
  // Cron fires when either matches, unless one of them begins with a star.
  if (!anyDay && !anyWeekday) {
    const both = day.star || weekday.star;
    parts.push(both ? `${onDay} if it is ${named}` : `${onDay} and also ${onWeekday}`);
  } else if (!anyDay) parts.push(onDay);
  else if (!anyWeekday) parts.push(onWeekday);
  if (month.every !== 1) {
    const months = runs(month.values, (n) => MONTHS[n - 1]);
    const range = months.length === 1 && / to /.test(months[0]);
    const word = !anyDay && anyWeekday && !day.every ? 'of' : range ? 'from' : 'in';
    parts.push(`${word} ${list(months)}`);
  } else if (!anyDay && anyWeekday && !day.every) parts.push('of every month');
  if (parts.length && anyDay && anyWeekday) parts.unshift('every day');
  return parts.join(' ');
}

function weekdays(values) {
  // The weekend reads from Saturday on.
  if (values.join() === '0,6') return ['Saturday', 'Sunday'];
  return runs(values, (n) => DAYS[n]);
}

/** Values as words, three or more in a row as `a to b`. */
function runs(values, word) {
  return ranges(values).flatMap(([a, b]) => {
    if (b - a >= 2) return [`${word(a)} to ${word(b)}`];
    return a === b ? [word(a)] : [word(a), word(b)];
  });
}

function ranges(values) {
  const found = [];
  for (const n of values) {
    const last = found.at(-1);
    if (last && last[1] === n - 1) last[1] = n;
    else found.push([n, n]);
  }
  return found;
}

function plural(values, unit) {
  return `${unit}${values.length > 1 ? 's' : ''} ${list(values.map(String))}`;
}

function list(words) {
  if (words.length < 2) return words.join('');
  return `${words.slice(0, -1).join(', ')} and ${words.at(-1)}`;
}

function ordinal(n) {
  const ends = { one: 'st', two: 'nd', few: 'rd', other: 'th' };
  return n + ends[new Intl.PluralRules('en', { type: 'ordinal' }).select(n)];
}

function time(hour, minute) {
  return `${String(hour).padStart(2, '0')}:${String(minute).padStart(2, '0')}`;
}

/** The next `count` times after `from`; fewer where the line never fires (30 February). */
export function next(cron, from, count) {
  const times = [];
  const date = new Date(from.getFullYear(), from.getMonth(), from.getDate());
  // 29 February comes back after eight years at the latest.
  for (let i = 0; i < 366 * 9 && times.length < count; i++) {
    if (firesOn(cron, date)) {
      for (const h of cron.hour.values) {
        for (const m of cron.minute.values) {
          const at = new Date(date.getFullYear(), date.getMonth(), date.getDate(), h, m);
          // An hour that the clock skips in spring is not there.
          if (at > from && at.getHours() === h && times.length < count) times.push(at);
        }
      }
    }
    date.setDate(date.getDate() + 1);
  }
  return times;
}

function firesOn({ day, month, weekday }, date) {
  if (!month.values.includes(date.getMonth() + 1)) return false;
  const onDay = day.values.includes(date.getDate());
  const onWeekday = weekday.values.includes(date.getDay());
  return day.star || weekday.star ? onDay && onWeekday : onDay || onWeekday;
}
