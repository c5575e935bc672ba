//! A folder in Nix's archive format, and its SHA-256: by that Nix names what it did not make itself.
//!
//! Knows nothing of stores or steps. The format is a sequence of strings, each with its length before
//! it and zeros up to a multiple of eight behind it (E. Dolstra, "The Purely Functional Software
//! Deployment Model", 2006, figure 5.2). Of modes it keeps whether a file can be run.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use sha2::{Digest, Sha256};
use step::Failure;

use crate::cannot;

/// Writes the archive of the file or folder at `path`.
pub fn write(path: &Path, to: &mut impl Write) -> io::Result<()> {
    string(to, b"nix-archive-1")?;
    node(path, to)
}

/// The SHA-256 of the archive: 64 hexadecimal digits.
pub fn sha256(path: &Path) -> Result<String, Failure> {
    let mut hash = Hash(Sha256::new());
    write(path, &mut hash).map_err(cannot("read", path))?;
    Ok(hash.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

struct Hash(Sha256);

impl Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn node(path: &Path, to: &mut impl Write) -> io::Result<()> {
    let meta = fs::symlink_metadata(path)?;
    strings(to, &["(", "type"])?;
    if meta.is_dir() {
        string(to, b"directory")?;
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            names.push(entry?.file_name());
        }
        names.sort_by(|a, b| a.as_bytes().cmp(b.as_bytes()));
        for name in names {
            strings(to, &["entry", "(", "name"])?;
            string(to, name.as_bytes())?;
            string(to, b"node")?;
            node(&path.join(name), to)?;
            string(to, b")")?;
        }
    } else if meta.is_symlink() {
        strings(to, &["symlink", "target"])?;
        string(to, fs::read_link(path)?.as_os_str().as_bytes())?;
    } else if meta.is_file() {
        string(to, b"regular")?;
        if meta.permissions().mode() & 0o100 != 0 {
            strings(to, &["executable", ""])?;
        }
        string(to, b"contents")?;
        let length = meta.len();
        to.write_all(&length.to_le_bytes())?;
        if io::copy(&mut File::open(path)?.take(length), to)? != length {
            return Err(io::Error::other(format!("{} changed meanwhile", path.display())));
        }
        pad(to, length)?;
    } else {
        return Err(io::Error::other(format!("{} is no file and no folder", path.display())));
    }
    string(to, b")")
}

fn strings(to: &mut impl Write, all: &[&str]) -> io::Result<()> {
    all.iter().try_for_each(|text| string(to, text.as_bytes()))
}

fn string(to: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    to.write_all(&(bytes.len() as u64).to_le_bytes())?;
    to.write_all(bytes)?;
    pad(to, bytes.len() as u64)
}

fn pad(to: &mut impl Write, length: u64) -> io::Result<()> {
    let zeros = length.next_multiple_of(8) - length;
    to.write_all(&[0; 8][..zeros as usize])
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// What `nix hash path --base16` and `nix-store --dump | sha256sum` (2.8.0) say of this folder.
    #[test]
    fn the_hash_is_nixs() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        fs::create_dir_all(at("sub/empty")).unwrap();
        fs::write(at("rows.jsonl"), "{\"a\": 1}\n").unwrap();
        fs::write(at("nothing"), "").unwrap();
        fs::write(at("eight"), "12345678").unwrap();
        fs::write(at("sub/ä-name"), "umlaut").unwrap();
        fs::write(at("run"), "#!/bin/sh\n").unwrap();
        fs::set_permissions(at("run"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("rows.jsonl", at("link")).unwrap();
        assert_eq!(
            sha256(dir.path()).unwrap(),
            "bc6d21daf79b49c5ba9beec5f77a57561223cb3009e9d6b1cad7dd5c43fd9d1a"
        );
    }
}
