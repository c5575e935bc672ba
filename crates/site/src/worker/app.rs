//! The page's own files, with hashes in their names.
//!
//! Knows no JavaScript: a reference is a quoted `./name` that ends like a file of the web. Nothing
//! else in a file changes.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::Context;
use step::{BlobDigest, Failure};

/// What the page's folder holds for those who work on it. The rest is served.
const LEFT_OUT: &[&str] =
    &["package.json", "package-lock.json", ".npmrc", ".gitignore", "README.md"];
const LEFT_OUT_FOLDERS: &[&str] = &["node_modules"];
/// Files below it bear their hash in their name; those beside it keep theirs.
const HASHED: &str = "assets/";
/// A reference ends like one of these.
const REFERENCED: &[&str] =
    &["css", "js", "mjs", "json", "svg", "png", "jpg", "txt", "webp", "woff2"];
/// Where references are looked for.
const TEXT: &[&str] = &["css", "html", "js", "mjs", "svg"];

/// Path → bytes, as they are served: the files in `dir`, and beside them those that were `made`.
pub fn files(
    dir: &Path,
    origin: &str,
    made: BTreeMap<String, Vec<u8>>,
) -> anyhow::Result<BTreeMap<String, Vec<u8>>> {
    let mut sources = made;
    for path in crate::chat::list(dir)? {
        let folder = path.split_once('/').map(|(folder, _)| folder);
        if LEFT_OUT.contains(&path.as_str())
            || folder.is_some_and(|f| LEFT_OUT_FOLDERS.contains(&f))
        {
            continue;
        }
        let bytes = std::fs::read(dir.join(&path)).with_context(|| format!("{origin}/{path}"))?;
        if sources.insert(path.clone(), bytes).is_some() {
            return Err(Failure::input(format!(
                "{origin}/{path} takes the place of a file that is made"
            ))
            .hint("give it another name")
            .into());
        }
    }
    if !sources.contains_key("index.html") {
        return Err(Failure::input(format!("{origin} has no index.html"))
            .hint("`app` names the folder of a page, for example `../site`")
            .into());
    }
    let mut app = App { origin, sources: &sources, served: BTreeMap::new(), open: Vec::new() };
    for path in sources.keys() {
        app.serve(path)?;
    }
    Ok(app.served.into_values().collect())
}

struct App<'a> {
    origin: &'a str,
    sources: &'a BTreeMap<String, Vec<u8>>,
    /// Path in the folder → path and bytes as they are served.
    served: BTreeMap<String, (String, Vec<u8>)>,
    /// The files whose references are being followed.
    open: Vec<String>,
}

impl App<'_> {
    /// The path under which a file is served. What it refers to goes first: a name's hash covers
    /// the names in the file.
    fn serve(&mut self, path: &str) -> anyhow::Result<String> {
        if let Some((served, _)) = self.served.get(path) {
            return Ok(served.clone());
        }
        if self.open.iter().any(|p| p == path) {
            let circle = format!("{} → {path}", self.open.join(" → "));
            return Err(Failure::input(format!(
                "files of {} refer to each other in a circle: {circle}",
                self.origin
            ))
            .hint("a file's name has the hash of what it refers to: break the circle")
            .into());
        }
        self.open.push(path.into());
        let source = &self.sources[path];
        let bytes = match std::str::from_utf8(source) {
            Ok(text) if ends_like(path, TEXT) => self.rewritten(path, text)?.into_bytes(),
            _ => source.clone(),
        };
        self.open.pop();
        let served = match path.strip_prefix(HASHED) {
            Some(name) => format!("{HASHED}{}", hashed(name, &BlobDigest::of(&bytes))),
            None => path.to_string(),
        };
        self.served.insert(path.into(), (served.clone(), bytes));
        Ok(served)
    }

    fn rewritten(&mut self, path: &str, text: &str) -> anyhow::Result<String> {
        let folder = path.rsplit_once('/').map_or("", |(folder, _)| folder);
        let prefix = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        let mut out = String::with_capacity(text.len());
        let mut done = 0;
        for (at, reference) in references(text) {
            let target = format!("{prefix}{reference}");
            if !self.sources.contains_key(&target) {
                let line = text[..at].matches('\n').count() + 1;
                return Err(Failure::input(format!(
                    "{}/{path}:{line}: `./{reference}` is not there",
                    self.origin
                ))
                .hint("a quoted `./name` is taken for a reference to a file of the page")
                .into());
            }
            let served = self.serve(&target)?;
            let relative = served.strip_prefix(&prefix).unwrap_or(&served);
            out.push_str(&text[done..at]);
            out.push_str(relative);
            done = at + reference.len();
        }
        out.push_str(&text[done..]);
        Ok(out)
    }
}

