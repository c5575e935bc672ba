//! Under which terms a model is handed out, and what those terms ask for.
//!
//! Knows the identifiers of the Hugging Face hub. It reads no law: it looks for the texts and the
//! sentences that a licence asks to be handed on, and says which are not there.

use std::path::Path;

use serde::{Deserialize, Serialize};
use step::Failure;

/// The file of a model folder that names its licence. It is carried wherever `LICENSE*` is.
pub const FILE: &str = "LICENSE.json";

/// Whose work it is, and its licence as the hub spells it: `apache-2.0`, `gemma`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Licence {
    /// `google/gemma-3-270m-it`; empty for what was made here.
    #[serde(default)]
    pub of: String,
    pub license: String,
}

impl Licence {
    /// What a model folder says of itself, if anything.
    pub fn read(dir: &Path) -> Result<Option<Self>, Failure> {
        let path = dir.join(FILE);
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(Failure::environment(format!("{}: {e}", path.display()))),
        };
        serde_json::from_slice(&text)
            .map(Some)
            .map_err(|e| Failure::input(format!("{FILE} names no licence: {e}")))
    }
}

/// The licence that a model card names in its head: `license: gemma`, or of one that the hub has no
/// name for, `license_name`.
pub fn of_card(card: &str) -> Option<String> {
    let (head, _) = card.strip_prefix("---\n")?.split_once("\n---")?;
    let value = |key: &str| {
        let line = head.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let value = line.trim().trim_matches(['"', '\'']);
        (!value.is_empty()).then(|| value.to_string())
    };
    match value("license")?.as_str() {
        "other" => Some(value("license_name").unwrap_or_else(|| "other".into())),
        license => Some(license.to_string()),
    }
}

/// What a licence asks to go along with the work.
struct Terms {
    /// A licence's name, or its beginning.
    of: &'static str,
    /// Whether its own text must be there, since it names the authors.
    text: bool,
    /// Sentences that must stand in a notice.
    notices: &'static [&'static str],
}

/// Those whose name begins so; of several, the first. Any other licence asks for its text.
const TERMS: &[Terms] = &[
    // Its text is the same for all, and every site has it.
    Terms { of: "apache-2.0", text: false, notices: &[] },
    Terms { of: "cc0-1.0", text: false, notices: &[] },
    Terms { of: "unlicense", text: false, notices: &[] },
    // Section 3.1 of the Gemma Terms of Use.
    Terms {
        of: "gemma",
        text: true,
        notices: &["Gemma is provided under and subject to the Gemma Terms of Use found at"],
    },
    // Section 1.b of each community licence.
    Terms {
        of: "llama3",
        text: true,
        notices: &["Built with", "Copyright © Meta Platforms, Inc. All Rights Reserved"],
    },
    Terms {
        of: "llama2",
        text: true,
        notices: &["Copyright (c) Meta Platforms, Inc. All Rights Reserved"],
    },
];

/// Identifiers of SPDX that are the hub's but for capitals.
const SPDX: &[&str] = &[
    "AFL-3.0",
    "AGPL-3.0",
    "Apache-2.0",
    "Artistic-2.0",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "BSD-3-Clause-Clear",
    "BSL-1.0",
    "CC-BY-2.0",
    "CC-BY-2.5",
    "CC-BY-3.0",
    "CC-BY-4.0",
    "CC-BY-NC-2.0",
    "CC-BY-NC-3.0",
    "CC-BY-NC-4.0",
    "CC-BY-NC-ND-3.0",
    "CC-BY-NC-ND-4.0",
    "CC-BY-NC-SA-2.0",
    "CC-BY-NC-SA-3.0",
    "CC-BY-NC-SA-4.0",
    "CC-BY-ND-4.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC0-1.0",
    "ECL-2.0",
    "EPL-1.0",
    "EPL-2.0",
    "EUPL-1.1",
    "EUPL-1.2",
    "GPL-2.0",
    "GPL-3.0",
    "ISC",
    "LGPL-2.1",
    "LGPL-3.0",
    "LPPL-1.3c",
    "MIT",
    "MPL-2.0",
    "MS-PL",
    "NCSA",
    "OFL-1.1",
    "OSL-3.0",
    "PostgreSQL",
    "Unlicense",
    "WTFPL",
    "Zlib",
];

