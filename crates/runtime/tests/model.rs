//! A tiny random Llama, on the real ONNX Runtime.
//!
//! Knows nothing of what a good answer is: only that all ways to it lead to the same one.

mod tiny;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use runtime::{Error, GenerateOptions, Model, Options, Runtime};
use tempfile::TempDir;

use tiny::{POSITIONS, Shape};

const VOCAB: u32 = 96;

const SMALL: Shape = Shape {
    vocab: VOCAB,
    hidden: 32,
    layers: 2,
    heads: 4,
    kv_heads: 2,
    head_dim: 16,
    ffn: 48,
    tied: false,
    seed: 1,
};

/// Wide enough for kernels to cut their work among threads.
const WIDE: Shape =
    Shape { hidden: 256, heads: 4, kv_heads: 1, head_dim: 64, ffn: 512, tied: true, ..SMALL };

/// A model folder and the place for its graph.
struct Fixture {
    dir: TempDir,
}

impl Fixture {
    fn new(shape: Shape) -> Self {
        let library = std::env::var_os("ORT_DYLIB_PATH")
            .expect("ORT_DYLIB_PATH: libonnxruntime, or the folder that it lies in");
        Runtime::init(Path::new(&library)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        tiny::write(&dir.path().join("model"), shape);
        Self { dir }
    }

    fn model(&self) -> PathBuf {
        self.dir.path().join("model")
    }

    fn open(&self, threads: usize) -> Model {
        let scratch = self.dir.path().join(format!("graph-{threads}"));
        Model::open(&self.model(), Options { threads, scratch: &scratch }).unwrap()
    }
}

fn greedy(model: &mut Model, prompt: &[u32], max_new: usize, stop_ids: &[u32]) -> Vec<u32> {
    let options = GenerateOptions { max_new, stop_ids: stop_ids.into(), ..Default::default() };
    model.generate(prompt, &options, |_| ControlFlow::Continue(())).unwrap()
}

/// Prompts of several lengths, several of each.
fn prompts() -> Vec<Vec<u32>> {
    (0..24).map(|n| (0..3 + n % 4).map(|i| (n * 37 + i * 11 + 5) % VOCAB).collect()).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn decoding_with_a_cache_gives_what_a_full_read_gives() {
    let mut model = Fixture::new(SMALL).open(1);
    let prompt = [5, 17, 3];
    let answer = greedy(&mut model, &prompt, 12, &[]);
    assert_eq!(answer.len(), 12);
    let all: Vec<u32> = prompt.iter().chain(&answer).copied().collect();
    let logits = model.logits(&all).unwrap();
    let vocab = model.vocab_size();
    assert_eq!((vocab, logits.len()), (VOCAB as usize, all.len() * vocab));
    for (n, token) in answer.iter().enumerate() {
        let row = &logits[(prompt.len() + n - 1) * vocab..][..vocab];
        let best = (0..vocab).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap();
        assert_eq!(best as u32, *token, "token {n}");
    }
    // A prefix gives the same logits: no token sees a later one.
    let prefix = model.logits(&all[..5]).unwrap();
    assert!(largest_difference(&prefix, &logits[..5 * vocab]) < 1e-5);
}

#[test]
fn a_batch_gives_what_one_by_one_gives() {
    for shape in [SMALL, WIDE] {
        let mut model = Fixture::new(shape).open(2);
        let prompts = prompts();
        let free: Vec<Vec<u32>> = prompts.iter().map(|p| greedy(&mut model, p, 10, &[])).collect();
        assert_eq!(model.generate_batch(&prompts, 10, &[]).unwrap(), free);
        // Stop at tokens that occur, so that rows leave the batch at different times.
        let stop = [free[0][4], free[1][2], free[2][0], free[3][7]];
        let stopped: Vec<Vec<u32>> =
            prompts.iter().map(|p| greedy(&mut model, p, 10, &stop)).collect();
        assert!(stopped.iter().any(Vec::is_empty));
        assert!(stopped.iter().any(|a| (1..10).contains(&a.len())));
        assert_eq!(model.generate_batch(&prompts, 10, &stop).unwrap(), stopped);
    }
}

#[test]
fn rows_of_a_batch_do_not_see_each_other() {
    let mut model = Fixture::new(SMALL).open(1);
    let (a, b) = ([1, 2, 3, 4], [9, 8, 7, 6]);
    let together = model.logits_batch(&[&a, &b]).unwrap();
    let alone = [model.logits(&a).unwrap(), model.logits(&b).unwrap()].concat();
    assert!(largest_difference(&together, &alone) < 1e-5);
    assert!(matches!(model.logits_batch(&[&a, &b[..2]]), Err(Error::Ragged(4, 2))));
}

#[test]
fn threads_do_not_change_a_bit() {
    let fixture = Fixture::new(WIDE);
    let (mut one, mut two) = (fixture.open(1), fixture.open(2));
    let prompts = prompts();
    let ids: Vec<u32> = (0..48).map(|i| i * 7 % VOCAB).collect();
    assert_eq!(one.logits(&ids).unwrap(), two.logits(&ids).unwrap());
    assert_eq!(
        one.generate_batch(&prompts, 8, &[]).unwrap(),
        two.generate_batch(&prompts, 8, &[]).unwrap()
    );
}

#[test]
fn sampling_belongs_to_its_seed() {
    let mut model = Fixture::new(SMALL).open(1);
    let mut draw = |seed| {
        let options = GenerateOptions { max_new: 16, temperature: 3.0, seed, ..Default::default() };
        model.generate(&[1, 2], &options, |_| ControlFlow::Continue(())).unwrap()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
}

#[test]
fn an_answer_ends_where_it_must() {
    let mut model = Fixture::new(SMALL).open(1);
    let free = greedy(&mut model, &[5, 17, 3], 6, &[]);
    assert_eq!(greedy(&mut model, &[5, 17, 3], 0, &[]), [] as [u32; 0]);
    let options = GenerateOptions { max_new: 6, ..Default::default() };
    let mut seen = Vec::new();
    let broken_off = model.generate(&[5, 17, 3], &options, |token| {
        seen.push(token);
        if seen.len() == 2 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    });
    assert_eq!((broken_off.unwrap(), seen), (free[..2].to_vec(), free[..2].to_vec()));
    // The last position is read, and gives one token more.
    let long: Vec<u32> = vec![4; POSITIONS - 2];
    assert_eq!(greedy(&mut model, &long, 50, &[]).len(), 3);
    assert_eq!(model.generate_batch(&[long], 50, &[]).unwrap()[0].len(), 3);
}

#[test]
fn what_cannot_be_read_is_refused() {
    let fixture = Fixture::new(SMALL);
    let mut model = fixture.open(1);
    let long = vec![1; POSITIONS + 1];
    assert!(matches!(model.logits(&long), Err(Error::TooLong { .. })));
    assert!(matches!(model.logits(&[VOCAB]), Err(Error::Graph { .. })));
    assert!(matches!(model.logits(&[]), Err(Error::EmptyPrompt)));

    let scratch = fixture.dir.path().join("scratch");
    let options = Options { threads: 1, scratch: &scratch };
    let empty = fixture.dir.path().join("empty");
    std::fs::create_dir_all(empty.join("onnx")).unwrap();
    assert!(matches!(Model::open(&empty, options), Err(Error::NoModel(_))));
    for name in ["model.onnx", "model_q4.onnx"] {
        std::fs::write(empty.join("onnx").join(name), "no graph").unwrap();
    }
    assert!(matches!(Model::open(&empty, options), Err(Error::ManyGraphs { .. })));
    std::fs::remove_file(empty.join("onnx/model.onnx")).unwrap();
    assert!(matches!(Model::open(&empty, options), Err(Error::Session { .. })));
    let nowhere = Runtime::init(fixture.dir.path());
    assert!(matches!(nowhere, Err(Error::Load { .. })));
}
