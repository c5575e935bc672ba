//! A schedule: a prompt, its crontab line, and the pieces both were made of.
//! It does not know in which file it ends up.

use crate::clock::{self, Clock, Pool};
use crate::days::{self, Days, Kind};
use crate::frames;
use crate::line;
use crate::repeats::{self, Repeat};
use crate::rng::Rng;
use crate::template::{fill, vary};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    Train,
    HeldOut,
}

#[derive(Clone, Debug)]
pub struct Schedule {
    pub prompt: String,
    pub line: String,
    /// The templates that were drawn, joined: what the hold-out of templates is checked by.
    #[cfg_attr(not(test), allow(dead_code))]
    pub templates: Vec<String>,
    /// One time of day, or several that share their minute; none where it repeats.
    pub clocks: Vec<Clock>,
    pub days: Option<Days>,
    pub repeat: Option<Repeat>,
    pub hours: Option<(u32, u32)>,
}

/// Which of the wordings are ones that training never uses.
#[derive(Clone, Copy, Default)]
struct New {
    days: bool,
    around: bool,
    order: bool,
}

impl New {
    fn draw(rng: &mut Rng, split: Split) -> Self {
        if split == Split::Train {
            return Self::default();
        }
        match rng.below(4) {
            0 => Self { days: true, ..Self::default() },
            1 => Self { around: true, ..Self::default() },
            2 => Self { order: true, ..Self::default() },
            _ => Self { days: true, around: true, order: false },
        }
    }
}

impl Schedule {
    /// A schedule of `split`: a held-out line where there are enough lines to hold some out.
    pub fn draw(rng: &mut Rng, split: Split) -> Self {
        loop {
            let schedule = Self::any(rng, split);
            // Without this, the few lines that nothing holds out would be half of the held-out rows.
            if split == Split::HeldOut && schedule.is_common() && rng.percent(75) {
                continue;
            }
            let clocks = || schedule.clocks.iter().any(|clock| clock.held_out());
            let fits = match split {
                Split::Train => {
                    schedule.is_common() || !line::held_out(&schedule.line) && !clocks()
                }
                Split::HeldOut => schedule.is_common() || line::held_out(&schedule.line),
            };
            if fits {
                return schedule;
            }
        }
    }

    /// A repeat on all days and hours has so few lines that training needs each of them.
    pub fn is_common(&self) -> bool {
        self.days.is_none() && self.hours.is_none() && !matches!(self.repeat, Some(Repeat::Past(_)))
    }

    /// A schedule in the words of `split`, held out or not.
    pub fn any(rng: &mut Rng, split: Split) -> Self {
        if rng.percent(22) { Self::repeated(rng, split) } else { Self::timed(rng, split) }
    }

    fn timed(rng: &mut Rng, split: Split) -> Self {
        let new = New::draw(rng, split);
        let kind = *rng.weighted(days::WEIGHTS);
        let days = days::draw(rng, kind, new.days);
        let pool =
            if split == Split::HeldOut && rng.percent(35) { Pool::HeldOut } else { Pool::Train };
        let (clocks, time) = times(rng, &days, pool);

        let apart = !new.around && rng.percent(16);
        let template = if apart {
            let frames = if new.order { frames::APART_HELD_OUT } else { frames::APART };
            (*rng.weighted(frames)).to_owned()
        } else {
            let order =
                rng.weighted(if new.order { frames::TIMED_HELD_OUT } else { frames::TIMED });
            around(rng, new.around, order)
        };
        let mut frame = frames::dress(rng, &template);
        let bare = frame.text.contains("{F} {T}") || frame.text.contains("{F}, {T}");
        if bare
            && !time.starts_with(|c: char| c.is_ascii_digit())
            && time != "noon"
            && time != "midnight"
        {
            frame.text = frame.text.replace("{T}", "at {T}");
        }
        frame.text = fill(&fill(&frame.text, "F", &days.text), "T", &time);
        let hours: Vec<String> = clocks.iter().map(|clock| clock.hour.to_string()).collect();
        let line = format!(
            "{} {} {} {} {}",
            clocks[0].minute,
            hours.join(","),
            days.day_of_month,
            days.month,
            days.weekday
        );
        let prompt = frames::finish(rng, &frame);
        let templates = vec![template, days.template.clone()];
        Self { prompt, line, templates, clocks, days: Some(days), repeat: None, hours: None }
    }

