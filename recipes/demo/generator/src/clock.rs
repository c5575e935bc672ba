//! Times of day and how people say them.
//! It does not know about days.

use crate::line::clock_held_out;
use crate::rng::Rng;
use crate::words::number;

/// A time of day.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Clock {
    pub hour: u32,
    pub minute: u32,
}

/// Which times of day may be drawn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Pool {
    Train,
    HeldOut,
}

impl Clock {
    pub fn held_out(self) -> bool {
        clock_held_out(self.hour, self.minute)
    }

    /// `09:05`
    pub fn text(self) -> String {
        format!("{:02}:{:02}", self.hour, self.minute)
    }

    /// Waking hours and round minutes come more often, as people say them more often.
    pub fn draw(rng: &mut Rng, pool: Pool) -> Self {
        loop {
            let hour = if rng.percent(50) { rng.within(6, 22) } else { rng.below(24) };
            let clock = Self { hour, minute: some_minute(rng) };
            if clock.held_out() == (pool == Pool::HeldOut) {
                return clock;
            }
        }
    }

    /// The hour on a clock face: `0` and `12` are twelve.
    fn face(self) -> u32 {
        face(self.hour)
    }
}

fn some_minute(rng: &mut Rng) -> u32 {
    match rng.below(100) {
        0..27 => 0,
        27..38 => 30,
        38..50 => *rng.choose(&[15, 45]),
        50..78 => 5 * rng.within(1, 11),
        _ => rng.within(1, 59),
    }
}

fn face(hour: u32) -> u32 {
    if hour.is_multiple_of(12) { 12 } else { hour % 12 }
}

fn half_day(rng: &mut Rng, hour: u32) -> &'static str {
    let (am, pm) = *rng.weighted(&[(("am", "pm"), 12), (("AM", "PM"), 3), (("a.m.", "p.m."), 3)]);
    if hour < 12 { am } else { pm }
}

/// `in the morning`, or what else fits the hour.
fn part_of_day(rng: &mut Rng, hour: u32) -> &'static str {
    let mut parts = Vec::new();
    if (1..=11).contains(&hour) {
        parts.push("in the morning");
    }
    if (12..=17).contains(&hour) {
        parts.push("in the afternoon");
    }
    if (17..=21).contains(&hour) {
        parts.push("in the evening");
    }
    if hour >= 20 || hour == 0 {
        parts.push("at night");
    }
    parts[rng.below(parts.len() as u32) as usize]
}

