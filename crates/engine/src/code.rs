//! The code digest: everything a family's worker is compiled from, as one digest.
//!
//! | counted | how |
//! |---|---|
//! | Rust sources of the family and of our crates below it | by token: comments, docs, layout and `#[cfg(test)]` items do not count |
//! | other files beside them (C++ shims, build inputs) | by byte |
//! | manifests | dependencies, features, targets; not descriptions, not dev-dependencies |
//! | third-party crates | name, version and checksum, from the closure in Cargo.lock |
//! | compiler | rust-toolchain.toml and `[profile.release]` |
//!
//! Not caught: the system's linker and C++ compiler, and what a build script reads from outside
//! its crate (libtorch, which enters an action as a tool).

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use proc_macro2::{Delimiter, Spacing, TokenStream, TokenTree};
use serde::Deserialize;
use step::{BlobDigest, CodeDigest, Failure, canonical};

/// Computes code digests of one workspace, reading each file once.
pub struct CodeBase {
    root: PathBuf,
    lock: BTreeMap<String, Vec<Package>>,
    workspace: toml::Table,
    toolchain: String,
    /// Blob digest → token digest, so that a file is tokenised once in its life.
    tokens: BTreeMap<BlobDigest, BlobDigest>,
    tokens_path: PathBuf,
    tokens_changed: bool,
    crates: BTreeMap<String, Parts>,
    families: BTreeMap<String, (CodeDigest, Parts)>,
}

#[derive(Debug, Clone, Deserialize)]
struct Package {
    name: String,
    version: String,
    checksum: Option<String>,
    #[serde(default)]
    dependencies: Vec<String>,
}

/// What a family's digest is made of: name of the part → its digest or version. `why` compares two.
pub type Parts = BTreeMap<String, String>;

impl CodeBase {
    /// Reads the workspace at `root`; `cache` is a file that may be lost at no cost but time.
    pub fn open(root: &Path, cache: &Path) -> Result<Self, Failure> {
        let lock: toml::Table = read_toml(&root.join("Cargo.lock"))?;
        let mut packages: BTreeMap<String, Vec<Package>> = BTreeMap::new();
        for package in lock.get("package").and_then(|p| p.as_array()).into_iter().flatten() {
            let package: Package = package.clone().try_into().map_err(|e| {
                Failure::input(format!("{}: {e}", root.join("Cargo.lock").display()))
            })?;
            packages.entry(package.name.clone()).or_default().push(package);
        }
        let tokens = std::fs::read(cache).ok().and_then(|b| serde_json::from_slice(&b).ok());
        Ok(Self {
            root: root.to_path_buf(),
            lock: packages,
            workspace: read_toml(&root.join("Cargo.toml"))?,
            toolchain: std::fs::read_to_string(root.join("rust-toolchain.toml"))
                .unwrap_or_default(),
            tokens: tokens.unwrap_or_default(),
            tokens_path: cache.to_path_buf(),
            tokens_changed: false,
            crates: BTreeMap::new(),
            families: BTreeMap::new(),
        })
    }

    /// The digest of a family's code.
    pub fn family(&mut self, name: &str) -> Result<CodeDigest, Failure> {
        if let Some((digest, _)) = self.families.get(name) {
            return Ok(*digest);
        }
        let parts = self.parts(name)?;
        let digest = CodeDigest::of(&canonical::to_vec(&parts));
        self.families.insert(name.into(), (digest, parts));
        Ok(digest)
    }

    /// What a digest that [`CodeBase::family`] gave is made of.
    pub fn parts_of(&self, digest: CodeDigest) -> Option<&Parts> {
        self.families.values().find(|(d, _)| *d == digest).map(|(_, parts)| parts)
    }

