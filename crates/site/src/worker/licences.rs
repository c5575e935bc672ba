//! `LICENSES.txt`: whose work a site hands out, and under which terms.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use release::{Licence, licence};
use serde_json::Value;
use step::Failure;
use step::worker::Input;

/// ONNX Runtime's package names its licence and holds no text of it.
const MIT: &str = r#"MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"#;

/// Under which terms the model is handed out, and what goes along with it.
pub struct Terms {
    pub licence: Option<Licence>,
    /// Name and text of each licence and notice.
    texts: Vec<(String, String)>,
}

impl Terms {
    /// What the licence asks for and is not there.
    pub fn lacks(&self) -> Vec<String> {
        licence::lacks(self.licence.as_ref(), &self.texts)
    }
}

/// What the model's folder says of its licence, else what the recipe does.
pub fn of_model(model: &Input, said: Option<&str>, notices: &[Input]) -> anyhow::Result<Terms> {
    let named = Licence::read(&model.path)?;
    let licence = match (named, said) {
        (Some(named), Some(said)) if !named.license.eq_ignore_ascii_case(said) => {
            return Err(Failure::input(format!(
                "license = \"{said}\", but {} is under `{}`",
                model.origin, named.license
            ))
            .hint("take the key away: what is made of a model stays under its licence")
            .into());
        }
        (Some(named), _) => Some(named),
        (None, said) => said.map(|id| Licence { of: String::new(), license: id.into() }),
    };
    let mut texts = Vec::new();
    let legal = |name: &str| {
        name != licence::FILE
            && ["LICENSE", "NOTICE", "USE_POLICY"].iter().any(|start| name.starts_with(start))
    };
    for input in std::iter::once(model).chain(notices) {
        for path in crate::chat::list(&input.path)? {
            if input.path != model.path || legal(&path) {
                let text = std::fs::read_to_string(input.path.join(&path))
                    .map_err(|e| Failure::input(format!("{}/{path}: {e}", input.origin)))?;
                texts.push((path, text));
            }
        }
    }
    Ok(Terms { licence, texts })
}

/// The text, from the licences that `tool`, the folder of the page's libraries, and the model bring.
pub fn text(tool: &Path, model: &Terms) -> anyhow::Result<String> {
    let read = |name: &str| {
        let path = tool.join("licenses").join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let runtime: Value = serde_json::from_str(&read("onnxruntime-web.json")?)
        .context("licenses/onnxruntime-web.json is no package.json")?;
    let version = runtime["version"].as_str().unwrap_or_default();
    let mut text = String::from("What this site hands out, and under which terms.\n");
    let rule = "─".repeat(80);
    let under = match &model.licence {
        Some(Licence { of, license }) if of.is_empty() => format!("models/: {license}."),
        Some(Licence { of, license }) => {
            format!("models/: made of {of}, and changed since; {license}, as that is.")
        }
        None => "models/: the terms of the model are its maker's.".into(),
    };
    for (what, terms) in [
        ("The page itself: Apache License 2.0, whose text stands below.", None),
        (
            "transformers.min.js: Transformers.js, with @huggingface/tokenizers and \
             @huggingface/jinja (MIT) in it.",
            Some(read("transformers.txt")?),
        ),
        (
            &format!(
                "ort-wasm-*: ONNX Runtime Web {version}, part of which is in transformers.min.js."
            ),
            Some(MIT.to_string()),
        ),
        (&under, None),
    ] {
        write!(text, "\n{rule}\n{what}\n")?;
        if let Some(terms) = terms {
            write!(text, "\n{}\n", terms.trim_matches('\n'))?;
        }
    }
    for (name, terms) in &model.texts {
        write!(text, "\n{rule}\nmodels/: {name}\n\n{}\n", terms.trim_matches('\n'))?;
    }
    Ok(text)
}
