//! The nearest known word to one that is not known.
//!
//! Knows nothing of what the words stand for.

/// The candidate that was most likely meant, if one is near enough: a third of its letters, at
/// most, put in, left out, changed or swapped. Case, `-` and `_` count for nothing.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = fold(word);
    candidates
        .into_iter()
        .filter_map(|candidate| {
            let folded = fold(candidate);
            let distance = strsim::damerau_levenshtein(&word, &folded);
            let length = word.chars().count().max(folded.chars().count());
            (distance <= length.max(3) / 3).then_some((distance, candidate))
        })
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

fn fold(word: &str) -> String {
    word.to_lowercase().replace('_', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        const KEYS: [&str; 6] = ["rank", "alpha", "max_len", "learning_rate", "lr", "merge/lora"];
        for (word, meant) in [
            ("rnak", Some("rank")),
            ("Rank", Some("rank")),
            ("max-len", Some("max_len")),
            ("maxlen", Some("max_len")),
            ("learning-rte", Some("learning_rate")),
            ("merge/lroa", Some("merge/lora")),
            ("epochs", None),
            ("", None),
        ] {
            assert_eq!(nearest(word, KEYS), meant, "{word}");
        }
    }
}
