//! Which days, and how people say them.
//! It does not know about times of day, only that "every morning" says half of one.

use crate::rng::Rng;
use crate::template::{fill, vary};
use crate::words::{
    DAYS, MONTH_LENGTHS, MONTHS, short_day, short_month, some_number, some_ordinal,
};

/// Training's templates and the ones only the held-out rows use.
pub struct Wording {
    pub train: &'static [&'static str],
    pub held_out: &'static [&'static str],
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
pub enum Kind {
    Daily,
    Weekdays,
    Weekend,
    Weekday,
    TwoWeekdays,
    ThreeWeekdays,
    WeekdayRange,
    Except,
    DayOfMonth,
    TwoDaysOfMonth,
    EveryFewDays,
    Date,
    Holiday,
    EveryFewMonths,
    Month,
    MonthRange,
    WeekdayInMonth,
    PartOfDay,
    WeekdayPart,
    WeekdaysPart,
}

/// A part of the day that the phrase of the days names itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Part {
    pub name: &'static str,
    pub first_hour: u32,
    pub last_hour: u32,
}

const PARTS: [Part; 4] = [
    Part { name: "morning", first_hour: 4, last_hour: 11 },
    Part { name: "afternoon", first_hour: 12, last_hour: 17 },
    Part { name: "evening", first_hour: 17, last_hour: 21 },
    Part { name: "night", first_hour: 19, last_hour: 23 },
];

/// A phrase and the last three fields of the line.
#[derive(Clone, Debug)]
pub struct Days {
    pub template: String,
    pub text: String,
    pub day_of_month: String,
    pub month: String,
    pub weekday: String,
    pub part: Option<Part>,
}

pub const WEIGHTS: &[(Kind, u32)] = &[
    (Kind::Daily, 90),
    (Kind::Weekdays, 90),
    (Kind::Weekend, 50),
    (Kind::Weekday, 165),
    (Kind::TwoWeekdays, 90),
    (Kind::ThreeWeekdays, 55),
    (Kind::WeekdayRange, 75),
    (Kind::Except, 25),
    (Kind::DayOfMonth, 95),
    (Kind::TwoDaysOfMonth, 35),
    (Kind::EveryFewDays, 25),
    (Kind::Date, 95),
    (Kind::Holiday, 10),
    (Kind::EveryFewMonths, 35),
    (Kind::Month, 30),
    (Kind::MonthRange, 30),
    (Kind::WeekdayInMonth, 40),
    (Kind::PartOfDay, 30),
    (Kind::WeekdayPart, 30),
    (Kind::WeekdaysPart, 12),
];

