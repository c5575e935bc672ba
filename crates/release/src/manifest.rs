//! The release manifest: every file of a site, by its digests, and the name of the whole.
//!
//! A site's index.html names its other files by their hashes and ends with a digest of all of them,
//! so its own digest names the release. Whoever has the page can find its manifest:
//! `releases/<release>/manifest.json`.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use step::{BlobDigest, Entry, Failure, Tree, canonical};

use crate::licence::Licence;
use crate::{INDEX, headers, hosts};

const FORMAT: u32 = 1;
const FOLDER: &str = "releases/";
/// The line of index.html that holds the digest of all other files.
const MARK: &str = "<!-- files: ";

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format: u32,
    /// The start of index.html's digest.
    pub release: String,
    /// What visitors get, sorted by path; the manifest itself is not among them.
    pub files: Vec<File>,
    pub licences: Vec<Licence>,
    /// What these licences ask for and the site does not have.
    pub lacks: Vec<String>,
}

/// One file, as it is before any compression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct File {
    pub path: String,
    pub bytes: u64,
    pub blake3: BlobDigest,
    pub sha256: String,
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(rename = "cache-control")]
    pub cache: String,
}

/// The release whose index.html this is.
pub fn name(index: &[u8]) -> String {
    BlobDigest::of(index).to_string()[..32].to_string()
}

/// The path of a release's file, below the site.
pub fn path(release: &str, file: &str) -> String {
    format!("{FOLDER}{release}/{file}")
}

/// The path of a release's manifest, below the site.
pub fn path_of(release: &str) -> String {
    path(release, "manifest.json")
}

impl Manifest {
    /// Makes a release of the site in `dir`: marks its index.html, writes the files for hosts and the
    /// manifest. Returns what it wrote.
    pub fn write(dir: &Path, licences: Vec<Licence>, lacks: Vec<String>) -> Result<Self, Failure> {
        let mut files = Vec::new();
        for path in list(dir)? {
            if path != INDEX && !hosts::is_for_hosts(&path) && !path.starts_with(FOLDER) {
                files.push(File::of(dir, &path)?);
            }
        }
        let all = tree(&files)?.digest();
        let index = dir.join(INDEX);
        let mut page = fs::read(&index).map_err(|e| no_site(dir, &e))?;
        page.extend_from_slice(format!("{MARK}{all} -->\n").as_bytes());
        put(&index, &page)?;
        files.push(File::of(dir, INDEX)?);
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let manifest = Self { format: FORMAT, release: name(&page), files, licences, lacks };
        let fixed: Vec<&str> = manifest.fixed().map(|file| file.path.as_str()).collect();
        for (path, text) in hosts::files(&fixed) {
            put(&dir.join(path), text.as_bytes())?;
        }
        put(&dir.join(path_of(&manifest.release)), &canonical::to_vec(&manifest))?;
        Ok(manifest)
    }

    /// The manifest of the site in `dir`.
    pub fn read(dir: &Path) -> Result<Self, Failure> {
        let page = fs::read(dir.join(INDEX)).map_err(|e| no_site(dir, &e))?;
        let path = path_of(&name(&page));
        let bytes = fs::read(dir.join(&path)).map_err(|e| {
            Failure::input(format!("{}: {path}: {e}", dir.display()))
                .hint("the site was made by an earlier version, or its index.html was edited: build it again")
        })?;
        Self::parse(&bytes).map_err(|e| Failure { message: format!("{path}: {}", e.message), ..e })
    }

    /// A manifest of ours, whose paths are safe to be joined to an address.
    pub fn parse(bytes: &[u8]) -> Result<Self, Failure> {
        let wrong = |why: String| Failure::input(format!("no release manifest: {why}"));
        let manifest: Self = serde_json::from_slice(bytes).map_err(|e| wrong(e.to_string()))?;
        if manifest.format != FORMAT {
            return Err(wrong(format!("its format is {}, expected {FORMAT}", manifest.format)));
        }
        tree(&manifest.files)?;
        if !manifest.files.iter().any(|file| file.path == INDEX) {
            return Err(wrong(format!("it has no {INDEX}")));
        }
        Ok(manifest)
    }

    pub fn file(&self, path: &str) -> Option<&File> {
        self.files.iter().find(|file| file.path == path)
    }

    /// Files whose path is the same in every release.
    pub fn fixed(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| !headers::is_hashed(&file.path))
    }

    pub fn hashed(&self) -> impl Iterator<Item = &File> {
        self.files.iter().filter(|file| headers::is_hashed(&file.path))
    }

    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }
}

impl File {
    pub fn of(dir: &Path, path: &str) -> Result<Self, Failure> {
        let from = dir.join(path);
        let mut file = fs::File::open(&from).map_err(|e| cannot("read", &from, &e))?;
        Self::read(path, &mut file).map_err(|e| cannot("read", &from, &e))
    }

    pub fn of_bytes(path: &str, mut bytes: &[u8]) -> Self {
        Self::read(path, &mut bytes).expect("memory can be read")
    }

