//! Where a file is cut, so that files which share something share pieces: safetensors, GGUF and the
//! external data of ONNX at their tensors, all else where its content says.
//!
//! Knows nothing of where pieces go. A header that makes no sense costs sharing, and nothing else:
//! whatever the cuts are, the pieces together are the file.

pub mod onnx;

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::ops::Range;

/// No piece is larger: so much of a file is in memory at once for each that travels.
pub const LARGEST: u64 = 8 << 20;
/// Smaller ones are put together.
pub const SMALL: u64 = 256 << 10;
/// A header that is longer is none.
pub const HEADER: u64 = 256 << 20;

/// The pieces of a file of so many bytes, in order. `tensors` are the offsets that another file knows.
pub fn pieces(file: &File, size: u64, tensors: &[u64]) -> std::io::Result<Vec<Range<u64>>> {
    if size <= SMALL {
        return Ok(std::iter::once(0..size).filter(|piece| !piece.is_empty()).collect());
    }
    if !tensors.is_empty() {
        return Ok(merged(tensors, size));
    }
    let mut start = [0; 16];
    let mut reader = file;
    reader.seek(SeekFrom::Start(0))?;
    reader.read_exact(&mut start)?;
    let cuts = match &start[..4] == b"GGUF" {
        true => gguf(file),
        false => safetensors(file, size),
    };
    match cuts {
        Some(cuts) => Ok(merged(&cuts, size)),
        None => by_content(file, size),
    }
}

/// Where tensors begin in a safetensors file.
fn safetensors(mut file: &File, size: u64) -> Option<Vec<u64>> {
    file.seek(SeekFrom::Start(0)).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let length = u64::from_le_bytes(length);
    if length > size.saturating_sub(8).min(HEADER) {
        return None;
    }
    let mut header = vec![0; usize::try_from(length).ok()?];
    file.read_exact(&mut header).ok()?;
    let header: serde_json::Map<String, serde_json::Value> =
        serde_json::from_slice(&header).ok()?;
    let data = 8 + length;
    let mut cuts = vec![data];
    for (name, tensor) in &header {
        if name != "__metadata__" {
            cuts.push(data.checked_add(tensor.get("data_offsets")?.get(0)?.as_u64()?)?);
        }
    }
    Some(cuts)
}

/// Where tensors begin in a GGUF file. The layout is in ggml's docs/gguf.md.
fn gguf(file: &File) -> Option<Vec<u64>> {
    let mut file = BufReader::new(file);
    file.seek(SeekFrom::Start(4)).ok()?;
    let mut gguf = Gguf { file, left: HEADER };
    if !(2..=3).contains(&gguf.number(4)?) {
        return None;
    }
    let (tensors, pairs) = (gguf.number(8)?, gguf.number(8)?);
    let mut alignment = 32;
    for _ in 0..pairs {
        let name = gguf.text()?;
        let kind = gguf.number(4)?;
        match (name.as_slice(), kind) {
            (b"general.alignment", 4) => alignment = gguf.number(4)?,
            _ => gguf.skip_value(kind)?,
        }
    }
    let mut offsets = Vec::new();
    for _ in 0..tensors {
        gguf.text()?;
        let dimensions = gguf.number(4)?;
        gguf.skip(dimensions.checked_mul(8)?)?;
        gguf.number(4)?;
        offsets.push(gguf.number(8)?);
    }
    let data = gguf.file.stream_position().ok()?.checked_next_multiple_of(alignment)?;
    offsets.into_iter().map(|offset| data.checked_add(offset)).collect()
}

struct Gguf<'a> {
    file: BufReader<&'a File>,
    /// Bytes of header that may still come.
    left: u64,
}

impl Gguf<'_> {
    fn number(&mut self, width: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        self.take(width as u64)?;
        self.file.read_exact(&mut bytes[..width]).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    fn text(&mut self) -> Option<Vec<u8>> {
        let length = self.number(8)?;
        self.take(length)?;
        let mut bytes = vec![0; usize::try_from(length).ok()?];
        self.file.read_exact(&mut bytes).ok()?;
        Some(bytes)
    }

    fn skip_value(&mut self, kind: u64) -> Option<()> {
        const WIDTHS: [u64; 13] = [1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8];
        match kind {
            8 => self.text().map(drop),
            9 => {
                let (kind, count) = (self.number(4)?, self.number(8)?);
                match kind {
                    8 => (0..count).try_for_each(|_| self.text().map(drop)),
                    // Arrays of arrays: nobody writes them.
                    9 => None,
                    kind => {
                        let width = WIDTHS.get(usize::try_from(kind).ok()?)?;
                        self.skip(count.checked_mul(*width)?)
                    }
                }
            }
            kind => self.skip(*WIDTHS.get(usize::try_from(kind).ok()?)?),
        }
    }

    fn skip(&mut self, bytes: u64) -> Option<()> {
        self.take(bytes)?;
        self.file.seek_relative(i64::try_from(bytes).ok()?).ok()
    }

    fn take(&mut self, bytes: u64) -> Option<()> {
        self.left = self.left.checked_sub(bytes)?;
        Some(())
    }
}