pub fn wording(kind: Kind) -> Wording {
    let (train, held_out): (&[&str], &[&str]) = match kind {
        Kind::Daily => (
            &[
                "(every|each) day",
                "daily",
                "every day",
                "(once a|once every|once per) day",
                "every day of the week",
                "(seven|7) days a week",
                "all week long",
                "on any day",
                "everyday",
                "on a daily basis",
                "(once|one time) daily",
                "day after day",
                "each day of the week",
                "(every|each) day, weekends included",
                "Monday to Sunday",
                "every day all year",
                "each and every day",
                "all days of the week",
            ],
            &["every single day", "on each day", "all days", "on all days", "on every day"],
        ),
        Kind::Weekdays => (
            &[
                "(every|each) weekday",
                "(on|) weekdays",
                "(|on |from |every )Monday to Friday",
                "(on|on all|all|) (workdays|working days)",
                "(every|each) (workday|working day)",
                "(on each|on all|all) weekdays",
                "(from|) Monday (through|thru|till|until) Friday",
                "(|on |every )(Mon-Fri|Mon - Fri|Mon to Fri|Monday-Friday|M-F)",
                "weekdays only",
                "only on (weekdays|workdays)",
                "on business days",
                "(every|each) business day",
                "(|every day )except (weekends|on weekends)",
                "every day except Saturday and Sunday",
                "every day but not on weekends",
                "(during|in) the (work week|working week)",
                "not on weekends",
                "five days a week, Monday to Friday",
                "(|every day )excluding weekends",
                "between Monday and Friday",
                "(Mon through Fri|Mon thru Fri)",
                "on weekdays (but|and) not on weekends",
            ],
            &[
                "each day from Monday to Friday",
                "on (every|any) weekday",
                "on every (workday|working day)",
                "all business days",
                "every day other than weekends",
                "on weekdays only",
            ],
        ),
        Kind::Weekend => (
            &[
                "every weekend",
                "(at|on|over) (|the )weekends",
                "weekends",
                "on the weekend",
                "(|on )Saturdays and Sundays",
                "(|on |every )(Saturday|Sat) (and|&) (Sunday|Sun)",
                "over the weekend",
                "weekends only",
                "only (on|at) weekends",
                "on weekend days",
                "on (Sat|Saturday) and (Sun|Sunday)",
                "(Sat/Sun|Sat, Sun|Sat & Sun)",
                "every Saturday and every Sunday",
                "on both Saturday and Sunday",
                "but only on weekends",
                "each Saturday and Sunday",
                "(every|each) weekend day",
            ],
            &[
                "each weekend",
                "on every weekend",
                "on all weekends",
                "both days of the weekend",
                "on Saturday as well as Sunday",
            ],
        ),
        Kind::Weekday => (
            &[
                "(every|each) {D}",
                "every {D}",
                "(on |){D}s",
                "on {D}",
                "on {D}s",
                "{D}",
                "(once a week|every week|each week|weekly) on {D}",
                "(|on ){D} (every|each) week",
                "weekly on {D}s",
                "only on {D}s",
                "{D}s only",
                "on a {D}",
                "on the {D} of every week",
                "weekly, on {D}",
                "once a week, on {D}s",
                "when it is {D}",
                "each week on {D}s",
                "on {D} of each week",
                "every week, on {D}",
                "one day a week, on {D}",
            ],
            &[
                "on (every|each) {D}",
                "every single {D}",
                "every week on {D}s",
                "on all {D}s",
                "once per week on {D}",
                "once a week each {D}",
            ],
        ),
        Kind::TwoWeekdays => (
            &[
                "(on |){D}s (and|&) {E}s",
                "(every|each|on|) {D} (and|&) {E}",
                "every {D} and {E}",
                "(every|each) week on {D} and {E}",
                "every {D} and every {E}",
                "on {D} and on {E}",
                "twice a week(,|) on {D} and {E}",
                "{D}/{E}",
                "on both {D} and {E}",
                "(on |){D}, {E}",
                "twice a week, {D}s and {E}s",
                "only on {D} and {E}",
                "on {D}s and also on {E}s",
                "two days a week, {D} and {E}",
                "weekly on {D} and {E}",
            ],
            &[
                "on every {D} and {E}",
                "on each {D} and {E}",
                "on {D} as well as {E}",
                "each {D} and each {E}",
                "both on {D}s and {E}s",
                "every week on {D}s and {E}s",
            ],
        ),
        Kind::ThreeWeekdays => (
            &[
                "(on |){D}s, {E}s(,|) and {G}s",
                "(every|on|) {D}, {E}(,|) and {G}",
                "{D}, {E}, {G}",
                "each week on {D}, {E} and {G}",
                "{D}/{E}/{G}",
                "on {D}, {E} & {G}",
                "{D}, {E} and {G}",
                "three (times|days) a week(,|) on {D}, {E} and {G}",
                "every {D}, every {E} and every {G}",
                "(on|every) {D} and {E} and {G}",
                "every {D}, {E}, {G}",
                "only on {D}, {E} and {G}",
            ],
            &[
                "each {D}, {E} and {G}",
                "on every {D}, {E} and {G}",
                "weekly on {D}, {E} and {G}",
                "(on|) {D}s and {E}s and {G}s",
                "three days each week: {D}, {E} and {G}",
            ],
        ),
        Kind::WeekdayRange => (
            &[
                "(from|on|) {D} to {E}",
                "(from|) {D} (through|thru|until|till) {E}",
                "{D}-{E}",
                "between {D} and {E}",
                "every day from {D} to {E}",
                "{D} - {E}",
                "{D}s to {E}s",
                "every week from {D} to {E}",
                "daily(,|) {D} to {E}",
                "every {D} to {E}",
                "(each|every) day between {D} and {E}",
                "{D} through {E}",
            ],
            &[
                "every day from {D} (through|until) {E}",
                "daily from {D} to {E}",
                "on {D} through {E}",
                "each week from {D} to {E}",
                "on all days from {D} to {E}",
            ],
        ),
        Kind::Except => (
            &[
                "every day except (|on ){D}",
                "every day but {D}",
                "daily except {D}s",
                "except {D}s",
                "(each|any) day except {D}",
                "every day except {D}s",
                "every day but not on {D}s",
                "all days except {D}",
            ],
            &["each day but {D}", "daily except on {D}s", "on all days but {D}"],
        ),
        Kind::DayOfMonth => (
            &[
                "on the {o} of (every|each|the) month",
                "on the {o}",
                "(every|each) month on the {o}",
                "on day {n} of (every|each|the) month",
                "(monthly|once a month) on the {o}",
                "the {o} of (each|the) month",
                "every {o} of the month",
                "monthly, on the {o}",
                "on the {o} (every|each) month",
                "every month on day {n}",
                "on the {o} day of (each|the) month",
                "the {o} day of (every|the) month",
                "(every|each) month, on the {o}",
                "{o} of (every|each) month",
                "(once a month|monthly) on day {n}",
                "on the {o} of the month, every month",
                "monthly on the {o}",
                "when it is the {o} of the month",
                "on a monthly basis on the {o}",
                "on the {o} monthly",
            ],
            &[
                "the {o} of every month",
                "on each {o} of the month",
                "on the {o} day of every month",
                "once every month on the {o}",
                "each month on day {n}",
                "once per month on the {o}",
            ],
        ),
        Kind::TwoDaysOfMonth => (
            &[
                "on the {o} and (|the ){p}",
                "on the {o} and (|the ){p} of (every|each|the) month",
                "twice a month(,|) on the {o} and (|the ){p}",
                "every month on the {o} and {p}",
                "monthly on the {o} and {p}",
                "on days {n} and {m} of (each|the) month",
                "the {o} and {p} of each month",
            ],
            &[
                "each month on the {o} and the {p}",
                "two times a month, on the {o} and {p}",
                "on the {o} and on the {p} of every month",
            ],
        ),
        Kind::EveryFewDays => (
            &[
                "every {n} days",
                "once every {n} days",
                "every {o} day",
                "each {o} day",
                "every {n} days of the month",
            ],
            &["on every {o} day", "one time every {n} days"],
        ),
        Kind::Date => (
            &[
                "(every|each) year on {M} {n}",
                "on {M} {o}",
                "on the {o} of {M}",
                "every {o} of {M}",
                "(every|each) year on the {o} of {M}",
                "on {n} {M}",
                "once a year on the {o} of {M}",
                "(yearly|annually) on {M} {n}",
                "on {M} {n}",
                "every {M} {o}",
                "{M} {o}",
                "on {M} the {o}",
                "(annually|yearly) on the {o} of {M}",
                "on the {o} day of {M}",
                "every {n} {M}",
                "on {n} {M} (every|each) year",
                "on {M} {n} every year",
                "every year, on {M} {o}",
                "once a year, on {M} {n}",
                "every {M} {n}",
                "on the {o} of {M} every year",
            ],
            &[
                "each year on {M} the {o}",
                "once a year on {M} {o}",
                "every year on {n} {M}",
                "once every year on the {o} of {M}",
                "on {M} {o} each year",
            ],
        ),
        Kind::Holiday => (
            &["on {X}", "every {X}", "every year on {X}", "each {X}"],
            &["once a year on {X}", "on {X} every year"],
        ),
        Kind::EveryFewMonths => (
            &[
                "every {k} months on the {o}",
                "on the {o} of every {kth} month",
                "every {kth} month on the {o}",
                "every {k} months, on the {o}",
                "on the {o}(,|) every {k} months",
                "once every {k} months on the {o}",
                "on day {n} of every {kth} month",
            ],
            &["on the {o} day of every {kth} month", "on the {o} once every {k} months"],
        ),
        Kind::Month => (
            &[
                "(every|each) day in {M}",
                "(daily|every day) (in|throughout|during) {M}",
                "(in|during) {M}, every day",
                "once a day in {M}",
                "in {M}",
                "every day of {M}",
                "throughout {M}",
                "during {M}",
                "only in {M}",
                "all through {M}",
                "in {M} every day",
                "(in|for) the month of {M}",
            ],
            &["each day (of|during) {M}", "on every day of {M}", "on all days in {M}"],
        ),
        Kind::MonthRange => (
            &[
                "from {M} (to|through|until) {N}",
                "between {M} and {N}",
                "{M} (to|through) {N}",
                "every day from {M} to {N}",
                "daily from {M} (to|through) {N}",
                "{M}-{N}",
                "(every|each) day between {M} and {N}",
                "in the months {M} to {N}",
                "from {M} till {N}, every day",
            ],
            &[
                "each day from {M} to {N}",
                "daily between {M} and {N}",
                "every day from {M} until {N}",
            ],
        ),
        Kind::WeekdayInMonth => (
            &[
                "every {D} in {M}",
                "on {D}s in {M}",
                "{D}s in {M}",
                "on {D} in {M}",
                "(in|during) {M} on {D}s",
                "on {D}s (of|during) {M}",
                "in {M}, every {D}",
                "every {D} of {M}",
                "each {D} (during|in) {M}",
                "(on|) weekdays in {M}",
                "(every|each) weekday in {M}",
                "on weekends in {M}",
            ],
            &[
                "on every {D} in {M}",
                "every {D} during {M}",
                "on weekdays during {M}",
                "in {M} each {D}",
            ],
        ),
        Kind::PartOfDay => (
            &[
                "(every|each) {P}",
                "in the {P} every day",
                "daily in the {P}",
                "every day in the {P}",
                "every {P}",
                "nightly",
            ],
            &["each day in the {P}", "every single {P}"],
        ),
        Kind::WeekdayPart => (
            &[
                "(on|every|each|) {D} {P}",
                "(on|) {D} {P}s",
                "every {D} in the {P}",
                "on {D}s in the {P}",
            ],
            &["on every {D} {P}", "each {D} in the {P}"],
        ),
        Kind::WeekdaysPart => (
            &[
                "(on|) weekday {P}s",
                "every weekday {P}",
                "every (weekday|workday) in the {P}",
                "on weekdays in the {P}",
                "on weekend {P}s",
                "every weekend {P}",
                "on weekends in the {P}",
            ],
            &["each weekday {P}", "on every weekend {P}", "each weekday in the {P}"],
        ),
    };
    Wording { train, held_out }
}

