//! Numbers, days and months in words, and what people schedule.
//! It does not know about times or lines.

use crate::rng::Rng;

pub const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
pub const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
pub const MONTH_LENGTHS: [u32; 12] = [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31];

const ONES: [&str; 20] = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
];
const TENS: [&str; 6] = ["", "", "twenty", "thirty", "forty", "fifty"];
const ORDINALS: [&str; 20] = [
    "",
    "first",
    "second",
    "third",
    "fourth",
    "fifth",
    "sixth",
    "seventh",
    "eighth",
    "ninth",
    "tenth",
    "eleventh",
    "twelfth",
    "thirteenth",
    "fourteenth",
    "fifteenth",
    "sixteenth",
    "seventeenth",
    "eighteenth",
    "nineteenth",
];

/// `42` is `forty-two`.
pub fn number(n: u32) -> String {
    match (n / 10, n % 10) {
        (0 | 1, _) => ONES[n as usize].to_owned(),
        (tens, 0) => TENS[tens as usize].to_owned(),
        (tens, ones) => format!("{}-{}", TENS[tens as usize], ONES[ones as usize]),
    }
}

/// `22` is `twenty-second`.
pub fn ordinal(n: u32) -> String {
    match n {
        0..20 => ORDINALS[n as usize].to_owned(),
        20 => "twentieth".to_owned(),
        30 => "thirtieth".to_owned(),
        _ => format!("{}-{}", TENS[n as usize / 10], ORDINALS[n as usize % 10]),
    }
}

/// `22` is `22nd`.
pub fn short_ordinal(n: u32) -> String {
    let suffix = match (n / 10, n % 10) {
        (1, _) => "th",
        (_, 1) => "st",
        (_, 2) => "nd",
        (_, 3) => "rd",
        _ => "th",
    };
    format!("{n}{suffix}")
}

pub fn some_number(rng: &mut Rng, n: u32) -> String {
    if rng.percent(40) { number(n) } else { n.to_string() }
}

pub fn some_ordinal(rng: &mut Rng, n: u32) -> String {
    if rng.percent(40) { ordinal(n) } else { short_ordinal(n) }
}

/// `Tue`, and at times `Tues`; with a full stop only where it cannot end a sentence.
pub fn short_day(rng: &mut Rng, day: u32) -> String {
    match day {
        2 => *rng.choose(&["Tue", "Tue", "Tues"]),
        3 => *rng.choose(&["Wed", "Wed", "Wed", "Weds"]),
        4 => *rng.choose(&["Thu", "Thu", "Thurs", "Thur"]),
        day => &DAYS[day as usize][..3],
    }
    .to_owned()
}

pub fn short_month(rng: &mut Rng, month: u32) -> String {
    if month == 9 && rng.percent(40) {
        return "Sept".to_owned();
    }
    MONTHS[month as usize - 1][..3].to_owned()
}

