//! Protobuf's wire format: the fields of a message, one after the other.
//!
//! Knows nothing of what a field means. Nothing is copied: a model of 2 GB is looked at where it
//! lies, and fields that nobody asks for are gone past.
//! <https://protobuf.dev/programming-guides/encoding/>

use anyhow::{Context, bail};

#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    Varint(u64),
    /// A string, a message, packed numbers; or one number of 4 or 8 bytes, which looks as if it
    /// were packed alone.
    Bytes(&'a [u8]),
}

impl<'a> Value<'a> {
    pub fn bytes(self) -> anyhow::Result<&'a [u8]> {
        match self {
            Value::Bytes(bytes) => Ok(bytes),
            Value::Varint(_) => bail!("a number where bytes belong"),
        }
    }

    pub fn text(self) -> anyhow::Result<String> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    pub fn number(self) -> anyhow::Result<u64> {
        match self {
            Value::Varint(number) => Ok(number),
            Value::Bytes(_) => bail!("bytes where a number belongs"),
        }
    }

    /// Appends the number, or all of them if they are packed.
    pub fn numbers(self, out: &mut Vec<u64>) -> anyhow::Result<()> {
        match self {
            Value::Varint(number) => out.push(number),
            Value::Bytes(mut bytes) => {
                while !bytes.is_empty() {
                    out.push(varint(&mut bytes)?);
                }
            }
        }
        Ok(())
    }
}

/// The fields of `message` with their numbers. Nothing comes after an error.
pub fn fields(mut message: &[u8]) -> impl Iterator<Item = anyhow::Result<(u64, Value<'_>)>> {
    std::iter::from_fn(move || {
        if message.is_empty() {
            return None;
        }
        let field = field(&mut message);
        if field.is_err() {
            message = &[];
        }
        Some(field)
    })
}

fn field<'a>(rest: &mut &'a [u8]) -> anyhow::Result<(u64, Value<'a>)> {
    let tag = varint(rest)?;
    let value = match tag & 7 {
        0 => Value::Varint(varint(rest)?),
        1 => Value::Bytes(take(rest, 8)?),
        2 => {
            let len = varint(rest)?;
            Value::Bytes(take(rest, len)?)
        }
        5 => Value::Bytes(take(rest, 4)?),
        kind => bail!("a field of wire type {kind}"),
    };
    Ok((tag >> 3, value))
}

fn take<'a>(rest: &mut &'a [u8], len: u64) -> anyhow::Result<&'a [u8]> {
    let split = usize::try_from(len).ok().and_then(|len| rest.split_at_checked(len));
    let (taken, after) = split
        .with_context(|| format!("a field of {len} bytes, where only {} follow", rest.len()))?;
    *rest = after;
    Ok(taken)
}

fn varint(rest: &mut &[u8]) -> anyhow::Result<u64> {
    let mut number = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(rest, 1)?[0];
        number |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(number);
        }
    }
    bail!("a number of more than 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_those_of_the_specification() {
        // Its own examples: 150 in field 1, "testing" in field 2, 3, 270 and 86942 packed in field 6.
        let message = b"\x08\x96\x01\x12\x07testing\x32\x06\x03\x8e\x02\x9e\xa7\x05";
        let all: Vec<_> = fields(message).map(Result::unwrap).collect();
        assert_eq!(all[..2], [(1, Value::Varint(150)), (2, Value::Bytes(b"testing"))]);
        let mut numbers = Vec::new();
        all[2].1.numbers(&mut numbers).unwrap();
        assert_eq!((all[2].0, numbers), (6, vec![3, 270, 86942]));
    }

    #[test]
    fn what_is_cut_off_is_an_error_and_the_last() {
        for message in [&b"\x08"[..], b"\x12\x07test", b"\x0d\0\0\0", b"\x0b\0", &[0xff; 11]] {
            let all: Vec<_> = fields(message).collect();
            assert!(all.len() == 1 && all[0].is_err(), "{message:?}: {all:?}");
        }
    }
}
