//! What the files promise: splits that do not touch, lines that are valid, noise as planned.

use std::collections::HashSet;

use serde_json::Value;

use super::*;
use crate::line::{held_out, looks_like_crontab, parse};

fn rows(split: Split) -> Vec<Schedule> {
    let mut seen = HashSet::new();
    let train = distinct(&mut Rng::new(101), Split::Train, 8_063, &mut seen);
    match split {
        Split::Train => train,
        Split::HeldOut => distinct(&mut Rng::new(202), Split::HeldOut, HELD_OUT_ROWS, &mut seen),
    }
}

fn pairs(text: &str) -> Vec<(String, String)> {
    let rows = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let string = |value: &Value| value.as_str().unwrap().to_owned();
    rows.filter(|row| row.get("messages").is_some())
        .map(|row| (string(&row["messages"][0]["content"]), string(&row["messages"][1]["content"])))
        .collect()
}

#[test]
fn the_files_are_the_same_at_every_call() {
    let (once, again) = (all(), all());
    assert!(once.iter().zip(&again).all(|(a, b)| a.name == b.name && a.text == b.text));
}

#[test]
fn every_line_is_valid() {
    for row in rows(Split::Train).iter().chain(&rows(Split::HeldOut)) {
        let parsed = parse(&row.line).unwrap_or_else(|why| panic!("{}: {why}", row.line));
        for clock in &row.clocks {
            assert!(parsed[0] == [clock.minute] && parsed[1].contains(&clock.hour), "{row:?}");
        }
        assert!(!row.prompt.contains(['{', '}', '~', '|']), "{}", row.prompt);
        assert!(!row.prompt.contains("  "), "{}", row.prompt);
    }
}

#[test]
fn training_has_no_held_out_line_prompt_template_or_time() {
    let (train, test) = (rows(Split::Train), rows(Split::HeldOut));
    let prompts: HashSet<String> = train.iter().map(Schedule::key).collect();
    let lines: HashSet<&str> = train.iter().map(|row| row.line.as_str()).collect();
    let templates: HashSet<&Vec<String>> = train.iter().map(|row| &row.templates).collect();
    for row in &train {
        assert!(row.is_common() || !held_out(&row.line), "{row:?}");
        assert!(row.clocks.iter().all(|clock| !clock.held_out()), "{row:?}");
    }
    for row in &test {
        assert!(!prompts.contains(&row.key()), "{row:?}");
        assert!(!templates.contains(&row.templates), "{row:?}");
        assert!(row.is_common() || held_out(&row.line) && !lines.contains(&*row.line), "{row:?}");
    }
    let share = |of: &dyn Fn(&Schedule) -> bool| test.iter().filter(|row| of(row)).count();
    assert!(share(&|row| row.clocks.iter().any(|clock| clock.held_out())) > HELD_OUT_ROWS / 5);
    assert!(share(&Schedule::is_common) < HELD_OUT_ROWS / 7);
}

#[test]
fn pretraining_shows_no_line_and_no_held_out_prompt() {
    let files = all();
    let text = |name: &str| &files.iter().find(|file| file.name == name).unwrap().text;
    let held_out: HashSet<String> =
        pairs(text("held-out.jsonl")).into_iter().map(|p| p.0).collect();
    assert_eq!(held_out.len(), HELD_OUT_ROWS);
    for (prompt, answer) in pairs(text("pretrain.jsonl")) {
        assert!(!held_out.contains(&prompt), "{prompt}");
        assert!(!looks_like_crontab(&answer), "{prompt}: {answer}");
    }
}

#[test]
fn three_rows_in_a_hundred_are_noise_and_sixteen_thousand_are_good() {
    let good: usize = PLANS.iter().map(|plan| plan.good).sum();
    let count = |n: &Noise| n.duplicates + n.empty_answers + n.blank_prompts + n.broken;
    let noise: usize = PLANS.iter().map(|plan| count(&plan.noise)).sum();
    assert!(good >= 16_000 && (25..=35).contains(&(noise * 1000 / (good + noise))), "{noise}");
    for file in all() {
        let Some(plan) = PLANS.iter().find(|plan| plan.name == file.name) else { continue };
        assert_eq!(file.text.lines().count(), plan.good + count(&plan.noise));
        let distinct: HashSet<&str> = file.text.lines().collect();
        assert!(distinct.len() <= plan.good + count(&plan.noise) - plan.noise.duplicates);
    }
}
