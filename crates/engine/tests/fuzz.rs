//! Broken text, made from sound text by chance: recipes, actions, a worker's lines. None may panic,
//! and a mistake that is told must be told at a place that exists.
//!
//! `FUZZ_SECONDS` says how long (2 if not), for each of the three.

mod workspace;

use std::path::Path;
use std::time::{Duration, Instant};

use recipe::Recipe;
use step::worker::Event;
use step::{Action, ActionResult, Tree};

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % n.max(1) as u64) as usize
    }

    /// A few small changes: a byte, a piece gone, a piece twice, a piece of another text, a word
    /// that means something.
    fn changed(&mut self, seeds: &[Vec<u8>], words: &[&str]) -> Vec<u8> {
        let mut text = seeds[self.below(seeds.len())].clone();
        for _ in 0..1 + self.below(4) {
            let (at, end) = (self.below(text.len() + 1), self.below(text.len() + 1));
            let range = at.min(end)..at.max(end).min(at.min(end) + 40);
            match self.below(6) {
                0 if !text.is_empty() => {
                    let at = at.min(text.len() - 1);
                    text[at] = self.below(256) as u8;
                }
                1 => _ = text.drain(range),
                2 => {
                    let piece = text[range].to_vec();
                    text.splice(at..at, piece);
                }
                3 => {
                    let other = &seeds[self.below(seeds.len())];
                    let from = self.below(other.len() + 1);
                    let to = (from + self.below(60)).min(other.len());
                    text.splice(at..at, other[from..to].iter().copied());
                }
                4 => text.truncate(at),
                _ => {
                    let word = words[self.below(words.len())];
                    text.splice(at..at, word.bytes());
                }
            }
        }
        text
    }
}

/// Calls `try_one` with changed texts for as long as was asked; says how many those were.
fn fuzz(what: &str, seeds: &[Vec<u8>], words: &[&str], mut try_one: impl FnMut(&[u8])) {
    let seconds = std::env::var("FUZZ_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let (mut random, mut tried) = (Random(0x9e37_79b9_7f4a_7c15), 0_u64);
    let clock = Instant::now();
    while clock.elapsed() < Duration::from_secs_f64(seconds) {
        try_one(&random.changed(seeds, words));
        tried += 1;
    }
    println!("{what}: {tried} cases");
    assert!(tried > 100);
}

fn recipes() -> Vec<Vec<u8>> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes");
    let paths = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let tables = paths.filter(|path| path.extension().is_some_and(|e| e == "toml"));
    let mut all: Vec<_> = tables.map(|path| std::fs::read(path).unwrap()).collect();
    all.push(workspace::RECIPE.into());
    assert!(all.len() > 2);
    all
}

#[test]
fn broken_recipes_are_mistakes_with_a_place() {
    let w = workspace::Workspace::new(workspace::RECIPE);
    let engine = w.engine();
    let words = [
        "[a]\n",
        "step = \"demo/upper\"\n",
        "\"./rows.txt\"",
        "'''",
        "\u{feff}",
        "[[",
        "ü",
        "{}",
        "=",
        "\"a/b\"",
        "1e999",
        "\0",
    ];
    fuzz("recipes", &recipes(), &words, |bytes| {
        let Ok(text) = std::str::from_utf8(bytes) else { return };
        let path = w.path("recipes/r.toml");
        if let Err(mistake) = Recipe::parse(&path, text) {
            assert!(mistake.render(false).contains("r.toml"));
            return;
        }
        // Sound as a recipe: its targets, inputs and parameters may still be anything.
        std::fs::write(&path, text).unwrap();
        let mut resolver = engine.resolver();
        let graph = resolver.expand(&["r".into()]).and_then(|wanted| resolver.graph(&wanted));
        if let Err(engine::Error::Recipe(mistake)) = graph {
            assert!(mistake.render(false).contains("r.toml"));
        }
    });
}

#[test]
fn broken_actions_and_trees_are_errors() {
    let w = workspace::Workspace::new(workspace::RECIPE);
    w.build("r").unwrap();
    let engine = w.engine();
    let last = engine.last(&engine::TargetId::new("r", "shout")).unwrap();
    let seeds = [
        engine.action(last.key).unwrap().to_canonical(),
        step::canonical::to_vec(&last),
        step::canonical::to_vec(&engine.store().tree(last.output).unwrap()),
    ];
    let words = ["null", "{}", "[]", "\"\"", "-1", "1e400", "\"../x\"", "\\u0000", "{\"a\":"];
    fuzz("actions, results and trees", &seeds, &words, |bytes| {
        if let Ok(action) = serde_json::from_slice::<Action>(bytes) {
            // What parses is encoded in one way only.
            let canonical = action.to_canonical();
            let again: Action = serde_json::from_slice(&canonical).unwrap();
            assert_eq!(again.to_canonical(), canonical);
        }
        let _ = serde_json::from_slice::<ActionResult>(bytes);
        if let Ok(tree) = serde_json::from_slice::<Tree>(bytes) {
            // Nothing in a tree leads out of the folder that it is laid out in.
            assert!(tree.entries().iter().all(|e| !e.path.split('/').any(|part| part == "..")));
        }
    });
}

#[test]
fn broken_lines_of_a_worker_are_no_events() {
    let seeds: Vec<Vec<u8>> = [
        r#"{"event":"progress","phase":"train","done":3,"total":9,"unit":"steps","values":{"loss":1.5}}"#,
        r#"{"event":"metric","name":"loss","value":0.5}"#,
        r#"{"event":"note","text":"three rows were skipped"}"#,
        r#"{"event":"usage","cpu_seconds":0.5,"peak_memory":1024}"#,
        r#"{"event":"failed","class":"input","message":"rows.jsonl:3: no","hint":null}"#,
    ]
    .map(|line| line.as_bytes().to_vec())
    .into();
    let words = ["null", "\"event\"", "{\"event\":\"note\"", "\\ud800", "1e400", "\u{0}", "}}"];
    fuzz("a worker's lines", &seeds, &words, |bytes| {
        if let Ok(event) = serde_json::from_slice::<Event>(bytes) {
            serde_json::to_vec(&event).unwrap();
        }
    });
}