/// Pieces between `cuts`: those that are too large in parts, small neighbours together.
fn merged(cuts: &[u64], size: u64) -> Vec<Range<u64>> {
    const TOGETHER: u64 = 1 << 20;
    let mut ends: Vec<u64> = cuts.iter().copied().filter(|cut| (1..size).contains(cut)).collect();
    ends.push(size);
    ends.sort_unstable();
    ends.dedup();
    let mut pieces: Vec<Range<u64>> = Vec::new();
    let mut start = 0;
    for end in ends {
        let small = end - start < TOGETHER;
        match pieces.last_mut() {
            Some(last) if small && last.end - last.start < TOGETHER => last.end = end,
            _ => {
                let mut from = start;
                while from < end {
                    let to = end.min(from + LARGEST);
                    pieces.push(from..to);
                    from = to;
                }
            }
        }
        start = end;
    }
    pieces
}

/// Cuts that a change in the middle of a file moves around itself only (FastCDC).
fn by_content(mut file: &File, size: u64) -> std::io::Result<Vec<Range<u64>>> {
    file.seek(SeekFrom::Start(0))?;
    let largest = usize::try_from(LARGEST).expect("8 MiB fit");
    let chunks = fastcdc::v2020::StreamCDC::new(file, largest / 16, largest / 4, largest);
    let mut pieces = Vec::new();
    for chunk in chunks {
        let chunk = chunk.map_err(std::io::Error::other)?;
        pieces.push(chunk.offset..chunk.offset + chunk.length as u64);
    }
    match pieces.last().is_some_and(|last| last.end == size) {
        true => Ok(pieces),
        false => Err(std::io::Error::other("it changed while it was read")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn cut(bytes: &[u8]) -> Vec<Range<u64>> {
        cut_at(bytes, &[])
    }

    fn cut_at(bytes: &[u8], tensors: &[u64]) -> Vec<Range<u64>> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let pieces = pieces(&file, bytes.len() as u64, tensors).unwrap();
        let mut at = 0;
        for piece in &pieces {
            assert_eq!(piece.start, at);
            assert!(piece.end > at && piece.end - at <= LARGEST);
            at = piece.end;
        }
        assert_eq!(at, bytes.len() as u64);
        pieces
    }

    fn noise(size: usize, seed: u64) -> Vec<u8> {
        let mut bytes = vec![0; size];
        fastrand::Rng::with_seed(seed).fill(&mut bytes);
        bytes
    }

    fn model(tensors: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, bytes) in tensors {
            let from = data.len();
            data.extend_from_slice(bytes);
            let offsets = [from, data.len()];
            let tensor =
                serde_json::json!({"dtype": "U8", "shape": [bytes.len()], "data_offsets": offsets});
            header.insert((*name).into(), tensor);
        }
        let header = serde_json::to_vec(&header).unwrap();
        [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
    }

    #[test]
    fn tensors_that_two_models_share_are_pieces_of_both() {
        let shared = noise(20 << 20, 1);
        let one = model(&[("a", noise(3 << 20, 2)), ("b", shared.clone()), ("n", noise(99, 3))]);
        // Longer names and another size before it.
        let two = model(&[("a-long-name", noise((2 << 20) + 7, 4)), ("b", shared.clone())]);
        let both = [cut(&one), cut(&two)];
        let digests = |bytes: &[u8], pieces: &[Range<u64>]| -> Vec<blake3::Hash> {
            let of =
                |piece: &Range<u64>| blake3::hash(&bytes[piece.start as usize..piece.end as usize]);
            pieces.iter().map(of).collect()
        };
        let (one, two) = (digests(&one, &both[0]), digests(&two, &both[1]));
        for part in shared.chunks(LARGEST as usize) {
            assert!(one.contains(&blake3::hash(part)) && two.contains(&blake3::hash(part)));
        }
    }

    #[test]
    fn another_file_says_where_tensors_begin() {
        let (first, shared) = (noise(3_000_000, 7), noise(9 << 20, 8));
        let pieces = cut_at(&[&first[..], &shared].concat(), &[0, 3_000_000, u64::MAX]);
        assert_eq!(pieces[..2], [0..3_000_000, 3_000_000..3_000_000 + LARGEST]);
        assert_eq!(pieces.len(), 3);
    }

    #[test]
    fn a_row_in_the_middle_moves_the_cuts_around_it_only() {
        let before = noise(60 << 20, 5);
        let mut after = before.clone();
        after.splice(30 << 20..30 << 20, *b"a new row\n");
        let count = |bytes: &[u8], pieces: Vec<Range<u64>>| -> std::collections::HashSet<_> {
            let of =
                |piece: Range<u64>| blake3::hash(&bytes[piece.start as usize..piece.end as usize]);
            pieces.into_iter().map(of).collect()
        };
        let (one, two) = (count(&before, cut(&before)), count(&after, cut(&after)));
        assert!(two.difference(&one).count() <= 2, "{} of {}", one.len(), two.len());
    }

    #[test]
    fn a_header_that_lies_costs_nothing_but_sharing() {
        for start in [
            &b"GGUF\x03\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"[..],
            b"GGUF\x09\0\0\0",
            b"\x02\0\0\0\0\0\0\0{}",
            b"\xff\xff\xff\xff\xff\xff\xff\xff{}",
            br#"x       {"a": {"data_offsets": [18446744073709551615, 0]}}"#,
        ] {
            cut(&[start, &noise(1 << 20, 6)].concat());
        }
        assert_eq!(cut(b""), []);
        assert_eq!(cut(b"x").len(), 1);
    }
}