/// A way to say the time that leaves no doubt. A bare hour is read literally: nine is 09:00.
pub fn phrase(rng: &mut Rng, clock: Clock) -> String {
    let Clock { hour, minute } = clock;
    let twelve = clock.face();
    let mut ways: Vec<(String, u32)> = vec![
        (clock.text(), 30),
        (format!("{hour}:{minute:02}"), 10),
        (twelve_hours(rng, clock), 26),
    ];
    if !(1..=12).contains(&hour) || minute != 0 {
        ways.push((format!("{hour}.{minute:02}"), 3));
        ways.push((format!("{hour:02}{minute:02}"), 2));
        ways.push((format!("{hour:02}{minute:02} hours"), 2));
    }
    ways.push((format!("{hour:02}h{minute:02}"), 1));
    if minute == 0 {
        let part = part_of_day(rng, hour);
        let half = half_day(rng, hour);
        ways.push((format!("{twelve} {half}"), 18));
        ways.push((format!("{twelve}{half}"), 20));
        ways.push((format!("{} {half}", number(twelve)), 12));
        ways.push((format!("{} {part}", number(twelve)), 14));
        ways.push((format!("{twelve} {part}"), 10));
        ways.push((format!("{} o'clock {part}", number(twelve)), 6));
        ways.push((format!("{twelve} o'clock {part}"), 4));
        ways.push((format!("{twelve}:00 {part}"), 3));
        if (1..=11).contains(&hour) {
            ways.push((number(hour), 12));
            ways.push((hour.to_string(), 16));
            ways.push((format!("{} o'clock", number(hour)), 8));
            ways.push((format!("{hour} o'clock"), 6));
        }
        if hour > 12 {
            ways.push((hour.to_string(), 8));
            ways.push((format!("{hour}h"), 1));
        }
        match hour {
            12 => ways.extend([("noon", 80), ("midday", 16), ("12 noon", 8), ("12", 4)].map(own)),
            0 => ways.extend([("midnight", 90), ("12 midnight", 8)].map(own)),
            _ => {}
        }
    } else {
        let words = minute_words(minute);
        let part = part_of_day(rng, hour);
        let half = half_day(rng, hour);
        ways.push((format!("{} {words} {half}", number(twelve)), 12));
        ways.push((format!("{} {words} {part}", number(twelve)), 4));
        ways.push((format!("{twelve}:{minute:02} {part}"), 8));
        if (1..=11).contains(&hour) {
            ways.push((format!("{} {words}", number(hour)), 3));
        }
        if minute.is_multiple_of(5) {
            let spoken = spoken(rng, clock);
            ways.push((format!("{spoken} {part}"), 75));
            ways.push((format!("{spoken} {half}"), 25));
            if (1..=11).contains(&hour) {
                ways.push((spoken.clone(), 25));
            }
            if minute <= 30 && (hour == 0 || hour == 12) {
                let name = if hour == 0 { "midnight" } else { "noon" };
                let (past, _) = spoken.rsplit_once(' ').unwrap_or_default();
                ways.push((format!("{past} {name}"), 25));
            }
        }
    }
    rng.weighted(&ways).clone()
}

/// An hour after midnight, as said of a night: `2am`.
pub fn small_hours(rng: &mut Rng, clock: Clock) -> String {
    match clock {
        Clock { hour: 0, minute: 0 } => "midnight".to_owned(),
        clock => twelve_hours(rng, clock),
    }
}

/// The time as said beside a part of the day that is named elsewhere: `7:30` of every evening.
pub fn face_phrase(rng: &mut Rng, clock: Clock) -> String {
    let twelve = clock.face();
    if rng.percent(25) {
        return twelve_hours(rng, clock);
    }
    if rng.percent(10) {
        return clock.text();
    }
    match clock.minute {
        0 => match rng.below(10) {
            0..5 => twelve.to_string(),
            5..8 => number(twelve),
            8 => format!("{twelve}:00"),
            _ => format!("{} o'clock", number(twelve)),
        },
        minute if minute.is_multiple_of(5) && rng.percent(45) => spoken(rng, clock),
        minute if rng.percent(20) => format!("{} {}", number(twelve), minute_words(minute)),
        minute => format!("{twelve}:{minute:02}"),
    }
}

/// `9:05 am`, or `9 am` where the minute is zero.
fn twelve_hours(rng: &mut Rng, clock: Clock) -> String {
    let twelve = clock.face();
    let space = rng.choose(&["", " "]);
    let half = half_day(rng, clock.hour);
    match clock.minute {
        0 if rng.percent(70) => format!("{twelve}{space}{half}"),
        minute if rng.percent(8) => format!("{twelve}.{minute:02}{space}{half}"),
        minute => format!("{twelve}:{minute:02}{space}{half}"),
    }
}

/// `oh five`, `forty-two` or `forty two`.
fn minute_words(minute: u32) -> String {
    if minute < 10 { format!("oh {}", number(minute)) } else { number(minute).replace('-', " ") }
}

