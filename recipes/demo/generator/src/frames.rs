//! Sentences around a schedule: who asks whom to do what, and in which order.
//! They do not know what the days and times in them are.

use crate::rng::Rng;
use crate::template::{fill, tidy, vary};
use crate::words::{action, action_third_person, event};

/// What stands around the schedule `~`. `{A}` is something to do, `{S}` what a job does,
/// `{N}` what happens.
pub const AROUND: &[(&str, u32)] = &[
    ("~", 150),
    ("(run|run it|do it|do this|start|begin) ~", 40),
    ("{A} ~", 70),
    ("~ {A}", 22),
    ("~, {A}", 22),
    ("{A}, ~", 8),
    ("please {A} ~", 14),
    ("please run (it|this) ~", 6),
    ("remind me ~", 10),
    ("remind me to {A} ~", 22),
    ("remind me ~ to {A}", 12),
    ("~(,|) remind me to {A}", 10),
    ("(can|could) you {A} ~", 16),
    ("(can|could) you (please|) run it ~", 5),
    ("could you remind me ~ to {A}", 4),
    ("would you {A} ~", 5),
    ("I (want|need) to {A} ~", 14),
    ("I (want|need) it ~", 6),
    ("I'd like to {A} ~", 8),
    ("I would like you to {A} ~", 4),
    ("I want you to {A} ~", 4),
    ("I want {N} to run ~", 5),
    ("we want to {A} ~", 4),
    ("schedule {N} ~", 10),
    ("schedule a job (that {S}|to {A}) ~", 8),
    ("(set up|create|add|make|write) a (cron job|job|task|cron) (that {S}|to {A}) ~", 22),
    ("(set up|create|make) a cron job that runs ~", 8),
    ("(a|) (cron|crontab) (job|line|entry|expression|) (for|to run) ~", 12),
    ("a job that (runs|{S}) ~", 6),
    ("{N} ~", 22),
    ("{N}: ~", 8),
    ("{N}, ~", 4),
    ("{N} (should run|runs|happens|takes place|starts) ~", 14),
    ("(set|put) {N} ~", 5),
    ("(set|create) a reminder ~ to {A}", 5),
    ("set a reminder to {A} ~", 5),
    ("(make sure to|don't forget to|always) {A} ~", 10),
    ("make sure {N} runs ~", 4),
    ("wake me up ~", 4),
    ("(execute|launch|trigger|kick off) {N} ~", 10),
    ("~ (run|start|do) {N}", 6),
    ("~ I want to {A}", 5),
    ("~ please {A}", 6),
    ("it should run ~", 5),
    ("tell me to {A} ~", 5),
    ("ask me to {A} ~", 2),
    ("what is the (cron|crontab) (line|expression|) for ~", 4),
    ("how do I {A} ~", 3),
    ("hey, {A} ~", 3),
    ("my script should run ~", 3),
    ("have the server {A} ~", 3),
    ("get {N} going ~", 2),
    ("let it run ~", 3),
    ("{N} (needs to|must|will|is supposed to) (run|start|happen) ~", 8),
    ("(I|we) {A} ~", 8),
    ("(I'd|we'd|I would|we would) like {N} ~", 4),
    ("(remind|tell|ask) (the team|us|everyone|Anna|my son) to {A} ~", 5),
    ("let's {A} ~", 3),
    ("{N} (is|comes|begins) ~", 4),
    ("~ I {A}", 3),
    ("~ {N}", 5),
    ("(the|our|this) (service|script|program|bot|app) {S} ~", 5),
    ("{A} for me ~", 3),
];
pub const AROUND_HELD_OUT: &[(&str, u32)] = &[
    ("it would be good to {A} ~", 2),
    ("we need to {A} ~", 2),
    ("I have to {A} ~", 2),
    ("please start {N} ~", 2),
    ("would you please {A} ~", 2),
    ("plan {N} ~", 2),
    ("I need this ~", 2),
    ("~ (you should|we) {A}", 2),
    ("help me to {A} ~", 2),
    ("give me a cron line that {S} ~", 1),
    ("{N} has to run ~", 2),
];

/// How the days `{F}` and the time `{T}` stand together.
pub const TIMED: &[(&str, u32)] = &[
    ("{F} at {T}", 60),
    ("at {T} {F}", 50),
    ("{T} {F}", 26),
    ("{F} {T}", 14),
    ("{F}, at {T}", 8),
    ("at {T}, {F}", 10),
    ("{F}, {T}", 7),
    ("{T}, {F}", 7),
    ("{F} @ {T}", 4),
    ("@ {T} {F}", 2),
    ("{F} - {T}", 3),
    ("{T} - {F}", 3),
    ("{F} (exactly at|at exactly) {T}", 3),
    ("exactly at {T} {F}", 2),
    ("{F} at {T} sharp", 2),
    ("{F}: {T}", 2),
    ("at {T} and {F}", 1),
    ("at the time {T} {F}", 1),
];
pub const TIMED_HELD_OUT: &[(&str, u32)] = &[
    ("at {T} sharp {F}", 2),
    ("{F}, always at {T}", 2),
    ("{F} at precisely {T}", 2),
    ("{F}, exactly at {T}", 2),
    ("at {T} - {F}", 1),
    ("{F} at the time {T}", 1),
    ("{F} at {T} on the dot", 2),
];

