//! Schedules that repeat within a day, and how people say them.
//! They do not know on which days.

use crate::day_words::Wording;
use crate::rng::Rng;
use crate::template::{fill, vary};
use crate::words::{number, short_ordinal, some_number};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Repeat {
    Minutes(u32),
    Hours(u32),
    Minute,
    Hour,
    /// So many minutes past every hour.
    Past(u32),
}

/// The steps that divide an hour, and those that divide a day.
pub const MINUTES: [u32; 10] = [2, 3, 4, 5, 6, 10, 12, 15, 20, 30];
pub const HOURS: [u32; 6] = [2, 3, 4, 6, 8, 12];

impl Repeat {
    pub fn minutes(rng: &mut Rng) -> Self {
        Self::Minutes(if rng.percent(50) {
            *rng.choose(&[5, 10, 15, 20, 30])
        } else {
            *rng.choose(&MINUTES)
        })
    }

    pub fn hours(rng: &mut Rng) -> Self {
        Self::Hours(*rng.choose(&HOURS))
    }

    pub fn past(rng: &mut Rng) -> Self {
        Self::Past(if rng.percent(50) { rng.within(1, 59) } else { 5 * rng.within(1, 11) })
    }

    /// The line's minutes and hours; `hours` is the span that it stays within.
    pub fn fields(self, hours: Option<(u32, u32)>) -> (String, String) {
        let span = hours.map_or("*".to_owned(), |(from, to)| format!("{from}-{to}"));
        match self {
            Self::Minutes(step) => (format!("*/{step}"), span),
            Self::Hours(step) => ("0".to_owned(), format!("{span}/{step}")),
            Self::Minute => ("*".to_owned(), span),
            Self::Hour => ("0".to_owned(), span),
            Self::Past(minute) => (minute.to_string(), span),
        }
    }

    /// `30 minutes`, as a short answer.
    pub fn short(self) -> String {
        match self {
            Self::Minutes(step) => format!("{step} minutes"),
            Self::Hours(step) => format!("{step} hours"),
            Self::Minute => "1 minute".to_owned(),
            Self::Hour | Self::Past(_) => "1 hour".to_owned(),
        }
    }
}

pub fn wording(repeat: Repeat) -> Wording {
    let (train, held_out): (&[&str], &[&str]) = match repeat {
        Repeat::Minutes(_) => (
            &[
                "every {n} (minutes|minutes|minutes|mins|min)",
                "once every {n} minutes",
                "every {n} minutes",
                "each {n} minutes",
                "(at|in) intervals of {n} minutes",
                "at {n}(-| )minute intervals",
                "every {o} minute",
                "repeatedly every {n} minutes",
                "once in {n} minutes",
                "{half}",
                "{half}",
                "every {n}m",
            ],
            &[
                "one time every {n} minutes",
                "once (each|per) {n} minutes",
                "on every {o} minute",
                "with an interval of {n} minutes",
                "after every {n} minutes",
            ],
        ),
        Repeat::Hours(_) => (
            &[
                "every {n} (hours|hours|hours|hrs)",
                "once every {n} hours",
                "every {n} hours",
                "each {n} hours",
                "(at|in) intervals of {n} hours",
                "at {n}(-| )hour intervals",
                "every {o} hour",
                "every {o} hour",
                "repeatedly every {n} hours",
                "once in {n} hours",
                "every {n}h",
                "every {n} hours on the hour",
            ],
            &[
                "one time every {n} hours",
                "once (each|per) {n} hours",
                "on every {o} hour",
                "with an interval of {n} hours",
                "after every {n} hours",
            ],
        ),
        Repeat::Minute => (
            &[
                "every minute",
                "each minute",
                "once (a|per) minute",
                "every (1|one) minute",
                "every minute of (the|every) day",
                "minute by minute",
                "every minute of every hour",
            ],
            &["once every minute", "every single minute", "on every minute", "once each minute"],
        ),
        Repeat::Hour => (
            &[
                "(every|each) hour",
                "hourly",
                "once (an|per) hour",
                "on the hour",
                "every hour on the hour",
                "(at|on) the top of (every|each|the) hour",
                "every 60 minutes",
                "at the (start|beginning) of (every|each) hour",
                "on an hourly basis",
                "every full hour",
                "at minute (0|zero) of every hour",
                "every (1|one) hour",
                "every hour of the day",
                "one time per hour",
                "24 times a day",
            ],
            &[
                "once every hour",
                "every single hour",
                "each hour on the hour",
                "on every hour",
                "at the start of an hour",
                "every hour, on the hour",
                "once each hour",
            ],
        ),
        Repeat::Past(_) => (
            &[
                "at {m} minutes past (every|each|the) hour",
                "{m} (minutes|) past (every|each) hour",
                "every hour at {m} minutes past",
                "at {m} past (every|the|each) hour",
                "at {q} every hour",
                "at minute {m} of (every|each) hour",
                "hourly at minute {m}",
                "(every|each) hour at :{mm}",
                "{m} minutes after (every|each|the) hour",
                "every hour at minute {m}",
                "on minute {m} of each hour",
                "at :{mm} (of|past|) every hour",
                "(every|each) hour, {m} minutes past",
                "hourly at :{mm}",
                "hourly(,|) at {m} (minutes|) past",
                "at {q} (each|the) hour",
                "{q} every hour",
                "{m} minutes past the hour",
                "every hour at {m} past",
                "at {m} minutes past the hour, every hour",
                "{b} minutes (to|before) (every|each|the) hour",
                "at {b} minutes to every hour",
            ],
            &[
                "at {m} minutes after every hour",
                "on minute {m} of every hour",
                "at {b} minutes before each hour",
                "every hour, at {m} past the hour",
                "once an hour at {m} minutes past",
                "at {m} past, every hour",
            ],
        ),
    };
    Wording { train, held_out }
}

