//! The tokens of tokenizer.json and their ids, as they are written there.
//!
//! Knows nothing of what a tokenizer makes of them: to read a large vocabulary takes a tenth of the
//! time of setting it up to tokenize.

use std::fmt;

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

/// `model.vocab`: each token and its id, as they come.
#[derive(Debug, Default)]
pub struct Vocab(pub Vec<(String, u32)>);

impl<'de> Deserialize<'de> for Vocab {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Tokens).map(Self)
    }
}

struct Tokens;

impl<'de> Visitor<'de> for Tokens {
    type Value = Vec<(String, u32)>;

    fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str("tokens and their ids")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
        let mut all = Vec::new();
        while let Some(entry) = map.next_entry()? {
            all.push(entry);
        }
        Ok(all)
    }

    /// Of a model of type Unigram: pairs of a token and its score. Their places are the ids.
    fn visit_seq<S: SeqAccess<'de>>(self, mut seq: S) -> Result<Self::Value, S::Error> {
        let mut all = Vec::new();
        while let Some((text, IgnoredAny)) = seq.next_element()? {
            all.push((text, all.len() as u32));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vocabularies_come_in_two_spellings() {
        let read = |text: &str| serde_json::from_str::<Vocab>(text).map(|vocab| vocab.0);
        let expected = [("b".to_string(), 0), ("a\"".to_string(), 1)];
        assert_eq!(read(r#"{"b": 0, "a\"": 1}"#).unwrap(), expected);
        assert_eq!(read(r#"[["b", 0.0], ["a\"", -1.5]]"#).unwrap(), expected);
        for bad in [r#"{"a": "0"}"#, r#"{"a": -1}"#, r#"["a"]"#, "7"] {
            assert!(read(bad).is_err(), "{bad}");
        }
    }
}