pub fn draw(rng: &mut Rng, kind: Kind, held_out: bool) -> Days {
    let wording = wording(kind);
    let template = rng.choose(if held_out { wording.held_out } else { wording.train });
    from_template(rng, kind, template)
}

pub fn from_template(rng: &mut Rng, kind: Kind, template: &str) -> Days {
    let text = vary(rng, template);
    let star = || "*".to_owned();
    let mut days = Days {
        template: template.to_owned(),
        text,
        day_of_month: star(),
        month: star(),
        weekday: star(),
        part: None,
    };
    match kind {
        Kind::Daily => {}
        Kind::Weekdays => days.weekday = "1-5".to_owned(),
        Kind::Weekend => days.weekday = "0,6".to_owned(),
        Kind::Weekday => weekday(rng, &mut days),
        Kind::TwoWeekdays => weekdays(rng, &mut days, 2),
        Kind::ThreeWeekdays => weekdays(rng, &mut days, 3),
        Kind::WeekdayRange => {
            let from = *rng.choose(&[0, 1, 1, 1, 2, 2, 3, 3, 4, 5]);
            let to = rng.within(from + 1, 6);
            name_days(rng, &mut days, &[from, to]);
            days.weekday = format!("{from}-{to}");
        }
        Kind::Except => {
            let day = *rng.choose(&[0, 0, 0, 6, 6, 1, 2, 3, 4, 5]);
            name_days(rng, &mut days, &[day]);
            days.weekday = match day {
                0 => "1-6".to_owned(),
                6 => "0-5".to_owned(),
                _ => list((0..7).filter(|&other| other != day)),
            };
        }
        Kind::DayOfMonth => {
            let day = if rng.percent(20) { *rng.choose(&[1, 15]) } else { rng.within(1, 31) };
            ordinals(rng, &mut days, &[day]);
        }
        Kind::TwoDaysOfMonth => {
            let first = rng.within(1, 20);
            let both = if rng.percent(25) { [1, 15] } else { [first, rng.within(first + 1, 31)] };
            ordinals(rng, &mut days, &both);
        }
        Kind::EveryFewDays => {
            let (text, step) = step(rng, &days.text, "o", &[2, 2, 3, 4, 5, 6, 7, 10]);
            days.text = fill(&text, "n", &some_number(rng, step));
            days.day_of_month = format!("*/{step}");
        }
        Kind::Date => {
            let month = rng.within(1, 12);
            name_months(rng, &mut days, &[month]);
            let day = rng.within(1, MONTH_LENGTHS[month as usize - 1]);
            ordinals(rng, &mut days, &[day]);
            days.month = month.to_string();
        }
        Kind::Holiday => {
            let (name, day, month) = *rng.choose(&[
                ("New Year's Day", 1, 1),
                ("Christmas", 25, 12),
                ("Christmas Day", 25, 12),
                ("Christmas Eve", 24, 12),
                ("New Year's Eve", 31, 12),
                ("Halloween", 31, 10),
            ]);
            days.text = fill(&days.text, "X", name);
            (days.day_of_month, days.month) = (day.to_string(), month.to_string());
        }
        Kind::EveryFewMonths => every_few_months(rng, &mut days),
        Kind::Month => {
            let month = rng.within(1, 12);
            name_months(rng, &mut days, &[month]);
            days.month = month.to_string();
        }
        Kind::MonthRange => {
            let from = rng.within(1, 11);
            let to = rng.within(from + 1, 12);
            name_months(rng, &mut days, &[from, to]);
            days.month = format!("{from}-{to}");
        }
        Kind::WeekdayInMonth => {
            let month = rng.within(1, 12);
            weekday(rng, &mut days);
            name_months(rng, &mut days, &[month]);
            days.month = month.to_string();
        }
        Kind::PartOfDay => part(rng, &mut days),
        Kind::WeekdayPart | Kind::WeekdaysPart => {
            weekday(rng, &mut days);
            part(rng, &mut days);
        }
    }
    days
}

