//! What exports are tried with: a row of tokens that is the same each time.
//!
//! Knows nothing of exports. Any text does, as nothing is judged but how far two computations of it
//! are apart; the model's own tokens are likelier to be ones that it was trained on.

use std::ops::Range;
use std::path::Path;

use checkpoint::chat::Tokenizer;
use checkpoint::config::Config;

const PASSAGE: &str = "The river rose 3 metres in 24 hours, and nobody in the village had ever seen \
    it so high. \"Where is the ferry?\" she asked. Personne ne savait: le bac n'était plus là. \
    fn crossed(rivers: &[River]) -> usize { rivers.len() + 1 } // 川を渡る\n";

const TOKENS: usize = 48;
/// However large the model is.
const LEAST: usize = 8;
/// Positions whose logits are compared: the last.
const COMPARED: usize = 8;
/// Parameters × tokens: some ten seconds of one processor. Gemma 3 270M's window is within it.
const MOST: usize = 150_000_000_000;

/// A row of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub ids: Vec<u32>,
    /// The positions whose logits are compared.
    pub of: Range<usize>,
    /// What the row does not reach.
    pub notes: Vec<String>,
}

impl Probe {
    /// For the model in the folder `dir`: a passage in its own tokens, else tokens from all over its
    /// vocabulary. The row goes beyond the model's sliding windows where that is not too much work.
    pub fn new(dir: &Path, config: &Config) -> Self {
        let most = (MOST / config.parameters().max(1)).max(LEAST).min(config.max_positions);
        let window = config.windows.iter().flatten().min().copied();
        let mut length = TOKENS.min(most);
        let mut notes = Vec::new();
        if let Some(window) = window.filter(|window| *window < config.max_positions) {
            // All that is compared has something behind its window.
            let beyond = TOKENS.max(window.saturating_add(COMPARED)).min(config.max_positions);
            if beyond <= most {
                length = beyond;
            } else {
                notes.push(format!(
                    "compared over {length} tokens: the window of {window} was not reached"
                ));
            }
        }
        let ids = passage(dir, config).unwrap_or_else(|| spread(config.vocab_size));
        let first = config.bos_token_id.filter(|id| (*id as usize) < config.vocab_size);
        let ids = first.into_iter().chain(ids.into_iter().cycle()).take(length).collect();
        Self { ids, of: length.saturating_sub(COMPARED)..length, notes }
    }
}

/// `None` if the folder has no tokenizer that can be read, or one of another vocabulary.
fn passage(dir: &Path, config: &Config) -> Option<Vec<u32>> {
    let ids = Tokenizer::from_dir(dir).ok()?.encode(PASSAGE).ok()?;
    let known = !ids.is_empty() && ids.iter().all(|id| (*id as usize) < config.vocab_size);
    known.then_some(ids)
}

fn spread(vocab: usize) -> Vec<u32> {
    (0..TOKENS).map(|i| ((2 * i + 1) * vocab / (2 * TOKENS)) as u32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Layers of 10 hidden units and as many more parameters as a larger vocabulary has.
    fn config(vocab: usize, window: usize) -> Config {
        let json = format!(
            r#"{{"model_type":"mistral","hidden_size":10,"num_hidden_layers":1,"vocab_size":{vocab},
            "num_attention_heads":1,"intermediate_size":10,"max_position_embeddings":200,
            "tie_word_embeddings":true,"bos_token_id":1,"sliding_window":{window}}}"#
        );
        Config::parse(&json, Path::new("config.json")).unwrap()
    }

    #[test]
    fn rows_go_beyond_windows_where_that_is_cheap() {
        for (vocab, window, length, notes) in [
            (100, 200, 48, 0),
            (100, 5, 48, 0),
            (100, 60, 68, 0),
            (100, 196, 200, 0),
            // A billion parameters, ten billion, a hundred.
            (100_000_000, 60, 68, 0),
            (100_000_000, 150, 48, 1),
            (1_000_000_000, 200, 14, 0),
            (10_000_000_000, 200, 8, 0),
        ] {
            let probe = Probe::new(Path::new("nowhere"), &config(vocab, window));
            assert_eq!((probe.ids.len(), probe.notes.len()), (length, notes), "{vocab} {window}");
            assert_eq!(probe.of, length.saturating_sub(8)..length);
            assert_eq!(probe.ids[0], 1);
            assert!(probe.ids.iter().all(|id| (*id as usize) < vocab));
        }
    }

    #[test]
    fn a_model_reads_its_own_tokens() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../gguf/src/worker/golden");
        let temp = tempfile::tempdir().unwrap();
        let model = std::fs::read_to_string(dir.join("bytes.json")).unwrap();
        let json = format!(
            r#"{{"version":"1.0","added_tokens":[],"pre_tokenizer":{{"type":"ByteLevel",
            "add_prefix_space":false,"trim_offsets":true,"use_regex":true}},"decoder":{{"type":
            "ByteLevel","add_prefix_space":false,"trim_offsets":true,"use_regex":true}},
            "model":{model}}}"#
        );
        std::fs::write(temp.path().join("tokenizer.json"), json).unwrap();
        let mut config = config(900, 200);
        let probe = Probe::new(temp.path(), &config);
        let tokenizer = Tokenizer::from_dir(temp.path()).unwrap();
        let read = tokenizer.decode(&probe.ids[1..], false).unwrap();
        assert!(PASSAGE.starts_with(&read) && read.starts_with("The river"), "{read}");
        // Another vocabulary's tokens are none of the model's.
        config.vocab_size = 50;
        assert!(Probe::new(temp.path(), &config).ids.iter().all(|id| *id < 50));
    }
}