/// Sentences that part the days from the time.
pub const APART: &[(&str, u32)] = &[
    ("{F} {A} at {T}", 20),
    ("{F}, {A} at {T}", 14),
    ("at {T} {A} {F}", 12),
    ("at {T}, {A} {F}", 6),
    ("(schedule|set) it for {T} {F}", 8),
    ("schedule {N} for {T} {F}", 10),
    ("schedule {N} {F} for {T}", 5),
    ("set (an alarm|a timer|a reminder) for {T} {F}", 10),
    ("{F} (remind me to|please|I want to|I need to) {A} at {T}", 10),
    ("{N} {F}, starts at {T}", 2),
    ("{F} {N} (starts|runs) at {T}", 6),
    ("{F} wake me up at {T}", 3),
    ("at {T} {N} {F}", 3),
    ("{F} there is {N} at {T}", 3),
    ("{A} at {T}, but {F}", 1),
    ("{F} when it is {T}", 2),
    ("when it is {T} {F}", 2),
    ("{F} set (an alarm|a timer|a reminder) for {T}", 3),
];
pub const APART_HELD_OUT: &[(&str, u32)] = &[
    ("set {N} for {T} {F}", 2),
    ("{F} make sure to {A} at {T}", 2),
    ("plan it for {T} {F}", 2),
    ("at {T} please {A} {F}", 2),
    ("{F}, {N} starts at {T}", 1),
];

/// How a repeat `{R}` stands together with days `{F}`, with hours `{H}`, and with both.
pub const REPEAT_DAYS: &[(&str, u32)] = &[
    ("{R} {F}", 60),
    ("{F} {R}", 20),
    ("{F}, {R}", 12),
    ("{R}, {F}", 8),
    ("{R}, but only {F}", 3),
];
pub const REPEAT_HOURS: &[(&str, u32)] =
    &[("{R} {H}", 60), ("{H} {R}", 14), ("{H}, {R}", 12), ("{R}, {H}", 8), ("{R}, only {H}", 2)];
pub const REPEAT_BOTH: &[(&str, u32)] = &[
    ("{R} {H} {F}", 50),
    ("{R} {F} {H}", 16),
    ("{F} {H} {R}", 8),
    ("{F}, {R} {H}", 8),
    ("{F} {R} {H}", 14),
    ("{H} {F} {R}", 4),
    ("{R} {H}, {F}", 10),
    ("{H}, {R} {F}", 4),
];

/// A sentence and whether it asks.
pub struct Frame {
    pub text: String,
    pub question: bool,
}

/// Puts what is to be done into `template`, whose slots for days and times stay open.
pub fn dress(rng: &mut Rng, template: &str) -> Frame {
    let mut text = vary(rng, template);
    if text.contains("{A}") {
        text = fill(&text, "A", &action(rng));
    }
    if text.contains("{S}") {
        text = fill(&text, "S", &action_third_person(rng));
    }
    if text.contains("{N}") {
        text = fill(&text, "N", &event(rng));
    }
    let question = ["can", "could", "would", "what", "how"]
        .iter()
        .any(|word| text.strip_prefix(word).is_some_and(|rest| rest.starts_with(' ')));
    Frame { text, question }
}

/// Capitals and punctuation, as people leave them out or put them in.
pub fn finish(rng: &mut Rng, frame: &Frame) -> String {
    let mut text = tidy(&frame.text);
    match rng.below(100) {
        0..3 if !frame.question && !text.contains("please") => text = format!("please, {text}"),
        3..5 => text.push_str(" please"),
        5..6 => text.push_str(", thanks"),
        _ => {}
    }
    match rng.below(100) {
        0..20 => text = text.to_lowercase(),
        20..60 => text = capitalised(&text),
        _ => {}
    }
    if frame.question && rng.percent(55) {
        text.push('?');
    } else if !text.ends_with('.') && rng.percent(16) {
        text.push('.');
    }
    text
}

pub fn capitalised(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or(String::new(), |first| first.to_uppercase().chain(letters).collect())
}

#[test]
fn no_held_out_frame_is_a_training_one() {
    for (train, held_out) in
        [(AROUND, AROUND_HELD_OUT), (TIMED, TIMED_HELD_OUT), (APART, APART_HELD_OUT)]
    {
        let all = |of: &[(&str, u32)]| {
            of.iter().flat_map(|(t, _)| crate::template::all(t)).collect::<Vec<_>>()
        };
        let train = all(train);
        for template in all(held_out) {
            assert!(!train.contains(&template), "{template}");
        }
    }
}
