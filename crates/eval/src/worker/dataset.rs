//! The rows of a dataset's split: as messages or text, and as tokens.
//!
//! Knows nothing of models.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use checkpoint::chat::Message;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use step::Failure;
use step::worker::Input;

/// The splits that a dataset may have.
const SPLITS: [&str; 3] = ["train", "validation", "test"];

/// One split, of which at most `max_rows` rows are read.
pub struct Split<'a> {
    dir: &'a Path,
    origin: &'a str,
    name: &'a str,
    max_rows: usize,
}

/// A row as people wrote it.
#[derive(Debug, Clone, PartialEq)]
pub enum Row {
    Chat(Vec<Message>),
    Text(String),
}

/// A row as the trainer reads it. Both have one element a token.
#[derive(Debug, Clone, PartialEq)]
pub struct Tokens {
    pub ids: Vec<u32>,
    /// This token is a target: the model is asked for it given those before.
    pub supervised: Vec<bool>,
}

impl<'a> Split<'a> {
    pub fn of(input: &'a Input, name: &'a str, max_rows: Option<usize>) -> Result<Self> {
        let has = |split: &str| input.path.join(format!("{split}.jsonl")).is_file();
        if !has(name) {
            let present: Vec<&str> = SPLITS.into_iter().filter(|s| has(s)).collect();
            let message = format!("{}: there is no split `{name}`", input.origin);
            return Err(Failure::input(message)
                .hint(format!(
                    "it has {}: name one with `split`, or give `{name}` a share where the dataset is made",
                    present.join(", ")
                ))
                .into());
        }
        let max_rows = max_rows.unwrap_or(usize::MAX);
        Ok(Self { dir: &input.path, origin: &input.origin, name, max_rows })
    }

    pub fn rows(&self) -> Result<Vec<Row>> {
        let path = self.file("jsonl");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let rows = text.lines().take(self.max_rows).enumerate();
        rows.map(|(n, line)| row(line).map_err(|what| self.broken("jsonl", n, &what))).collect()
    }

    pub fn tokens(&self) -> Result<Vec<Tokens>> {
        let path = self.file("safetensors");
        let bytes =
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let wrong = |what: String| Failure::input(format!("{}: {what}", path.display()));
        let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(e.to_string()))?;
        let tensor = |name: &str, dtype: Dtype| match file.tensor(name) {
            Ok(t) if t.dtype() == dtype => Ok(t.data().to_vec()),
            Ok(t) => Err(wrong(format!("`{name}` is {:?}, expected {dtype:?}", t.dtype()))),
            Err(e) => Err(wrong(e.to_string())),
        };
        let ids = tensor("input_ids", Dtype::I32)?;
        let ids: Vec<u32> = le(&ids, |b| i32::from_le_bytes(b) as u32);
        let supervised = tensor("supervised", Dtype::U8)?;
        let offsets = tensor("offsets", Dtype::I64)?;
        let offsets: Vec<usize> = le(&offsets, |b| i64::from_le_bytes(b) as usize);
        let rising = offsets.is_sorted() && offsets.last().is_none_or(|&last| last == ids.len());
        if !rising || supervised.len() != ids.len() {
            return Err(wrong("`offsets` do not cut `input_ids` and `supervised`".into()).into());
        }
        let rows = offsets.windows(2).take(self.max_rows);
        Ok(rows
            .map(|cut| Tokens {
                ids: ids[cut[0]..cut[1]].to_vec(),
                supervised: supervised[cut[0]..cut[1]].iter().map(|&s| s != 0).collect(),
            })
            .collect())
    }

    /// Rows are counted from 1, as lines are.
    pub fn broken(&self, extension: &str, row: usize, what: &str) -> anyhow::Error {
        let (origin, name) = (self.origin, self.name);
        Failure::input(format!("{origin}: {name}.{extension}:{}: {what}", row + 1)).into()
    }

    fn file(&self, extension: &str) -> PathBuf {
        self.dir.join(format!("{}.{extension}", self.name))
    }
}

fn row(line: &str) -> Result<Row, String> {
    // Other keys are columns.
    #[derive(Deserialize)]
    struct Line {
        messages: Option<Vec<Message>>,
        text: Option<String>,
    }
    let line: Line = serde_json::from_str(line).map_err(|e| e.to_string())?;
    match line {
        Line { messages: Some(messages), text: None } => Ok(Row::Chat(messages)),
        Line { messages: None, text: Some(text) } => Ok(Row::Text(text)),
        _ => Err("a row has either `messages` or `text`".into()),
    }
}

/// Little-endian numbers of `N` bytes.
fn le<const N: usize, T>(bytes: &[u8], number: impl Fn([u8; N]) -> T) -> Vec<T> {
    bytes.as_chunks::<N>().0.iter().map(|b| number(*b)).collect()
}

/// Indices of rows by length, short ones first, so that rows of one length are run together. A
/// batch holds at most `budget` tokens, and at least one row.
pub fn batches(lengths: &[usize], budget: usize) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..lengths.len()).collect();
    order.sort_by_key(|&i| lengths[i]);
    order
        .chunk_by(|&a, &b| lengths[a] == lengths[b])
        .flat_map(|same| same.chunks((budget / lengths[same[0]].max(1)).max(1)))
        .map(<[usize]>::to_vec)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_hold_rows_of_one_length_within_the_budget() {
        assert_eq!(
            batches(&[3, 2, 3, 2, 2, 9], 6),
            [vec![1, 3, 4], vec![0, 2], vec![5]] as [Vec<usize>; 3]
        );
        assert_eq!(batches(&[4, 4, 4], 8), [vec![0, 1], vec![2]] as [Vec<usize>; 2]);
        assert!(batches(&[], 8).is_empty());
    }
}