/// SPDX's identifier of what the hub calls `license`; none where SPDX knows no such licence.
pub fn spdx(license: &str) -> Option<&'static str> {
    SPDX.iter().find(|id| id.eq_ignore_ascii_case(license)).copied()
}

/// What must be there and is not, given all that is handed on: file names and their texts.
pub fn lacks(licence: Option<&Licence>, texts: &[(String, String)]) -> Vec<String> {
    let Some(Licence { of, license }) = licence else {
        return vec![
            "a licence: nothing says under which terms the model may be handed out".into(),
        ];
    };
    let id = license.to_lowercase();
    let terms = TERMS.iter().find(|terms| id.starts_with(terms.of));
    let of = if of.is_empty() { "the model" } else { of };
    let mut missing = Vec::new();
    let named = |start: &str| texts.iter().any(|(name, _)| name.starts_with(start));
    if terms.is_none_or(|terms| terms.text) && !named("LICENSE") {
        missing.push(format!("LICENSE, the text of the licence `{license}` of {of}"));
    }
    let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    for notice in terms.map_or(&[][..], |terms| terms.notices) {
        let wanted = flat(notice);
        if !texts.iter().any(|(_, text)| flat(text).contains(&wanted)) {
            missing.push(format!("the notice “{notice} …”, which `{license}` of {of} asks for"));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lacking(license: &str, texts: &[(&str, &str)]) -> usize {
        let licence = Licence { of: "a/b".into(), license: license.into() };
        let texts: Vec<_> = texts.iter().map(|(n, t)| (n.to_string(), t.to_string())).collect();
        lacks(Some(&licence), &texts).len()
    }

    #[test]
    fn spdx_knows_some_of_the_hubs_licences() {
        assert_eq!(spdx("apache-2.0"), Some("Apache-2.0"));
        assert_eq!(spdx("unlicense"), Some("Unlicense"));
        assert_eq!(spdx("gemma"), None);
    }

    #[test]
    fn a_card_names_a_licence() {
        for (card, license) in [
            ("---\nlicense: gemma\ntags: []\n---\n# A", Some("gemma")),
            ("---\nlicense_name: x\nlicense: other\n---\n", Some("x")),
            ("---\nlicense: 'mit'\n---\n", Some("mit")),
            ("---\ntags: []\n---\nlicense: mit\n", None),
            ("license: mit", None),
        ] {
            assert_eq!(of_card(card).as_deref(), license, "{card}");
        }
    }

    #[test]
    fn each_licence_asks_for_its_own() {
        const GEMMA: &str = "Gemma is provided under and subject to the Gemma Terms of Use found\n\
                             at ai.google.dev/gemma/terms";
        const META: &str = "Built with Llama. Llama 3.2 is licensed under the Llama 3.2 Community \
                            License, Copyright © Meta Platforms, Inc. All Rights Reserved.";
        for (license, texts, missing) in [
            ("apache-2.0", &[][..], 0),
            ("Apache-2.0", &[], 0),
            ("mit", &[], 1),
            ("mit", &[("LICENSE.txt", "Copyright (c) 2024 A")], 0),
            ("gemma", &[], 2),
            ("gemma", &[("NOTICE", GEMMA)], 1),
            ("gemma", &[("NOTICE", GEMMA), ("LICENSE", "terms")], 0),
            ("llama3.2", &[("LICENSE.txt", "terms")], 2),
            ("llama3.2", &[("LICENSE.txt", "terms"), ("NOTICE", META)], 0),
            ("other", &[], 1),
        ] {
            assert_eq!(lacking(license, texts), missing, "{license} {texts:?}");
        }
        assert_eq!(lacks(None, &[]).len(), 1);
    }
}