/// `quarter past nine`; a multiple of five only.
fn spoken(rng: &mut Rng, clock: Clock) -> String {
    let digits = rng.percent(15);
    let hour = |hour: u32| if digits { face(hour).to_string() } else { number(face(hour)) };
    let (this, next) = (hour(clock.hour), hour(clock.hour + 1));
    let after = rng.choose(&["past", "past", "past", "past", "past", "after"]);
    let before = rng.choose(&["to", "to", "to", "to", "to", "to", "before", "till"]);
    let count = |n: u32| if digits { n.to_string() } else { number(n) };
    let minutes = rng.choose(&["", "", "", "", "", "", " minutes"]);
    let quarter = rng.choose(&["quarter", "a quarter"]);
    match clock.minute {
        30 => format!("half past {this}"),
        15 => format!("{quarter} {after} {this}"),
        45 => format!("{quarter} {before} {next}"),
        minute if minute < 30 => format!("{}{minutes} {after} {this}", count(minute)),
        minute => format!("{}{minutes} {before} {next}", count(60 - minute)),
    }
}

/// Several times of one day that share their minute: `9am and 5pm`.
pub fn several(rng: &mut Rng, clocks: &[Clock]) -> String {
    let style = *rng.choose(&[0, 1, 1, 2, 2, 2, 3, 3, 3, 4]);
    let on_the_hour = clocks[0].minute == 0;
    let mut texts: Vec<String> = clocks
        .iter()
        .map(|&clock| match style {
            0 if on_the_hour => clock.hour.to_string(),
            0 | 1 => clock.text(),
            2 | 3 => {
                let half = if clock.hour < 12 { "am" } else { "pm" };
                let minute =
                    if on_the_hour { String::new() } else { format!(":{:02}", clock.minute) };
                let space = if style == 2 { " " } else { "" };
                format!("{}{minute}{space}{half}", clock.face())
            }
            _ => phrase(rng, clock),
        })
        .collect();
    // "8 and 10 am" names the half of the day once.
    if style == 2
        && clocks.iter().all(|c| (c.hour < 12) == (clocks[0].hour < 12))
        && rng.percent(50)
    {
        let last = texts.len() - 1;
        for text in &mut texts[..last] {
            *text = text.split(' ').next().unwrap_or_default().to_owned();
        }
    }
    let and = if style < 4 && rng.percent(12) {
        " & "
    } else if style >= 4 && rng.percent(30) {
        " and at "
    } else {
        " and "
    };
    join(&texts, and)
}

/// The hours of a range: `from {0} to {1}`. A bare end that is not later is of the afternoon.
pub fn hour_range(rng: &mut Rng, from: u32, to: u32) -> (String, String) {
    let faces = from <= 12 && (to <= 12 || face(to) <= from);
    if faces && rng.percent(30) {
        return (face(from).to_string(), face(to).to_string());
    }
    let style = rng.below(6);
    let mut one = |hour: u32| {
        let (twelve, half) = (face(hour), if hour < 12 { "am" } else { "pm" });
        match style {
            0 => format!("{twelve} {half}"),
            1 => format!("{twelve}{half}"),
            2 => format!("{hour:02}:00"),
            3 if from > 12 || to > 12 => hour.to_string(),
            3 => format!("{hour}:00"),
            4 if hour == 12 => "noon".to_owned(),
            4 => format!("{} {}", number(twelve), part_of_day(rng, hour)),
            _ => phrase(rng, Clock { hour, minute: 0 }),
        }
    };
    (one(from), one(to))
}

/// `a, b and c`
pub fn join(texts: &[String], and: &str) -> String {
    match texts {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{}{and}{last}", head.join(", ")),
    }
}

fn own((text, weight): (&str, u32)) -> (String, u32) {
    (text.to_owned(), weight)
}

#[test]
fn ways_to_say_half_past_five() {
    let mut rng = Rng::new(1);
    let mut ways = std::collections::BTreeSet::new();
    for _ in 0..3000 {
        ways.insert(phrase(&mut rng, Clock { hour: 17, minute: 30 }));
    }
    for way in ["17:30", "5:30 pm", "half past five in the evening", "five thirty pm", "1730 hours"]
    {
        assert!(ways.contains(way), "{way} is not among {ways:?}");
    }
    assert!(!ways.contains("half past five"), "that is the morning's");
}