    fn read(path: &str, from: &mut dyn Read) -> std::io::Result<Self> {
        let mut blake3 = Blake3 { hasher: blake3::Hasher::new(), from };
        let (bytes, sha256) = crate::sha256(&mut blake3)?;
        Ok(Self {
            path: path.into(),
            bytes,
            blake3: BlobDigest::from_bytes(*blake3.hasher.finalize().as_bytes()),
            sha256,
            kind: headers::content_type(path).into(),
            cache: headers::cache_control(path).into(),
        })
    }
}

/// Hashes what is read through it.
struct Blake3<'a> {
    hasher: blake3::Hasher,
    from: &'a mut dyn Read,
}

impl Read for Blake3<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let read = self.from.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        Ok(read)
    }
}

fn tree(files: &[File]) -> Result<Tree, Failure> {
    let entry =
        |file: &File| Entry { path: file.path.clone(), digest: file.blake3, size: file.bytes };
    Tree::new(files.iter().map(entry).collect())
        .map_err(|e| Failure::input(format!("no release manifest: {e}")))
}

/// The files below `dir`, `/` between folders, sorted.
fn list(dir: &Path) -> Result<Vec<String>, Failure> {
    let mut files = Vec::new();
    let mut folders = vec![String::new()];
    while let Some(folder) = folders.pop() {
        let path = dir.join(&folder);
        for entry in fs::read_dir(&path).map_err(|e| cannot("read", &path, &e))? {
            let entry = entry.map_err(|e| cannot("read", &path, &e))?;
            let Ok(name) = entry.file_name().into_string() else {
                return Err(Failure::input(format!("{} is not UTF-8", entry.path().display())));
            };
            let name = if folder.is_empty() { name } else { format!("{folder}/{name}") };
            let kind = fs::metadata(entry.path()).map_err(|e| cannot("read", &entry.path(), &e))?;
            if kind.is_dir() { folders.push(name) } else { files.push(name) }
        }
    }
    files.sort();
    Ok(files)
}

fn put(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    path.parent()
        .map_or(Ok(()), fs::create_dir_all)
        .and_then(|()| fs::write(path, bytes))
        .map_err(|e| cannot("write", path, &e))
}

fn cannot(act: &str, path: &Path, error: &std::io::Error) -> Failure {
    Failure::environment(format!("cannot {act} {}: {error}", path.display()))
}

fn no_site(dir: &Path, error: &std::io::Error) -> Failure {
    Failure::input(format!("{} is no site: {INDEX}: {error}", dir.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn site(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            put(&dir.path().join(path), text.as_bytes()).unwrap();
        }
        dir
    }

    const FILES: [(&str, &str); 3] =
        [("index.html", "<p>"), ("isolate.js", "//"), ("models/1f.json", "{}")];

    #[test]
    fn a_site_is_found_by_its_page() {
        let dir = site(&FILES);
        let written = Manifest::write(dir.path(), Vec::new(), Vec::new()).unwrap();
        assert_eq!(Manifest::read(dir.path()).unwrap(), written);
        let paths: Vec<&str> = written.files.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, ["index.html", "isolate.js", "models/1f.json"]);
        assert_eq!(written.fixed().count(), 2);
        let page = fs::read(dir.path().join(INDEX)).unwrap();
        assert_eq!(written.release, name(&page));
        let file = written.file("models/1f.json").unwrap();
        // sha256sum of `{}`
        let sha256 = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a";
        assert_eq!((file.bytes, file.sha256.as_str()), (2, sha256));
        assert_eq!(file.blake3, BlobDigest::of(b"{}"));
        assert!(dir.path().join("_headers").exists());
    }

    #[test]
    fn a_release_is_named_by_all_of_its_bytes() {
        let name = |files: &[(&str, &str)]| {
            let dir = site(files);
            Manifest::write(dir.path(), Vec::new(), Vec::new()).unwrap().release
        };
        let first = name(&FILES);
        assert_eq!(first, name(&FILES));
        for i in 0..FILES.len() {
            let mut changed = FILES;
            changed[i].1 = "other";
            assert_ne!(first, name(&changed), "{}", changed[i].0);
        }
    }

    #[test]
    fn a_hostile_manifest_is_refused() {
        let dir = site(&FILES);
        let manifest = Manifest::write(dir.path(), Vec::new(), Vec::new()).unwrap();
        for (what, change) in [
            ("path", (|m| m.files[0].path = "../x".into()) as fn(&mut Manifest)),
            ("index", |m| _ = m.files.remove(0)),
            ("format", |m| m.format = 2),
        ] {
            let mut bad = manifest.clone();
            change(&mut bad);
            assert!(Manifest::parse(&canonical::to_vec(&bad)).is_err(), "{what}");
        }
        let edited = dir.path().join(INDEX);
        fs::write(&edited, "<p>edited").unwrap();
        assert!(Manifest::read(dir.path()).unwrap_err().hint.is_some());
    }
}
