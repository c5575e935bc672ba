//! A dataset's rows as the trainer takes them, and rows as a batch of tensors.
//!
//! Knows nothing of what a model does with them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use serde_json::Value;
use step::Failure;
use step::worker::{Input, Job};
use tch::{Device, Tensor};
use train::training::Order;
use train::work::Split;

use crate::decoder::{Batch, Packed, Run};

/// The splits that training reads.
pub struct Dataset {
    pub train: Rows,
    pub validation: Option<Rows>,
    folder: PathBuf,
}

impl Dataset {
    /// Opens the job's `dataset`, made with the tokenizer of the artifact `tokenizer`, for a model
    /// of these sizes.
    pub fn open(job: &Job, tokenizer: &Input, vocab: usize, max_positions: usize) -> Result<Self> {
        let input = job.input("dataset")?;
        same_tokenizer(input, tokenizer)?;
        let open = |split: &str| -> Result<Option<Rows>> {
            let path = input.path.join(format!("{split}.safetensors"));
            if !path.exists() {
                return Ok(None);
            }
            let place = format!("split `{split}` of {}", input.origin);
            let rows = Rows::read(&path, place)?;
            rows.check(vocab, max_positions)?;
            Ok(Some(rows))
        };
        let train = open("train")?.ok_or_else(|| {
            Failure::input(format!("{} has no rows to train on", input.origin))
                .hint("give its `split` a share for `train`")
        })?;
        Ok(Self { train, validation: open("validation")?, folder: input.path.clone() })
    }

    /// How hard each row to train on is, where rows come by that.
    pub fn difficulty(&self, order: &Order) -> Result<Option<Vec<f64>>> {
        Ok(match order {
            Order::Random => None,
            Order::Length => Some(self.train.lengths().into_iter().map(|n| n as f64).collect()),
            Order::Tfidf => Some(self.train.rarity()),
            Order::Column(name) => Some(self.column(name)?),
        })
    }

    /// What train.jsonl has under this name, a number in each line.
    fn column(&self, name: &str) -> Result<Vec<f64>> {
        let path = self.folder.join("train.jsonl");
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let numbers = text.lines().enumerate().map(|(n, line)| {
            let row: Option<Value> = serde_json::from_str(line).ok();
            row.and_then(|row| row.get(name)?.as_f64()).ok_or_else(|| {
                let place = &self.train.place;
                Failure::input(format!("row {} of {place} has no number `{name}`", n + 1))
                    .hint(train::keep_column(name))
            })
        });
        let numbers: Vec<f64> = numbers.collect::<Result<_, _>>()?;
        anyhow::ensure!(
            numbers.len() == self.train.len(),
            "{} has {} rows, and as tokens there are {}",
            path.display(),
            numbers.len(),
            self.train.len()
        );
        Ok(numbers)
    }
}

/// Fails if `dataset` was tokenised by another tokenizer than the one in `tokenizer`.
fn same_tokenizer(dataset: &Input, tokenizer: &Input) -> Result<()> {
    #[derive(Deserialize)]
    struct About {
        tokenizer: String,
    }
    let path = dataset.path.join("dataset.json");
    let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let about: About = serde_json::from_slice(&text)
        .map_err(|e| Failure::bug(format!("{} does not parse: {e}", path.display())))?;
    let path = tokenizer.path.join("tokenizer.json");
    let own = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
    if about.tokenizer == blake3::hash(&own).to_hex().as_str() {
        return Ok(());
    }
    Err(Failure::input(format!(
        "{} was tokenised with another tokenizer.json than that of {}",
        dataset.origin, tokenizer.origin
    ))
    .hint("name the same target as the dataset's `tokenizer`, so that token ids mean the same")
    .into())
}

/// Tokenised rows.
///
/// Invariant: offsets ascend from 0 to the number of tokens, and `supervised` has one mark a token.
/// Hence private.
pub struct Rows {
    /// For messages: which split of which artifact.
    place: String,
    ids: Vec<i32>,
    supervised: Vec<u8>,
    offsets: Vec<usize>,
}

/// A row: its token ids, and which of them are targets of the loss.
#[derive(Clone, Copy)]
pub struct Row<'a> {
    pub ids: &'a [i32],
    pub supervised: &'a [u8],
}

