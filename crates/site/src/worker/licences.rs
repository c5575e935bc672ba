//! `LICENSES.txt`: whose work a site hands out, and under which terms.

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;
use serde_json::Value;

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

/// The text, from the licences that `tool`, the folder of the page's libraries, brings.
pub fn text(tool: &Path) -> anyhow::Result<String> {
    let read = |name: &str| {
        let path = tool.join("licenses").join(name);
        std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
    };
    let runtime: Value = serde_json::from_str(&read("onnxruntime-web.json")?)
        .context("licenses/onnxruntime-web.json is no package.json")?;
    let version = runtime["version"].as_str().unwrap_or_default();
    let mut text = String::from("What this site hands out, and under which terms.\n");
    let rule = "─".repeat(80);
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
        ("models/: the terms of the model are its maker's.", None),
    ] {
        write!(text, "\n{rule}\n{what}\n")?;
        if let Some(terms) = terms {
            write!(text, "\n{}\n", terms.trim_matches('\n'))?;
        }
    }
    Ok(text)
}