    fn parts(&mut self, name: &str) -> Result<Parts, Failure> {
        let mut parts = Parts::new();
        let mut ours = vec![name.to_string()];
        let mut seen = BTreeSet::new();
        let mut outside = Vec::new();
        while let Some(krate) = ours.pop() {
            if !seen.insert(krate.clone()) {
                continue;
            }
            let manifest: toml::Table = read_toml(&self.crate_dir(&krate).join("Cargo.toml"))?;
            let wanted = dependencies(&manifest);
            for dependency in self.locked(&krate, None).map(|p| p.dependencies).unwrap_or_default()
            {
                let (dep, version) = split(&dependency);
                if !wanted.contains(dep) {
                    continue; // a dev-dependency
                }
                if self.is_ours(dep) {
                    ours.push(dep.to_string());
                } else {
                    outside.push((dep.to_string(), version.map(str::to_string)));
                }
            }
            parts.extend(self.own_crate(&krate, &manifest)?);
        }
        let mut seen = BTreeSet::new();
        while let Some((dep, version)) = outside.pop() {
            let Some(package) = self.locked(&dep, version.as_deref()) else { continue };
            if !seen.insert((package.name.clone(), package.version.clone())) {
                continue;
            }
            for dependency in &package.dependencies {
                let (dep, version) = split(dependency);
                outside.push((dep.to_string(), version.map(str::to_string)));
            }
            parts.insert(
                format!("{} {}", package.name, package.version),
                package.checksum.unwrap_or_default(),
            );
        }
        parts.insert("rust-toolchain.toml".into(), self.toolchain.clone());
        let profile = self.workspace.get("profile").and_then(|p| p.get("release"));
        parts.insert("profile.release".into(), profile.map(|p| p.to_string()).unwrap_or_default());
        Ok(parts)
    }

    /// Writes the token cache, if there is something new in it.
    pub fn save(&self) {
        if self.tokens_changed {
            let text = serde_json::to_vec(&self.tokens).expect("digests serialise to JSON");
            let partial = self.tokens_path.with_extension(format!("{}.tmp", std::process::id()));
            // Losing the cache costs time only, so failing to write it is no error.
            let _ = std::fs::write(&partial, text)
                .and_then(|()| std::fs::rename(&partial, &self.tokens_path));
        }
    }

    fn crate_dir(&self, name: &str) -> PathBuf {
        self.root.join("crates").join(name)
    }

    fn is_ours(&self, name: &str) -> bool {
        self.locked(name, None).is_some_and(|p| p.checksum.is_none())
            && self.crate_dir(name).join("Cargo.toml").is_file()
    }

    fn locked(&self, name: &str, version: Option<&str>) -> Option<Package> {
        let candidates = self.lock.get(name)?;
        candidates.iter().find(|p| version.is_none_or(|v| p.version == v)).cloned()
    }

    /// The parts of one of our crates: file → digest.
    fn own_crate(&mut self, name: &str, manifest: &toml::Table) -> Result<Parts, Failure> {
        if let Some(parts) = self.crates.get(name) {
            return Ok(parts.clone());
        }
        let dir = self.crate_dir(name);
        let mut parts = Parts::new();
        let mut counted = toml::Table::new();
        for key in ["dependencies", "build-dependencies", "features", "lib", "bin"] {
            if let Some(value) = manifest.get(key) {
                counted.insert(key.into(), value.clone());
            }
        }
        // An inherited dependency's version and features stand in the workspace's manifest.
        for dependency in inherited(manifest) {
            let table = self.workspace.get("workspace").and_then(|w| w.get("dependencies"));
            if let Some(value) = table.and_then(|t| t.get(&dependency)) {
                counted.insert(format!("workspace.{dependency}"), value.clone());
            }
        }
        parts.insert(
            format!("crates/{name}/Cargo.toml"),
            BlobDigest::of(&canonical::to_vec(&counted)).to_string(),
        );
        let mut files = Vec::new();
        walk(&dir, &dir, &mut files)?;
        for path in files {
            let bytes = read(&dir.join(&path))?;
            let digest = if path.ends_with(".rs") {
                self.token_digest(&bytes)
            } else {
                BlobDigest::of(&bytes)
            };
            parts.insert(format!("crates/{name}/{path}"), digest.to_string());
        }
        self.crates.insert(name.into(), parts.clone());
        Ok(parts)
    }

