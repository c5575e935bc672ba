// What the page says about a crontab line: data in, words and times out.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { describe, next, parse } from '../../site/assets/crontab.js';

const WORDS = {
  '* * * * *': 'Every minute.',
  '*/10 * * * 0': 'Every 10 minutes, on Sunday.',
  '0 * * * *': 'Every hour, on the hour.',
  '20 * * * *': 'Every hour, at minute 20.',
  '0 */3 * * *': 'Every 3 hours.',
  '15 */2 * * *': 'Every 2 hours, at minute 15.',
  '*/15 9-17 * * 1-5': 'Every 15 minutes, from 09:00 to 17:59, Monday to Friday.',
  '42 18 * * *': 'At 18:42, every day.',
  '0 6,18 * * 0,6': 'At 06:00 and 18:00, on Saturday and Sunday.',
  '30 9 1 * *': 'At 09:30, on the 1st of every month.',
  '0 0 25 12 *': 'At 00:00, on the 25th of December.',
  '5 4 * 1-3 *': 'At 04:05, every day from January to March.',
  '5 4 * 1-3,6 2': 'At 04:05, on Tuesday in January to March and June.',
  '0 12 13 * 5': 'At 12:00, on the 13th and also on Friday.',
  '0 12 13 * 1-5': 'At 12:00, on the 13th and also Monday to Friday.',
  '0 12 * jan mon': 'At 12:00, on Monday in January.',
  '0 7 */2 * *': 'At 07:00, on every 2nd day.',
  '0 8-18 * * *': 'On the hour, from 08:00 to 18:59.',
  '0 9 2,3,22 * *': 'At 09:00, on the 2nd, 3rd and 22nd of every month.',
  '10 7 * * 7': 'At 07:10, on Sunday.',
};

for (const [line, words] of Object.entries(WORDS)) {
  test(`${line} in words`, () => assert.equal(describe(parse(line)), words));
}

const WRONG = {
  '': 'five fields are needed, this has none',
  '0 9 * *': 'five fields are needed, this has four',
  '0 9 * * * *': 'five fields are needed, this has 6',
  '60 9 * * *': '`60` is no minute: minutes go from 0 to 59',
  '0 24 * * *': '`24` is no hour: hours go from 0 to 23',
  '0 9 0 * *': '`0` is no day: days go from 1 to 31',
  '0 9 * * 5-1': '`5-1` is no weekday: weekdays go from 0 to 7',
  '0 9 * * mo': '`mo` is no weekday: weekdays go from 0 to 7',
  '0 9, * * *': '`9,` is no hour',
  '0 */0 * * *': '`*/0` is no hour: hours go from 0 to 23',
  'Okay, 10:05. x y z': '`Okay,` is no minute: minutes go from 0 to 59',
};

for (const [line, error] of Object.entries(WRONG)) {
  test(`${line || '(nothing)'} is refused`, () => assert.equal(parse(line).error, error));
}

// From Friday, 21 November 2025, 11:30.
const TIMES = {
  '42 18 * * *': ['2025-11-21 18:42', '2025-11-22 18:42', '2025-11-23 18:42'],
  '30 11 * * *': ['2025-11-22 11:30', '2025-11-23 11:30', '2025-11-24 11:30'],
  '*/20 11 * * 5': ['2025-11-21 11:40', '2025-11-28 11:00', '2025-11-28 11:20'],
  '0 0 29 2 *': ['2028-02-29 00:00', '2032-02-29 00:00'],
  '0 0 30 2 *': [],
  '0 12 1 * 1': ['2025-11-24 12:00', '2025-12-01 12:00', '2025-12-08 12:00'],
};

for (const [line, expected] of Object.entries(TIMES)) {
  test(`${line} fires next`, () => {
    const two = (n) => String(n).padStart(2, '0');
    const said = next(parse(line), new Date(2025, 10, 21, 11, 30), 3).map((at) =>
      `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} ${two(at.getHours())}:${two(at.getMinutes())}`);
    assert.deepEqual(said, expected);
  });
}