fn part(rng: &mut Rng, days: &mut Days) {
    let part = if days.text == "nightly" { PARTS[3] } else { *rng.choose(&PARTS) };
    let text = fill(&days.text, "P", part.name);
    days.text = text.replace("in the night", "at night");
    days.part = Some(part);
}

fn weekday(rng: &mut Rng, days: &mut Days) {
    days.weekday = if days.text.contains("weekend") {
        "0,6".to_owned()
    } else if days.text.contains("{D}") {
        let day = rng.below(7);
        name_days(rng, days, &[day]);
        day.to_string()
    } else {
        "1-5".to_owned()
    };
}

/// Spoken mostly in the week's order from Monday; the line's list is sorted from Sunday.
fn weekdays(rng: &mut Rng, days: &mut Days, n: usize) {
    let mut drawn = rng.sample(&[0, 1, 2, 3, 4, 5, 6], n);
    if rng.percent(75) {
        drawn.sort_by_key(|day| (day + 6) % 7);
    }
    name_days(rng, days, &drawn);
    drawn.sort();
    days.weekday = list(drawn.into_iter());
}

fn name_days(rng: &mut Rng, days: &mut Days, named: &[u32]) {
    let plural = days.text.contains("}s");
    let short = !plural && rng.percent(if days.text.contains(['/', '-']) { 60 } else { 22 });
    for (slot, &day) in ["D", "E", "G"].iter().zip(named) {
        let name = if short { short_day(rng, day) } else { DAYS[day as usize].to_owned() };
        days.text = fill(&days.text, slot, &name);
    }
}

