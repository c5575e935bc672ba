//! Which days, and how people say them.
//! It does not know about times of day, only that "every morning" says half of one.

pub use crate::day_words::Kind;
use crate::day_words::wording;
use crate::rng::Rng;
use crate::template::{fill, vary};
use crate::words::{DAYS, MONTH_LENGTHS, MONTHS, short_day, short_month};

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
    (Kind::Daily, 110),
    (Kind::Weekdays, 90),
    (Kind::Weekend, 50),
    (Kind::Weekday, 180),
    (Kind::TwoWeekdays, 90),
    (Kind::ThreeWeekdays, 55),
    (Kind::WeekdayRange, 75),
    (Kind::DayOfMonth, 110),
    (Kind::Date, 110),
    (Kind::Month, 30),
    (Kind::WeekdayInMonth, 40),
    (Kind::PartOfDay, 30),
    (Kind::WeekdayPart, 30),
    (Kind::WeekdaysPart, 12),
];

pub fn draw(rng: &mut Rng, kind: Kind, held_out: bool) -> Days {
    let wording = wording(kind);
    let template =
        if held_out { rng.choose(wording.held_out) } else { rng.choose_early(wording.train) };
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
            // From Sunday to Saturday is every day.
            let to = rng.within(from + 1, if from == 0 { 5 } else { 6 });
            name_days(rng, &mut days, &[from, to]);
            days.weekday = format!("{from}-{to}");
        }
        Kind::DayOfMonth => {
            let day = if rng.percent(20) { *rng.choose(&[1, 15]) } else { rng.within(1, 31) };
            ordinals(rng, &mut days, &[day]);
        }
        Kind::Date => {
            let month = rng.within(1, 12);
            name_months(rng, &mut days, &[month]);
            let day = rng.within(1, MONTH_LENGTHS[month as usize - 1]);
            ordinals(rng, &mut days, &[day]);
            days.month = month.to_string();
        }
        Kind::Month => {
            let month = rng.within(1, 12);
            name_months(rng, &mut days, &[month]);
            days.month = month.to_string();
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