    fn token_digest(&mut self, bytes: &[u8]) -> BlobDigest {
        let blob = BlobDigest::of(bytes);
        if let Some(tokens) = self.tokens.get(&blob) {
            return *tokens;
        }
        // What does not parse counts byte by byte: it will not compile either.
        let digest = std::str::from_utf8(bytes)
            .ok()
            .and_then(|text| text.parse::<TokenStream>().ok())
            .map_or(blob, |tokens| {
                let mut out = String::new();
                write_tokens(tokens, &mut out);
                BlobDigest::of(out.as_bytes())
            });
        self.tokens.insert(blob, digest);
        self.tokens_changed = true;
        digest
    }
}

/// Files that take part in a build: all but tests, benches, examples and prose.
fn walk(root: &Path, dir: &Path, out: &mut Vec<String>) -> Result<(), Failure> {
    let entries = std::fs::read_dir(dir)
        .map_err(|e| Failure::environment(format!("cannot read {}: {e}", dir.display())))?;
    for entry in entries.flatten() {
        let path = entry.path();
        let relative = path.strip_prefix(root).expect("a child of root");
        let relative = relative.to_string_lossy().replace('\\', "/");
        let skipped = ["tests", "benches", "examples", "target", "Cargo.toml"];
        if skipped.contains(&relative.as_str()) || relative.ends_with(".md") {
            continue;
        }
        if path.is_dir() {
            walk(root, &path, out)?;
        } else {
            out.push(relative);
        }
    }
    out.sort();
    Ok(())
}

/// The dependencies that a manifest takes from the workspace's.
fn inherited(manifest: &toml::Table) -> BTreeSet<String> {
    let sections = ["dependencies", "build-dependencies"].into_iter();
    let entries = sections.filter_map(|section| manifest.get(section)?.as_table()).flatten();
    let takes =
        |value: &toml::Value| value.get("workspace").and_then(|w| w.as_bool()) == Some(true);
    entries.filter(|(_, value)| takes(value)).map(|(name, _)| name.clone()).collect()
}

fn dependencies(manifest: &toml::Table) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for section in ["dependencies", "build-dependencies"] {
        for (name, value) in manifest.get(section).and_then(|s| s.as_table()).into_iter().flatten()
        {
            let package = value.get("package").and_then(|p| p.as_str());
            names.insert(package.unwrap_or(name).to_string());
        }
    }
    names
}

/// `name`, `name version` or `name version (source)`, as Cargo.lock writes a dependency.
fn split(dependency: &str) -> (&str, Option<&str>) {
    let mut words = dependency.split(' ');
    (words.next().unwrap_or_default(), words.next())
}

/// Tokens one by one, without what cannot change the compiled code.
fn write_tokens(tokens: TokenStream, out: &mut String) {
    let tokens: Vec<TokenTree> = tokens.into_iter().collect();
    // A trailing comma is layout, save in a tuple of one.
    let is_comma = |t: &&TokenTree| matches!(t, TokenTree::Punct(p) if p.as_char() == ',');
    let trailing_comma_is_layout = tokens.iter().filter(is_comma).count() > 1;
    let mut i = 0;
    while i < tokens.len() {
        match &tokens[i] {
            TokenTree::Punct(p) if p.as_char() == '#' => {
                if let Some(next) = skip_attribute(&tokens, i) {
                    i = next;
                    continue;
                }
                out.push_str("# ");
            }
            TokenTree::Punct(_) => {
                let (operator, length) = operator(&tokens[i..]);
                let last = i + length == tokens.len();
                if !(last && operator == "," && trailing_comma_is_layout) {
                    out.push_str(&operator);
                    out.push(' ');
                }
                i += length;
                continue;
            }
            TokenTree::Group(group) => {
                let (open, close) = match group.delimiter() {
                    Delimiter::Parenthesis => ("( ", ") "),
                    Delimiter::Brace => ("{ ", "} "),
                    Delimiter::Bracket => ("[ ", "] "),
                    Delimiter::None => ("", ""),
                };
                out.push_str(open);
                write_tokens(group.stream(), out);
                out.push_str(close);
            }
            other => {
                out.push_str(&other.to_string());
                out.push(' ');
            }
        }
        i += 1;
    }
}

