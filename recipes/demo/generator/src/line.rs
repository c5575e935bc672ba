//! Crontab lines: what is held out, and what looks like one.
//! It does not know any English.

use crate::words::fnv1a32;

/// Lines that no training row may answer. A whole line is hashed, so that no minute is lost.
pub fn held_out(line: &str) -> bool {
    fnv1a32(line).is_multiple_of(5)
}

/// Times of day that neither training nor pretraining may name. Whole hours are never held out.
pub fn clock_held_out(hour: u32, minute: u32) -> bool {
    minute != 0 && fnv1a32(&format!("{hour:02}:{minute:02}")) % 6 == 1
}

/// Whether five words in a row could be the five fields.
pub fn looks_like_crontab(text: &str) -> bool {
    let field = |word: &str| word.chars().all(|c| c.is_ascii_digit() || "*/,-".contains(c));
    let words: Vec<&str> = text.split_whitespace().collect();
    words.windows(5).any(|five| five.iter().all(|word| field(word)))
}

/// Each field's minutes, hours, days, months or weekdays, or why there are none.
#[cfg(test)]
pub fn parse(line: &str) -> Result<Vec<Vec<u32>>, String> {
    const BOUNDS: [(u32, u32); 5] = [(0, 59), (0, 23), (1, 31), (1, 12), (0, 6)];
    let fields: Vec<&str> = line.split(' ').collect();
    if fields.len() != 5 {
        return Err(format!("{} fields", fields.len()));
    }
    fields.iter().zip(BOUNDS).map(|(text, bounds)| field(text, bounds)).collect()
}

#[cfg(test)]
fn field(text: &str, (low, high): (u32, u32)) -> Result<Vec<u32>, String> {
    let parse = |n: &str| n.parse::<u32>().map_err(|e| format!("{n:?}: {e}"));
    let mut values = Vec::new();
    for item in text.split(',') {
        let (span, step) = match item.split_once('/') {
            Some((span, step)) => (span, parse(step)?),
            None => (item, 1),
        };
        let (from, to) = match span.split_once('-') {
            _ if span == "*" => (low, high),
            Some((from, to)) => (parse(from)?, parse(to)?),
            None if step != 1 => return Err(format!("a step from one value: {item}")),
            None => (parse(span)?, parse(span)?),
        };
        if from < low || to > high || step == 0 || (span.contains('-') && from >= to) {
            return Err(format!("{item} is not within {low}-{high}"));
        }
        values.extend((from..=to).step_by(step as usize));
    }
    if values.windows(2).any(|pair| pair[0] >= pair[1]) {
        return Err(format!("{text} is not sorted"));
    }
    Ok(values)
}

#[test]
fn lines_are_checked() {
    let parsed = parse("*/20 9-11 1,15 */6 0").unwrap();
    assert_eq!(parsed, [vec![0, 20, 40], vec![9, 10, 11], vec![1, 15], vec![1, 7], vec![0]]);
    for wrong in ["* * * *", "60 * * * *", "0 17-9 * * *", "0 9,8 * * *", "0 9 0 * *", "0 9 * * 7"]
    {
        assert!(parse(wrong).is_err(), "{wrong}");
    }
    assert!(looks_like_crontab("so 5 4 * * 1-5 it is"));
    assert!(!looks_like_crontab("5 4 * * Monday"));
}
