//! A site as a release: its files by digest, the headers it is served with, its licences.
//!
//! Knows nothing of models, of the page's code, or of any host's interface.

pub mod headers;
pub mod hosts;
pub mod licence;
pub mod manifest;

use std::io::{self, Read, Write};

use sha2::{Digest, Sha256};

pub use licence::Licence;
pub use manifest::{File, Manifest};

/// The file that decides which release a visitor gets: the only one whose bytes change in place.
pub const INDEX: &str = "index.html";

/// How many bytes there are, and their SHA-256 as other tools write it.
pub fn sha256(from: &mut dyn Read) -> io::Result<(u64, String)> {
    let mut hash = Hash(Sha256::new());
    let bytes = io::copy(from, &mut hash)?;
    Ok((bytes, hash.0.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
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