/// If an attribute at `at` does not count, the index after what it takes away: the attribute
/// itself for docs, the whole item for `#[cfg(test)]`.
fn skip_attribute(tokens: &[TokenTree], at: usize) -> Option<usize> {
    let mut group_at = at + 1;
    if matches!(tokens.get(group_at), Some(TokenTree::Punct(p)) if p.as_char() == '!') {
        group_at += 1;
    }
    let Some(TokenTree::Group(group)) = tokens.get(group_at) else { return None };
    let text = group.stream().to_string().replace(' ', "");
    if text.starts_with("doc=") {
        return Some(group_at + 1);
    }
    if text != "cfg(test)" {
        return None;
    }
    let mut end = group_at + 1;
    while end < tokens.len() {
        match &tokens[end] {
            TokenTree::Punct(p) if p.as_char() == ';' => return Some(end + 1),
            TokenTree::Group(g) if g.delimiter() == Delimiter::Brace => return Some(end + 1),
            _ => end += 1,
        }
    }
    Some(end)
}

/// The longest Rust operator that starts here, and how many punctuation tokens it takes: `a=-b`
/// and `a = -b` are the same, `a && b` and `a & &b` are not.
fn operator(tokens: &[TokenTree]) -> (String, usize) {
    const OPERATORS: [&str; 24] = [
        "<<=", ">>=", "...", "..=", "::", "->", "=>", "==", "!=", "<=", ">=", "&&", "||", "+=",
        "-=", "*=", "/=", "%=", "^=", "&=", "|=", "<<", ">>", "..",
    ];
    let mut joined = String::new();
    for token in tokens.iter().take(3) {
        let TokenTree::Punct(punct) = token else { break };
        joined.push(punct.as_char());
        if punct.spacing() == Spacing::Alone {
            break;
        }
    }
    match OPERATORS.iter().find(|op| joined.starts_with(**op)) {
        Some(op) => (op.to_string(), op.len()),
        None => (joined.chars().next().map(String::from).unwrap_or_default(), 1),
    }
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path)
        .map_err(|e| Failure::environment(format!("cannot read {}: {e}", path.display())))
}

fn read_toml(path: &Path) -> Result<toml::Table, Failure> {
    let text = String::from_utf8(read(path)?)
        .map_err(|_| Failure::input(format!("{} is not UTF-8", path.display())))?;
    text.parse().map_err(|e| Failure::input(format!("{}: {e}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokens(source: &str) -> String {
        let mut out = String::new();
        write_tokens(source.parse().expect("test sources parse"), &mut out);
        out
    }

    #[test]
    fn what_cannot_change_the_code_does_not_count() {
        let plain = tokens("fn f(a: u8, b: u8) -> u8 { a + b }");
        for same in [
            "/// Adds.\nfn f(a: u8, b: u8) -> u8 { a + b } // sum",
            "fn f(\n    a: u8,\n    b: u8,\n) -> u8 {\n    a+b\n}",
            "#[doc = \"x\"] fn f(a: u8, b: u8) -> u8 { a + b } #[cfg(test)] mod tests { fn g() {} }",
            "//! Module.\nfn f(a: u8, b: u8) -> u8 { a + b } #[cfg(test)] use x::y;",
        ] {
            assert_eq!(tokens(same), plain, "{same}");
        }
    }

    #[test]
    fn what_can_change_the_code_counts() {
        for (a, b) in [
            ("a && b", "a & &b"),
            ("(a,)", "(a)"),
            ("a + b", "a - b"),
            ("#[cfg(unix)] fn f() {}", "fn f() {}"),
            ("\"a  b\"", "\"a b\""),
            ("1.0", "1.00"),
        ] {
            assert_ne!(tokens(a), tokens(b));
        }
    }
}