impl Rows {
    fn read(path: &Path, place: String) -> Result<Self> {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let bad =
            |what: &str| Failure::bug(format!("{} is no tokenised split: {what}", path.display()));
        let file = SafeTensors::deserialize(&bytes).map_err(|e| bad(&e.to_string()))?;
        let column = |name: &str, dtype| {
            let tensor = file.tensor(name).map_err(|e| bad(&e.to_string()))?;
            if tensor.dtype() != dtype {
                return Err(bad(&format!("`{name}` has dtype {:?}", tensor.dtype())));
            }
            Ok(tensor.data().to_vec())
        };
        let ids = column("input_ids", Dtype::I32)?;
        let ids = ids.as_chunks().0.iter().map(|b| i32::from_le_bytes(*b)).collect();
        let offsets = column("offsets", Dtype::I64)?;
        let offsets = offsets.as_chunks().0.iter().map(|b| i64::from_le_bytes(*b));
        let offsets = offsets.map(usize::try_from).collect::<Result<_, _>>();
        let offsets = offsets.map_err(|_| bad("an offset is negative"))?;
        Self::new(place, ids, column("supervised", Dtype::U8)?, offsets)
            .ok_or_else(|| bad("its offsets do not fit its tokens").into())
    }

    /// None if the columns do not fit one another.
    pub fn new(
        place: String,
        ids: Vec<i32>,
        supervised: Vec<u8>,
        offsets: Vec<usize>,
    ) -> Option<Self> {
        let fit = offsets.first() == Some(&0)
            && offsets.last() == Some(&ids.len())
            && offsets.is_sorted()
            && supervised.len() == ids.len();
        fit.then_some(Self { place, ids, supervised, offsets })
    }

    /// Every id in the vocabulary, every row something to predict and short enough.
    fn check(&self, vocab: usize, max_positions: usize) -> Result<(), Failure> {
        for i in 0..self.len() {
            let row = self.row(i);
            let place = || format!("row {} of {}", i + 1, self.place);
            if let Some(id) = row
                .ids
                .iter()
                .find(|id| usize::try_from(**id).is_ok_and(|id| id >= vocab) || **id < 0)
            {
                return Err(Failure::bug(format!(
                    "{} has token {id}, the model knows {vocab}",
                    place()
                )));
            }
            if row.positions() > max_positions {
                return Err(Failure::input(format!(
                    "{} has {} tokens, the model takes {max_positions}",
                    place(),
                    row.ids.len()
                ))
                .hint(format!("set the dataset's `max_len` to {max_positions} or less")));
            }
            if row.positions() == 0 {
                return Err(Failure::input(format!("{} has nothing to predict", place())));
            }
        }
        Ok(())
    }

    /// For messages: `split `train` of recipes/demo.toml`.
    pub fn place(&self) -> &str {
        &self.place
    }

    pub fn len(&self) -> usize {
        self.offsets.len() - 1
    }

    pub fn row(&self, i: usize) -> Row<'_> {
        let range = self.offsets[i]..self.offsets[i + 1];
        Row { ids: &self.ids[range.clone()], supervised: &self.supervised[range] }
    }

    /// Positions of each row, as [`crate::plan::Plan`] counts them.
    pub fn lengths(&self) -> Vec<usize> {
        (0..self.len()).map(|i| self.row(i).positions()).collect()
    }

    /// The mean over each row's tokens of ln(rows / rows that have the token): a token's weight in
    /// tf–idf (Spärck Jones, 1972), summed over the row.
    fn rarity(&self) -> Vec<f64> {
        let tokens = self.ids.iter().max().map_or(0, |id| *id as usize + 1);
        let mut having = vec![0_u32; tokens];
        let mut seen_in = vec![usize::MAX; tokens];
        for row in 0..self.len() {
            for id in self.row(row).ids {
                let id = *id as usize;
                having[id] += u32::from(seen_in[id] != row);
                seen_in[id] = row;
            }
        }
        // Whole millionths: a sum that hangs neither on its order nor on a logarithm's last bit.
        let rarity = |having: &u32| (1e6 * (self.len() as f64 / f64::from(*having)).ln()).round();
        let rarity: Vec<f64> = having.iter().map(rarity).collect();
        let of = |ids: &[i32]| ids.iter().map(|id| rarity[*id as usize]).sum::<f64>();
        (0..self.len()).map(|row| self.row(row).ids).map(|ids| of(ids) / ids.len() as f64).collect()
    }

    /// As dataset.json tells of them.
    pub fn split(&self) -> Split {
        let supervised = self.supervised.iter().filter(|mark| **mark == 1).count();
        let [rows, tokens, supervised] =
            [self.len(), self.ids.len(), supervised].map(|count| count as u64);
        Split { rows, tokens, supervised }
    }

    /// What the targets of `rows` count together.
    pub fn weight(&self, rows: &[u32], prompt_weight: f64) -> f64 {
        let targets = rows.iter().flat_map(|row| &self.row(*row as usize).supervised[1..]);
        targets.map(|mark| weight_of(*mark, prompt_weight)).sum()
    }

    /// Tokens of `rows`, padding not counted.
    pub fn tokens(&self, rows: &[u32]) -> usize {
        rows.iter().map(|row| self.row(*row as usize).ids.len()).sum()
    }

    /// The batch that `rows` make: one sequence when `packed`, else padded to the longest.
    ///
    /// Padding comes after a row's tokens, so no position that counts attends to it.
    pub fn batch(&self, rows: &[u32], packed: bool, prompt_weight: f64, device: Device) -> Batch {
        let mut rows: Vec<Row> = rows.iter().map(|row| self.row(*row as usize)).collect();
        if packed {
            // Those of one length attend together.
            rows.sort_by_key(Row::positions);
        }
        let length = match packed {
            true => rows.iter().map(Row::positions).sum(),
            false => rows.iter().map(Row::positions).max().unwrap_or(0),
        };
        let height = if packed { 1 } else { rows.len() };
        let mut ids = vec![0_i64; height * length];
        let mut lengths = vec![0_i64; height * length];
        let (mut predicting, mut targets, mut weights) = (Vec::new(), Vec::new(), Vec::new());
        let mut start = 0;
        for row in &rows {
            for position in 0..row.positions() {
                ids[start + position] = i64::from(row.ids[position]);
                let weight = weight_of(row.supervised[position + 1], prompt_weight);
                if weight > 0.0 {
                    predicting.push((start + position) as i64);
                    targets.push(i64::from(row.ids[position + 1]));
                    weights.push(weight as f32);
                }
            }
            let width = if packed { row.positions() } else { length };
            lengths[start..start + width].fill(row.ids.len() as i64);
            start += width;
        }
        Batch {
            ids: Tensor::from_slice(&ids).view([height as i64, length as i64]).to_device(device),
            lengths: Tensor::from_slice(&lengths)
                .view([height as i64, length as i64])
                .to_device(device),
            packed: packed.then(|| end_to_end(&rows, device)),
            predicting: Tensor::from_slice(&predicting).to_device(device),
            targets: Tensor::from_slice(&targets).to_device(device),
            weights: Tensor::from_slice(&weights).to_device(device),
        }
    }
}