fn name_months(rng: &mut Rng, days: &mut Days, named: &[u32]) {
    let short = rng.percent(18);
    for (slot, &month) in ["M", "N"].iter().zip(named) {
        let name =
            if short { short_month(rng, month) } else { MONTHS[month as usize - 1].to_owned() };
        days.text = fill(&days.text, slot, &name);
    }
}

/// `{o}`, `{p}` as ordinals and `{n}`, `{m}` as numbers, all in words or all in digits.
fn ordinals(rng: &mut Rng, days: &mut Days, named: &[u32]) {
    let words = rng.percent(40);
    for ((ordinal, number), &day) in [("o", "n"), ("p", "m")].iter().zip(named) {
        let text =
            if words { crate::words::ordinal(day) } else { crate::words::short_ordinal(day) };
        days.text = fill(&fill(&days.text, ordinal, &text), number, &day.to_string());
    }
    days.day_of_month = list(named.iter().copied());
}

fn every_few_months(rng: &mut Rng, days: &mut Days) {
    let day = if rng.percent(60) { 1 } else { rng.within(1, 28) };
    if rng.percent(40) && days.text.contains("{k} months") {
        let quarter = rng.choose(&["every quarter", "once a quarter", "quarterly", "each quarter"]);
        days.text = days
            .text
            .replace("once every {k} months", quarter)
            .replace("every {k} months", quarter);
        days.month = "*/3".to_owned();
    } else {
        let (text, step) = step(rng, &days.text, "kth", &[2, 2, 3, 3, 4, 6]);
        days.text = fill(&text, "k", &some_number(rng, step));
        days.month = format!("*/{step}");
    }
    ordinals(rng, days, &[day]);
}