pub fn phrase(rng: &mut Rng, repeat: Repeat, template: &str) -> String {
    let text = vary(rng, template);
    match repeat {
        Repeat::Minutes(step) => {
            let other = format!("every {step} minutes");
            let half = match step {
                30 => *rng.choose(&[
                    "every half hour",
                    "every half an hour",
                    "twice an hour",
                    "two times an hour",
                    "half-hourly",
                    "every 1/2 hour",
                    "each half hour",
                ]),
                20 => *rng.choose(&["three times an hour", other.as_str()]),
                15 => *rng.choose(&[
                    "every quarter of an hour",
                    "every quarter hour",
                    "four times an hour",
                    "every quarter-hour",
                ]),
                10 => *rng.choose(&["six times an hour", other.as_str()]),
                _ => &other,
            };
            stepped(rng, &fill(&text, "half", half), step)
        }
        Repeat::Hours(step) => stepped(rng, &text, step),
        Repeat::Minute | Repeat::Hour => text,
        Repeat::Past(minute) => {
            let quarter = match minute {
                15 => rng.choose(&["quarter past", "a quarter past"]).to_string(),
                30 => "half past".to_owned(),
                45 => rng.choose(&["quarter to", "a quarter to"]).to_string(),
                40.. if rng.percent(50) => format!("{} to", some_number(rng, 60 - minute)),
                _ => format!("{} past", some_number(rng, minute)),
            };
            let text = fill(&text, "q", &quarter);
            let text = fill(&text, "mm", &format!("{minute:02}"));
            let text = fill(&text, "b", &some_number(rng, 60 - minute));
            fill(&text, "m", &some_number(rng, minute))
        }
    }
}

/// `{n}` as a number and `{o}` as in "every other" or "every third".
fn stepped(rng: &mut Rng, text: &str, step: u32) -> String {
    let nth = match step {
        2 => (*rng.choose(&["other", "other", "second", "2nd"])).to_owned(),
        _ if rng.percent(30) => short_ordinal(step),
        _ => crate::words::ordinal(step),
    };
    let n = if rng.percent(40) && !text.contains("}m") && !text.contains("}h") {
        number(step)
    } else {
        step.to_string()
    };
    fill(&fill(text, "o", &nth), "n", &n)
}

/// `from {a} to {b}`: within which hours.
pub const WITHIN: Wording = Wording {
    train: &[
        "from {a} to {b}",
        "between {a} and {b}",
        "from {a} (until|till|through) {b}",
        "{a} to {b}",
        "between the hours of {a} and {b}",
        "{a}-{b}",
        "{a} - {b}",
        "from {a} to {b}",
        "between {a} and {b}",
        "starting at {a} and ending at {b}",
        "during the hours {a} to {b}",
    ],
    held_out: &["from {a} up to {b}", "in the hours from {a} to {b}", "from {a} and until {b}"],
};

#[test]
fn no_held_out_repeat_is_a_training_one() {
    for repeat in
        [Repeat::Minutes(5), Repeat::Hours(2), Repeat::Minute, Repeat::Hour, Repeat::Past(7)]
    {
        let all = |of: &[&str]| of.iter().flat_map(|t| crate::template::all(t)).collect::<Vec<_>>();
        let train = all(wording(repeat).train);
        for template in all(wording(repeat).held_out) {
            assert!(!train.contains(&template), "{template}");
        }
    }
}