impl Row<'_> {
    /// Tokens that predict another one: all but the last.
    fn positions(&self) -> usize {
        self.ids.len().saturating_sub(1)
    }
}

fn weight_of(mark: u8, prompt_weight: f64) -> f64 {
    if mark == 1 { 1.0 } else { prompt_weight }
}

/// Rows by their length: each counts its positions from 0.
fn end_to_end(rows: &[Row], device: Device) -> Packed {
    let positions: Vec<i64> = rows.iter().flat_map(|row| 0..row.positions() as i64).collect();
    let same = rows.chunk_by(|a, b| a.positions() == b.positions());
    let runs = same.map(|rows| Run { rows: rows.len() as i64, length: rows[0].positions() as i64 });
    Packed { positions: Tensor::from_slice(&positions).to_device(device), runs: runs.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_as_hard_as_their_order_says() {
        // Token 0 is in every row, 1 in two, 2 and 3 in one.
        let ids = vec![0, 1, 0, 0, 1, 2, 0, 3, 3];
        let rows = Rows::new("rows".into(), ids, vec![1; 9], vec![0, 3, 6, 9]).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let lines = "{\"text\":\"a\",\"level\":2.5}\n{\"level\":-1}\n{\"level\":3,\"late\":1}\n";
        std::fs::write(folder.path().join("train.jsonl"), lines).unwrap();
        let data = Dataset { train: rows, validation: None, folder: folder.path().into() };
        let difficulty = |order| data.difficulty(&order).unwrap();
        let (two, one) = (1.5_f64.ln(), 3.0_f64.ln());
        let expected = [two / 3.0, (two + one) / 3.0, 2.0 * one / 3.0];
        for (found, expected) in difficulty(Order::Tfidf).unwrap().iter().zip(expected) {
            assert!((found / 1e6 - expected).abs() < 1e-6, "{found} {expected}");
        }
        assert_eq!(difficulty(Order::Length), Some(vec![2.0; 3]));
        assert_eq!(difficulty(Order::Random), None);
        assert_eq!(difficulty(Order::Column("level".into())), Some(vec![2.5, -1.0, 3.0]));
        let error = data.difficulty(&Order::Column("late".into())).unwrap_err();
        let failure = error.downcast::<Failure>().unwrap();
        assert_eq!(failure.message, "row 1 of rows has no number `late`");
        let hint = "give `columns = [\"late\"]` to the dataset, whose rows have a number for it";
        assert_eq!(failure.hint.as_deref(), Some(hint));
    }
}