/// `every other`, `every third`: the slot `ordinal` for a step that is drawn from `steps`.
fn step(rng: &mut Rng, text: &str, ordinal: &str, steps: &[u32]) -> (String, u32) {
    let step = *rng.choose(steps);
    let name =
        if step == 2 && rng.percent(65) { "other".to_owned() } else { some_ordinal(rng, step) };
    (fill(text, ordinal, &name), step)
}

fn list(values: impl Iterator<Item = u32>) -> String {
    values.map(|value| value.to_string()).collect::<Vec<_>>().join(",")
}

#[test]
fn every_template_fills_all_its_slots() {
    let mut rng = Rng::new(3);
    for (kind, _) in WEIGHTS {
        let wording = wording(*kind);
        for template in wording.train.iter().chain(wording.held_out) {
            for _ in 0..40 {
                let text = from_template(&mut rng, *kind, template).text;
                assert!(!text.contains(['{', '}', '(', ')', '|']), "{template}: {text}");
            }
        }
    }
}

#[test]
fn no_held_out_template_is_a_training_one() {
    for (kind, _) in WEIGHTS {
        let all = |of: &[&str]| of.iter().flat_map(|t| crate::template::all(t)).collect::<Vec<_>>();
        let (train, held_out) = (all(wording(*kind).train), all(wording(*kind).held_out));
        for template in held_out {
            assert!(!train.contains(&template), "{kind:?}: {template}");
        }
    }
}