/// Each quoted `./name`: where the name begins, and the name.
fn references(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.match_indices("./").filter_map(|(at, _)| {
        let close = match text[..at].chars().next_back()? {
            quote @ ('"' | '\'' | '`') => quote,
            '(' => ')',
            _ => return None,
        };
        let begin = at + 2;
        let name = &text[begin..begin + text[begin..].find(close)?];
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-/".contains(c);
        (name.chars().all(plain) && ends_like(name, REFERENCED)).then_some((begin, name))
    })
}

/// `main.js` → `main.1f2e3d4c.js`.
fn hashed(name: &str, digest: &BlobDigest) -> String {
    let hash = &digest.to_string()[..8];
    match name.rsplit_once('.') {
        Some((stem, extension)) => format!("{stem}.{hash}.{extension}"),
        None => format!("{name}.{hash}"),
    }
}

fn ends_like(path: &str, extensions: &[&str]) -> bool {
    path.rsplit_once('.').is_some_and(|(_, e)| extensions.contains(&e))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn app(files: &[(&str, &str)]) -> Result<BTreeMap<String, String>, Failure> {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let text = |bytes| String::from_utf8(bytes).unwrap();
        let made = BTreeMap::from([("assets/site.json".to_string(), b"{}".to_vec())]);
        super::files(dir.path(), "site", made)
            .map(|served| served.into_iter().map(|(p, b)| (p, text(b))).collect())
            .map_err(|e| Failure::from_anyhow(&e))
    }

    fn name_of(path: &str, text: &str) -> String {
        hashed(path, &BlobDigest::of(text.as_bytes()))
    }

    #[test]
    fn references_bear_the_hash_of_what_they_name() {
        let served = app(&[
            ("index.html", r#"<script src="./assets/main.js"></script> ./assets/main.js"#),
            ("isolate.js", "// as it is"),
            ("assets/main.js", "import { a } from './a.js'; fetch('./data'); // './site.json'"),
            ("assets/a.js", "export const a = 1;"),
            ("README.md", "for people"),
            ("package.json", "{}"),
            ("node_modules/x/index.js", ""),
        ])
        .unwrap();
        let a = name_of("a.js", "export const a = 1;");
        let site = name_of("site.json", "{}");
        let main = format!("import {{ a }} from './{a}'; fetch('./data'); // './{site}'");
        let main_name = name_of("main.js", &main);
        let index = format!(r#"<script src="./assets/{main_name}"></script> ./assets/main.js"#);
        let expected = BTreeMap::from([
            ("index.html".to_string(), index),
            ("isolate.js".to_string(), "// as it is".to_string()),
            (format!("assets/{main_name}"), main),
            (format!("assets/{a}"), "export const a = 1;".to_string()),
            (format!("assets/{site}"), "{}".to_string()),
        ]);
        assert_eq!(served, expected);
    }

    #[test]
    fn mistakes_are_named_with_their_place() {
        for (files, message) in [
            (&[("main.js", "")][..], "site has no index.html"),
            (
                &[("index.html", "\n<link href='./assets/gone.css'>")],
                "site/index.html:2: `./assets/gone.css` is not there",
            ),
            (
                &[
                    ("index.html", ""),
                    ("assets/a.js", "import './b.js'"),
                    ("assets/b.js", "import './a.js'"),
                ],
                "files of site refer to each other in a circle: assets/a.js → assets/b.js → assets/a.js",
            ),
            (
                &[("index.html", ""), ("assets/site.json", "{}")],
                "site/assets/site.json takes the place of a file that is made",
            ),
        ] {
            let failure = app(files).unwrap_err();
            assert_eq!(failure.message, message);
            assert_eq!(failure.class, step::Class::Input);
            assert!(failure.hint.is_some());
        }
    }
}
