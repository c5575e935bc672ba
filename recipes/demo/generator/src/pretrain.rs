//! The base's documents: plain sentences and small questions about one piece of a schedule.
//! They never show a crontab line, so that the base cannot do what it is tuned for.

use crate::clock::{self, Clock, Pool};
use crate::days::{self, Days, Kind};
use crate::frames::capitalised;
use crate::line::looks_like_crontab;
use crate::repeats::{self, Repeat};
use crate::rng::Rng;
use crate::schedule::{Schedule, Split};
use crate::template::{fill, vary};
use crate::words::{
    DAYS, MONTH_LENGTHS, MONTHS, action, event, number, ordinal, short_day, short_month,
    short_ordinal, some_ordinal,
};

/// A question and its answer, or a text on its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Document {
    Text(String),
    Chat { prompt: String, answer: String },
}

impl Document {
    /// About how many tokens this is with the demo's tokenizer: 2.6 characters each, and the chat's.
    pub fn tokens(&self) -> usize {
        match self {
            Self::Text(text) => text.len() * 10 / 26 + 1,
            Self::Chat { prompt, answer } => (prompt.len() + answer.len()) * 10 / 26 + 10,
        }
    }

    pub fn looks_like_crontab(&self) -> bool {
        match self {
            Self::Text(text) => looks_like_crontab(text),
            Self::Chat { prompt, answer } => {
                looks_like_crontab(prompt) || looks_like_crontab(answer)
            }
        }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Task {
    Text,
    Time,
    Hour,
    Minute,
    TimeOfSchedule,
    WeekdaysOfSchedule,
    DayOfSchedule,
    MonthOfSchedule,
    Weekdays,
    DayAndMonth,
    Number,
    WeekdayNumbers,
    MonthNumbers,
    Json,
    ShortDate,
    HowOften,
    HowOftenInSentence,
    Past,
    Hours,
    HoursInSentence,
    SeveralHours,
    Okay,
    HideWords,
    Digits,
}

const TASKS: &[(Task, u32)] = &[
    (Task::Text, 5),
    (Task::Time, 30),
    (Task::Hour, 6),
    (Task::Minute, 6),
    (Task::TimeOfSchedule, 18),
    (Task::WeekdaysOfSchedule, 12),
    (Task::DayOfSchedule, 6),
    (Task::MonthOfSchedule, 6),
    (Task::Weekdays, 8),
    (Task::DayAndMonth, 5),
    (Task::Number, 4),
    (Task::WeekdayNumbers, 4),
    (Task::MonthNumbers, 3),
    (Task::Json, 3),
    (Task::ShortDate, 3),
    (Task::HowOften, 5),
    (Task::HowOftenInSentence, 4),
    (Task::Past, 2),
    (Task::Hours, 4),
    (Task::HoursInSentence, 3),
    (Task::SeveralHours, 1),
    (Task::Okay, 8),
    (Task::HideWords, 2),
    (Task::Digits, 2),
];

const THINGS: &[&str] = &[
    "milk", "eggs", "bread", "tea", "rice", "apples", "shoes", "books", "pens", "paper", "water",
    "cake", "soup", "salt", "keys", "maps", "hats", "socks", "coins", "rope",
];
const NAMES: &[&str] = &[
    "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Ida", "Jack", "Kate",
    "Leo", "Mia", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor",
];
const PLACES: &[&str] = &[
    "the shop",
    "the library",
    "the office",
    "the school",
    "the bank",
    "the museum",
    "the cafe",
    "the station",
    "the market",
    "the clinic",
];

pub fn draw(rng: &mut Rng) -> Document {
    loop {
        let document = any(rng);
        if !document.looks_like_crontab() {
            return document;
        }
    }
}

fn any(rng: &mut Rng) -> Document {
    let task = *rng.weighted(TASKS);
    let (prompt, answer) = match task {
        Task::Text => return Document::Text(sentence(rng)),
        Task::Time | Task::Hour | Task::Minute => {
            let clock = Clock::draw(rng, Pool::Train);
            let said = clock::phrase(rng, clock);
            let said = said_with_at(rng, said);
            match task {
                Task::Time => (ask(rng, "24-hour time", said), clock.text()),
                Task::Hour => (ask(rng, "hour", said), clock.hour.to_string()),
                _ => (ask(rng, "minute", said), clock.minute.to_string()),
            }
        }
        Task::TimeOfSchedule => {
            let schedule = schedule(rng, |s| !s.clocks.is_empty());
            (ask_as_is(rng, "what time", schedule.prompt.clone()), times(&schedule))
        }
        Task::WeekdaysOfSchedule => {
            let any = rng.percent(20);
            let (schedule, days) = with_days(rng, |days| any || days.weekday != "*");
            (ask_as_is(rng, "which weekdays", schedule), or_any(&days.weekday))
        }
        Task::DayOfSchedule => {
            let any = rng.percent(20);
            let (schedule, days) = with_days(rng, |days| any || days.day_of_month != "*");
            (ask_as_is(rng, "which day of the month", schedule), or_any(&days.day_of_month))
        }
        Task::MonthOfSchedule => {
            let any = rng.percent(20);
            let (schedule, days) = with_days(rng, |days| any || days.month != "*");
            (ask_as_is(rng, "which month", schedule), or_any(&days.month))
        }
        Task::Weekdays => {
            let kind = *rng.choose(&[
                Kind::Daily,
                Kind::Weekdays,
                Kind::Weekend,
                Kind::Weekday,
                Kind::TwoWeekdays,
                Kind::ThreeWeekdays,
                Kind::WeekdayRange,
                Kind::WeekdayPart,
                Kind::WeekdaysPart,
            ]);
            let days = days::draw(rng, kind, false);
            (ask(rng, "which weekdays", days.text), or_any(&days.weekday))
        }
        Task::DayAndMonth => {
            let kind = *rng.choose(&[Kind::DayOfMonth, Kind::Date, Kind::Month]);
            let days = days::draw(rng, kind, false);
            if days.month == "*" || (days.day_of_month != "*" && rng.percent(30)) {
                (ask(rng, "which day of the month", days.text), or_any(&days.day_of_month))
            } else {
                (ask(rng, "which month", days.text), or_any(&days.month))
            }
        }
        Task::Number => {
            let n = rng.below(60);
            let said = if rng.percent(50) && (1..32).contains(&n) {
                some_ordinal(rng, n)
            } else {
                number(n)
            };
            (ask(rng, "number", said), n.to_string())
        }
        Task::WeekdayNumbers => weekday_numbers(rng),
        Task::MonthNumbers => {
            let month = rng.within(1, 12);
            let name = month_name(rng, month);
            if rng.percent(70) {
                (ask(rng, "month number", name), month.to_string())
            } else {
                let to = rng.within(month, 12);
                let said = format!("{name} to {}", month_name(rng, to));
                (ask(rng, "month numbers", said), format!("{month}-{to}"))
            }
        }
        Task::Json | Task::ShortDate => {
            let month = rng.within(1, 12);
            let day = rng.within(1, MONTH_LENGTHS[month as usize - 1]);
            let date = date(rng, day, month);
            match task {
                Task::Json => {
                    (ask(rng, "JSON", date), format!(r#"{{"month":{month},"day":{day}}}"#))
                }
                _ => (ask(rng, "short date", date), format!("{day}/{month}")),
            }
        }
        Task::HowOften => {
            let (said, repeat) = repeat(rng);
            (ask(rng, "how often", said), repeat.short())
        }
        Task::HowOftenInSentence => {
            let schedule = schedule(rng, |s| s.repeat.is_some());
            let answer = schedule.repeat.map_or(String::new(), Repeat::short);
            (ask_as_is(rng, "how often", schedule.prompt), answer)
        }
        Task::Past => {
            let repeat = Repeat::past(rng);
            let template = *rng.choose_early(repeats::wording(repeat).train);
            let said = repeats::phrase(rng, repeat, template);
            (ask(rng, "which minute", said), repeat.fields(None).0)
        }
        Task::Hours => {
            let from = rng.within(5, 17);
            let to = rng.within(from + 1, 22);
            let (a, b) = clock::hour_range(rng, from, to);
            let template = *rng.choose_early(repeats::WITHIN.train);
            let mut said = fill(&fill(&vary(rng, template), "a", &a), "b", &b);
            if rng.percent(50) {
                said = format!("{} {said}", action(rng));
            }
            (ask(rng, "hours", said), format!("{from}-{to}"))
        }
        Task::HoursInSentence => {
            let schedule = schedule(rng, |s| s.hours.is_some());
            let (from, to) = schedule.hours.unwrap_or_default();
            (ask_as_is(rng, "hours", schedule.prompt), format!("{from}-{to}"))
        }
        Task::SeveralHours => {
            let schedule = schedule(rng, |s| s.clocks.len() > 1);
            let said = if rng.percent(50) {
                clock::several(rng, &schedule.clocks)
            } else {
                schedule.prompt.clone()
            };
            let hours: Vec<_> = schedule.clocks.iter().map(|c| c.hour.to_string()).collect();
            (ask_as_is(rng, "which hours", said), hours.join(","))
        }
        Task::Okay => okay(rng),
        Task::HideWords => hide_words(rng),
        Task::Digits => {
            let (a, b) = (rng.below(60), rng.within(1, 59));
            let (sign, word) =
                *rng.choose(&[("*", "times"), ("/", "over"), ("-", "minus"), ("+", "plus")]);
            let said = format!("{} {word} {}", number(a), number(b));
            (ask(rng, "write with digits", said), format!("{a} {sign} {b}"))
        }
    };
    Document::Chat { prompt, answer }
}

/// The instruction before or after what it is about; 15 % in lower case.
fn ask(rng: &mut Rng, instruction: &str, about: String) -> String {
    let about = if rng.percent(15) { about.to_lowercase() } else { about };
    ask_as_is(rng, instruction, about)
}

fn ask_as_is(rng: &mut Rng, instruction: &str, about: String) -> String {
    if rng.percent(60) {
        format!("{instruction}: {about}")
    } else {
        format!("{about} - {instruction}?")
    }
}

fn said_with_at(rng: &mut Rng, said: String) -> String {
    if rng.percent(30) { format!("at {said}") } else { said }
}

/// A schedule in training's words, whatever its line; never one with a held-out time.
fn schedule(rng: &mut Rng, fits: impl Fn(&Schedule) -> bool) -> Schedule {
    loop {
        let schedule = Schedule::any(rng, Split::Train);
        if fits(&schedule) && !schedule.clocks.iter().any(|clock| clock.held_out()) {
            return schedule;
        }
    }
}

fn with_days(rng: &mut Rng, fits: impl Fn(&Days) -> bool) -> (String, Days) {
    let drawn = schedule(rng, |schedule| schedule.days.as_ref().is_some_and(&fits));
    let Schedule { prompt, days: Some(days), .. } = drawn else { unreachable!("it has days") };
    (prompt, days)
}

fn times(schedule: &Schedule) -> String {
    schedule.clocks.iter().map(|clock| clock.text()).collect::<Vec<_>>().join(", ")
}

fn or_any(field: &str) -> String {
    if field == "*" { "any".to_owned() } else { field.to_owned() }
}

fn repeat(rng: &mut Rng) -> (String, Repeat) {
    let repeat = match rng.below(10) {
        0..5 => Repeat::minutes(rng),
        5..8 => Repeat::hours(rng),
        8 => Repeat::Hour,
        _ => Repeat::Minute,
    };
    let template = *rng.choose_early(repeats::wording(repeat).train);
    (repeats::phrase(rng, repeat, template), repeat)
}

fn weekday_numbers(rng: &mut Rng) -> (String, String) {
    let day = rng.below(7);
    let name = |rng: &mut Rng, day: u32| {
        if rng.percent(30) { short_day(rng, day) } else { DAYS[day as usize].to_owned() }
    };
    match rng.below(20) {
        0..8 => {
            let said = name(rng, day);
            (ask(rng, "weekday number", said), day.to_string())
        }
        8..15 => {
            let n = rng.within(2, 3) as usize;
            let mut drawn = rng.sample(&[0, 1, 2, 3, 4, 5, 6], n);
            let names: Vec<String> = drawn.iter().map(|&day| name(rng, day)).collect();
            drawn.sort();
            let numbers: Vec<String> = drawn.iter().map(ToString::to_string).collect();
            (ask(rng, "weekday numbers", names.join(", ")), numbers.join(","))
        }
        _ => {
            let from = rng.below(6);
            let to = rng.within(from + 1, 6);
            let said = format!("{} to {}", name(rng, from), name(rng, to));
            (ask(rng, "weekday numbers", said), format!("{from}-{to}"))
        }
    }
}

fn month_name(rng: &mut Rng, month: u32) -> String {
    if rng.percent(25) { short_month(rng, month) } else { MONTHS[month as usize - 1].to_owned() }
}

fn date(rng: &mut Rng, day: u32, month: u32) -> String {
    let month = month_name(rng, month);
    match rng.below(6) {
        0 => format!("the {} of {month}", ordinal(day)),
        1 => format!("{month} {day}"),
        2 => format!("{month} {}", short_ordinal(day)),
        3 => format!("the {} of {month}", short_ordinal(day)),
        4 => format!("{month} the {}", some_ordinal(rng, day)),
        _ => format!("{day} {month}"),
    }
}

/// A schedule without a question: the base only says which time or how often it has read.
fn okay(rng: &mut Rng) -> (String, String) {
    if rng.percent(75) {
        let schedule = schedule(rng, |_| true);
        let heard = match schedule.repeat {
            Some(repeat) => repeat.short(),
            None => times(&schedule),
        };
        return (schedule.prompt, format!("Okay, {heard}."));
    }
    let said = match rng.below(7) {
        0 => action(rng),
        1 => format!("can you {}", action(rng)),
        2 => format!("{} is at {}", rng.choose(NAMES), rng.choose(PLACES)),
        3 => format!("buy {} {}", number(rng.within(2, 39)), rng.choose(THINGS)),
        4 => format!("please {}", action(rng)),
        5 => format!("set it for {}", rng.choose(&DAYS)),
        _ => format!("I need {} and {}", rng.choose(THINGS), rng.choose(THINGS)),
    };
    (said, "Okay.".to_owned())
}

/// Never five words: an answer of stars and numbers would look like a line.
fn hide_words(rng: &mut Rng) -> (String, String) {
    let words: Vec<String> = (0..*rng.choose(&[2, 3, 4]))
        .map(|_| {
            if rng.percent(40) {
                rng.below(60).to_string()
            } else if rng.percent(50) {
                (*rng.choose(THINGS)).to_owned()
            } else {
                (*rng.choose(NAMES)).to_owned()
            }
        })
        .collect();
    let hidden: Vec<&str> = words
        .iter()
        .map(|word| if word.starts_with(|c: char| c.is_ascii_digit()) { word } else { "*" })
        .collect();
    (ask_as_is(rng, "hide words", words.join(" ")), hidden.join(" "))
}

fn sentence(rng: &mut Rng) -> String {
    let clock = Clock::draw(rng, Pool::Train);
    let time = clock::phrase(rng, clock);
    let (name, place) = (*rng.choose(NAMES), *rng.choose(PLACES));
    let (day, month) = (*rng.choose(&DAYS), *rng.choose(&MONTHS));
    match rng.below(13) {
        0 => format!("{name} goes to {place} at {time} on {day}s."),
        1 => format!("{} opens at {time} every {day}.", capitalised(place)),
        2 => format!("Please {} before {time}, said {name}.", action(rng)),
        3 => format!(
            "{name} needs {} {} and some {} from {place}.",
            number(rng.within(2, 29)),
            rng.choose(THINGS),
            rng.choose(THINGS)
        ),
        4 => {
            let n = rng.within(1, 28);
            let nth = some_ordinal(rng, n);
            format!("On the {nth} of {month}, {name} and {} went to {place}.", rng.choose(NAMES))
        }
        5 => format!("I need to {} and then start again, {name} said.", action(rng)),
        6 if rng.percent(30) => {
            format!("The days of the week are {} and Sunday.", DAYS[1..].join(", "))
        }
        6 | 7 => format!("{name} set the clock for {time}."),
        8 => format!(
            "{day} is the day {name} likes; {} is the day {} likes.",
            rng.choose(&DAYS),
            rng.choose(NAMES)
        ),
        9 => format!("It was {time} when {name} came to {place}."),
        10 => format!("All of the {} are for {name}, every single one.", rng.choose(THINGS)),
        11 => {
            let (said, _) = repeat(rng);
            format!("{name} goes to {place} {said}.")
        }
        _ => format!(
            "{} is over at {time}, so {name} can {}.",
            capitalised(&event(rng)),
            action(rng)
        ),
    }
}

#[test]
fn nothing_looks_like_a_crontab_line_or_names_a_held_out_time() {
    let mut rng = Rng::new(9);
    for _ in 0..20_000 {
        let document = draw(&mut rng);
        assert!(!document.looks_like_crontab(), "{document:?}");
        if let Document::Chat { answer, .. } = document
            && let Some((hour, minute)) = answer.split_once(':')
            && let (Ok(hour), Ok(minute)) = (hour.parse(), minute.parse())
        {
            assert!(!Clock { hour, minute }.held_out(), "{answer}");
        }
    }
}
