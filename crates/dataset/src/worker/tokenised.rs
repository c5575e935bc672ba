//! Rows as tokens in a safetensors file: `input_ids` I32 and `supervised` U8 of all rows one after
//! the other, `offsets` I64 of where each begins, with the end as the last one.

use std::path::Path;

use anyhow::{Context, Result};
use safetensors::tensor::{Dtype, TensorView, serialize};

#[derive(Default)]
pub struct Tokenised {
    ids: Vec<i32>,
    supervised: Vec<u8>,
    ends: Vec<i64>,
}

impl Tokenised {
    pub fn push(&mut self, row: &[(u32, bool)]) {
        self.ids.extend(row.iter().map(|(id, _)| *id as i32));
        self.supervised.extend(row.iter().map(|(_, learned)| u8::from(*learned)));
        self.ends.push(self.ids.len() as i64);
    }

    pub fn rows(&self) -> usize {
        self.ends.len()
    }

    pub fn tokens(&self) -> usize {
        self.ids.len()
    }

    pub fn supervised(&self) -> usize {
        self.supervised.iter().map(|&mark| usize::from(mark)).sum()
    }

    pub fn write(&self, path: &Path) -> Result<()> {
        let ids: Vec<u8> = self.ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let offsets: Vec<u8> =
            [0].iter().chain(&self.ends).flat_map(|end| end.to_le_bytes()).collect();
        let view = |dtype, length: usize, data| TensorView::new(dtype, vec![length], data);
        let tensors = [
            ("input_ids", view(Dtype::I32, self.ids.len(), &ids)?),
            ("offsets", view(Dtype::I64, self.ends.len() + 1, &offsets)?),
            ("supervised", view(Dtype::U8, self.ids.len(), &self.supervised)?),
        ];
        let bytes = serialize(tensors, None)?;
        std::fs::write(path, bytes).with_context(|| format!("cannot write {}", path.display()))
    }
}
