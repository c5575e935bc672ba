//! Words of a command line with places in braces: `--in={dataset}/train.jsonl`.
//!
//! Knows nothing of what the places stand for.

/// A piece of a word.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Text(String),
    /// What stands between braces.
    Place(String),
}

/// Cuts a word into its parts. `{{` and `}}` are braces themselves.
pub fn parse(word: &str) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    let mut text = String::new();
    let mut rest = word;
    while let Some(at) = rest.find(['{', '}']) {
        text.push_str(&rest[..at]);
        let brace = &rest[at..=at];
        let after = &rest[at + 1..];
        if let Some(after) = after.strip_prefix(brace) {
            text.push_str(brace);
            rest = after;
        } else if brace == "{" {
            let Some(close) = after.find('}') else {
                return Err(format!("`{word}` has a `{{` that nothing closes"));
            };
            if !text.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut text)));
            }
            parts.push(Part::Place(after[..close].to_string()));
            rest = &after[close + 1..];
        } else {
            return Err(format!("`{word}` has a `}}` that nothing opens"));
        }
    }
    text.push_str(rest);
    if !text.is_empty() {
        parts.push(Part::Text(text));
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_cut_at_braces() {
        let text = |t: &str| Part::Text(t.into());
        let place = |t: &str| Part::Place(t.into());
        for (word, parts) in [
            ("", vec![]),
            ("plain", vec![text("plain")]),
            ("{out}", vec![place("out")]),
            ("-o{out}/a b", vec![text("-o"), place("out"), text("/a b")]),
            ("{{x}}{y}", vec![text("{x}"), place("y")]),
        ] {
            assert_eq!(parse(word), Ok(parts), "{word}");
        }
        for word in ["{out", "out}", "{{out}"] {
            assert!(parse(word).is_err(), "{word}");
        }
    }
}