/// FNV-1a, 32 bits: the hold-out is decided by the text itself, so no list of it is kept.
pub fn fnv1a32(text: &str) -> u32 {
    text.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

const VERBS: &[&str] = &[
    "send", "check", "update", "clean", "print", "copy", "back up", "restart", "test", "read",
    "run", "start", "stop", "review", "sync", "upload", "download", "publish", "archive", "email",
    "post", "scan", "refresh", "rebuild", "move", "load", "save", "open", "close", "export",
    "import", "fetch", "rotate", "delete", "clear", "compress", "monitor", "deploy", "purge",
    "verify",
];
const OBJECTS: &[&str] = &[
    "the report",
    "the mail",
    "the server",
    "the database",
    "the cache",
    "the logs",
    "the backup",
    "the list",
    "the site",
    "the script",
    "the job",
    "the files",
    "the data",
    "the index",
    "the tests",
    "the invoices",
    "my photos",
    "the queue",
    "the website",
    "the disk",
    "the newsletter",
    "the log files",
    "the sales report",
    "all servers",
    "the temp folder",
    "the search index",
    "the certificates",
    "old files",
    "the dashboard",
    "our prices",
    "the docs",
    "the build",
    "the orders",
    "the metrics",
    "the config",
    "the images",
    "the API",
    "the web server",
    "user accounts",
    "the stats",
    "the router",
    "the printer",
    "my notes",
    "the calendar",
    "the daily report",
    "the weekly report",
    "the monthly report",
    "the nightly build",
    "the database tables",
    "backup.sh",
    "the cleanup script",
];
const ERRANDS: &[&str] = &[
    "water the plants",
    "water the garden",
    "feed the cat",
    "feed the dog",
    "walk the dog",
    "take out the trash",
    "call mom",
    "call my sister",
    "pay the rent",
    "pay the bills",
    "take my medicine",
    "take my vitamins",
    "drink some water",
    "stretch",
    "stand up",
    "go for a run",
    "go to the gym",
    "do the laundry",
    "do the dishes",
    "buy groceries",
    "make coffee",
    "wake me up",
    "turn on the lights",
    "turn off the heating",
    "lock the doors",
    "open the blinds",
    "play some music",
    "ring the bell",
    "join the standup",
    "write a report",
    "submit my timesheet",
    "check the oven",
    "check disk space",
    "check my email",
    "clean the kitchen",
    "charge the phone",
    "ping the team",
    "text Anna",
    "study French",
    "practice piano",
    "vacuum the floor",
    "change the filter",
    "order lunch",
    "meditate",
    "renew the certificate",
    "reboot the router",
    "run the job",
    "run the backup",
    "run a report",
    "run the script",
    "run the tests",
    "send an email",
    "send a reminder",
    "send out invoices",
    "sync the folders",
    "empty the bin",
    "pick up the kids",
    "plan the week",
    "do a health check",
];
const EVENTS: &[&str] = &[
    "the backup",
    "the job",
    "the report",
    "the cleanup",
    "the sync",
    "a reminder",
    "the meeting",
    "team meeting",
    "standup",
    "yoga class",
    "the alarm",
    "database backup",
    "a health check",
    "the import",
    "the newsletter",
    "the build",
    "lunch",
    "piano lesson",
    "the task",
    "a cron job",
    "the update",
    "the script",
    "garbage collection",
    "the test run",
    "a call",
    "log rotation",
    "the scan",
    "server restart",
    "the export",
    "payroll",
    "a cleanup job",
];

const ADJECTIVES: &[&str] = &[
    "old",
    "new",
    "main",
    "staging",
    "customer",
    "user",
    "local",
    "remote",
    "shared",
    "public",
    "test",
    "error",
    "web",
    "mail",
    "big",
    "small",
    "red",
    "daily",
    "weekly",
    "cloud",
    "home",
    "project",
    "system",
    "access",
    "second",
    "production",
    "internal",
    "spare",
    "office",
];
const NOUNS: &[&str] = &[
    "folder",
    "table",
    "backups",
    "account",
    "list",
    "page",
    "report",
    "feed",
    "machine",
    "pipeline",
    "stats",
    "records",
    "sessions",
    "tokens",
    "cluster",
    "robot",
    "camera",
    "pump",
    "window",
    "messages",
    "letters",
    "catalog",
    "branch",
    "archive",
    "key",
    "room",
    "summary",
    "audit",
    "snapshot",
    "album",
    "fish",
    "lamp",
    "song",
    "tickets",
    "charts",
    "videos",
    "container",
];
const TAILS: &[&str] = &[
    "to the team",
    "to my boss",
    "to S3",
    "to Slack",
    "to the cloud",
    "for everyone",
    "on my phone",
    "for the customers",
    "from the other server",
    "with the new tool",
    "by email",
    "in the office",
    "on the main site",
    "at home",
    "for the kids",
    "with Ben",
    "and the logs",
    "of the shop",
];

fn object(rng: &mut Rng) -> String {
    if rng.percent(60) {
        return (*rng.choose(OBJECTS)).to_owned();
    }
    let whose = rng.choose(&["the", "the", "our", "my"]);
    if rng.percent(30) {
        format!("{whose} {}", rng.choose(NOUNS))
    } else {
        format!("{whose} {} {}", rng.choose(ADJECTIVES), rng.choose(NOUNS))
    }
}

/// `send the report`
pub fn action(rng: &mut Rng) -> String {
    let action = if rng.percent(35) {
        (*rng.choose(ERRANDS)).to_owned()
    } else {
        format!("{} {}", rng.choose(VERBS), object(rng))
    };
    if rng.percent(12) { format!("{action} {}", rng.choose(TAILS)) } else { action }
}

/// `sends the report`
pub fn action_third_person(rng: &mut Rng) -> String {
    let (verb, object) = (*rng.choose(VERBS), object(rng));
    let (first, rest) = verb.split_once(' ').unwrap_or((verb, ""));
    let first = match first {
        "copy" => "copies".to_owned(),
        "verify" => "verifies".to_owned(),
        "publish" | "refresh" | "fetch" | "compress" => format!("{first}es"),
        _ => format!("{first}s"),
    };
    crate::template::tidy(&format!("{first} {rest} {object}"))
}

/// `the backup`
pub fn event(rng: &mut Rng) -> String {
    if rng.percent(80) { (*rng.choose(EVENTS)).to_owned() } else { object(rng) }
}

#[test]
fn numbers_in_words() {
    assert_eq!(
        [number(7), number(42), ordinal(22), short_ordinal(12)],
        ["seven", "forty-two", "twenty-second", "12th"]
    );
    assert_eq!(fnv1a32("a"), 0xe40c_292c);
}