    fn repeated(rng: &mut Rng, split: Split) -> Self {
        let new = New::draw(rng, split);
        // What is new: the repeat, the sentence around it, or the words for the hours or days.
        let repeat = match rng.below(100) {
            0..46 => Repeat::minutes(rng),
            46..66 => Repeat::hours(rng),
            66..80 => Repeat::Hour,
            80..84 => Repeat::Minute,
            _ => Repeat::past(rng),
        };
        let (mut on_days, mut within) = match rng.below(100) {
            0..40 => (false, false),
            40..68 => (true, false),
            68..90 => (false, true),
            _ => (true, true),
        };
        match repeat {
            Repeat::Past(_) => (on_days, within) = (rng.percent(20), false),
            // A step of hours within hours is more than a small model needs to know.
            Repeat::Hours(_) | Repeat::Minute => within = false,
            Repeat::Minutes(_) | Repeat::Hour => {}
        }
        let hours = within.then(|| {
            let from = rng.within(5, 17);
            (from, rng.within(from + 1, 22))
        });
        let wording = repeats::wording(repeat);
        let new_repeat = new.order || (new.days && !on_days);
        let template = if new_repeat {
            *rng.choose(wording.held_out)
        } else {
            *rng.choose_early(wording.train)
        };
        let repeat_text = repeats::phrase(rng, repeat, template);
        let mut templates = vec![template.to_owned()];

        let days = on_days.then(|| {
            let kind = *rng.weighted(&[
                (Kind::Weekdays, 30),
                (Kind::Weekend, 14),
                (Kind::Weekday, 26),
                (Kind::TwoWeekdays, 12),
                (Kind::WeekdayRange, 14),
                (Kind::Month, 8),
                (Kind::DayOfMonth, 4),
            ]);
            days::draw(rng, kind, new.days)
        });
        let hours_text = hours.map(|(from, to)| {
            let template = *rng.choose_early(repeats::WITHIN.train);
            let (a, b) = clock::hour_range(rng, from, to);
            fill(&fill(&vary(rng, template), "a", &a), "b", &b)
        });
        let order = *rng.weighted(match (on_days, within) {
            (false, false) => &[("{R}", 1)],
            (true, false) => frames::REPEAT_DAYS,
            (false, true) => frames::REPEAT_HOURS,
            (true, true) => frames::REPEAT_BOTH,
        });
        let template = around(rng, new.around, order);
        let mut frame = frames::dress(rng, &template);
        templates.push(template);
        frame.text = fill(&frame.text, "R", &repeat_text);
        if let Some(days) = &days {
            frame.text = fill(&frame.text, "F", &days.text);
            templates.push(days.template.clone());
        }
        if let Some(text) = &hours_text {
            frame.text = fill(&frame.text, "H", text);
        }
        let (minute, hour) = repeat.fields(hours);
        let star = || "*".to_owned();
        let (day, month, weekday) = days.as_ref().map_or((star(), star(), star()), |days| {
            (days.day_of_month.clone(), days.month.clone(), days.weekday.clone())
        });
        let line = format!("{minute} {hour} {day} {month} {weekday}");
        let prompt = frames::finish(rng, &frame);
        Self { prompt, line, templates, clocks: Vec::new(), days, repeat: Some(repeat), hours }
    }

    /// Prompts that differ in capitals and punctuation alone are the same.
    pub fn key(&self) -> String {
        self.prompt.to_lowercase().trim_end_matches(['.', '?', '!']).to_owned()
    }
}

fn around(rng: &mut Rng, new: bool, order: &str) -> String {
    rng.weighted(if new { frames::AROUND_HELD_OUT } else { frames::AROUND }).replace('~', order)
}

/// One time of day or several, and how they are said beside `days`.
fn times(rng: &mut Rng, days: &Days, pool: Pool) -> (Vec<Clock>, String) {
    if let Some(part) = days.part {
        let small = part.name == "night" && rng.percent(30);
        let (first, last) = if small { (0, 3) } else { (part.first_hour, part.last_hour) };
        let clock = clock_within(rng, pool, first, last);
        let text =
            if small { clock::small_hours(rng, clock) } else { clock::face_phrase(rng, clock) };
        return (vec![clock], text);
    }
    if rng.percent(3) {
        let first = clock_within(rng, pool, 5, 20);
        let mut hours: Vec<u32> = rng.sample(&(5..23).collect::<Vec<_>>(), 2);
        if rng.percent(90) {
            hours.truncate(1);
        }
        hours.push(first.hour);
        hours.sort();
        hours.dedup();
        let clocks: Vec<Clock> =
            hours.into_iter().map(|hour| Clock { hour, minute: first.minute }).collect();
        // A second time that is held out would give the first one's minute away.
        if clocks.len() > 1 && (pool == Pool::HeldOut || clocks.iter().all(|c| !c.held_out())) {
            let text = clock::several(rng, &clocks);
            return (clocks, text);
        }
    }
    let clock = Clock::draw(rng, pool);
    (vec![clock], clock::phrase(rng, clock))
}

fn clock_within(rng: &mut Rng, pool: Pool, first: u32, last: u32) -> Clock {
    loop {
        let clock = Clock::draw(rng, pool);
        if (first..=last).contains(&clock.hour) {
            return clock;
        }
    }
}
