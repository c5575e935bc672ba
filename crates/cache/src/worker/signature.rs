//! Who vouches for a result: ed25519 signatures over the very bytes that are stored.
//!
//! Knows nothing of what is signed.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};
use serde::{Deserialize, Serialize};
use step::Failure;

/// So that a signature means this and nothing else.
const CONTEXT: &[u8] = b"anneal cache result v1\n";

/// What is stored: bytes, and who says that they are so.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Signed {
    pub format: u32,
    /// JSON, as text: what is read is what was signed.
    pub payload: String,
    /// The name of the key.
    pub by: String,
    signature: String,
}

/// A secret key and its name.
pub struct Secret {
    pub name: String,
    key: SigningKey,
}

/// Public keys, by name.
#[derive(Debug, Default)]
pub struct Trusted(Vec<(String, VerifyingKey)>);

impl Secret {
    /// A new one, in a file that only its owner can read. Returns its public half.
    pub fn generate(path: &Path, name: &str) -> Result<String, Failure> {
        if name.is_empty() || name.contains([':', '"']) || name.contains(char::is_whitespace) {
            return Err(Failure::input(format!("`{name}` is no name for a key"))
                .hint("take letters, digits and dashes"));
        }
        let unwritable = |e: std::io::Error| match e.kind() {
            std::io::ErrorKind::AlreadyExists => {
                Failure::input(format!("{} is there already", path.display()))
                    .hint("keep it, or name another file with --file")
            }
            _ => Failure::environment(format!("cannot write {}: {e}", path.display())),
        };
        let mut seed = [0; 32];
        fs::File::open("/dev/urandom")
            .and_then(|mut random| std::io::Read::read_exact(&mut random, &mut seed))
            .map_err(|e| Failure::environment(format!("cannot read /dev/urandom: {e}")))?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).map_err(unwritable)?;
        }
        let text = format!("{name}:{}\n", BASE64.encode(seed));
        let mut options = fs::OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(unwritable)?;
        let public = SigningKey::from_bytes(&seed).verifying_key();
        Ok(format!("{name}:{}", BASE64.encode(public.as_bytes())))
    }

    /// From `name:base64`.
    pub fn parse(text: &str) -> Option<Self> {
        let (name, bytes) = named(text)?;
        Some(Self { name, key: SigningKey::from_bytes(&bytes) })
    }

    /// The one that the environment names, if it does.
    pub fn find() -> Result<Option<Self>, Failure> {
        let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
        let (text, place) = if let Some(text) = variable(cache::SIGNING_KEY) {
            (text.to_string_lossy().into_owned(), cache::SIGNING_KEY.to_string())
        } else if let Some(path) = variable(cache::SIGNING_KEY_FILE) {
            let place = path.to_string_lossy().into_owned();
            let text = fs::read_to_string(&path)
                .map_err(|e| Failure::environment(format!("cannot read {place}: {e}")))?;
            (text, place)
        } else {
            return Ok(None);
        };
        match Self::parse(&text) {
            Some(secret) => Ok(Some(secret)),
            None => Err(Failure::input(format!("{place} holds no signing key"))
                .hint("make one with `cargo xtask cache keygen`")),
        }
    }

    pub fn sign(&self, payload: String) -> Signed {
        let signature = self.key.sign(&message(&payload));
        let signature = BASE64.encode(signature.to_bytes());
        Signed { format: cache::FORMAT, payload, by: self.name.clone(), signature }
    }

    pub fn is_in(&self, trusted: &Trusted) -> bool {
        trusted.0.iter().any(|(_, key)| *key == self.key.verifying_key())
    }
}

impl Trusted {
    /// From the workspace's list.
    pub fn parse(keys: &[String]) -> Result<Self, Failure> {
        let parse = |text: &String| {
            let (name, bytes) = named(text)?;
            Some((name, VerifyingKey::from_bytes(&bytes).ok()?))
        };
        let all = keys.iter().map(|text| {
            parse(text).ok_or_else(|| {
                Failure::input(format!("trusted: `{text}` is no public key"))
                    .hint("`cargo xtask cache keygen` prints the line")
            })
        });
        Ok(Self(all.collect::<Result<_, _>>()?))
    }

    /// The payload, if a key that is trusted signed it; else why not.
    pub fn check(&self, stored: &[u8]) -> Result<String, String> {
        let signed: Signed =
            serde_json::from_slice(stored).map_err(|e| format!("it cannot be read: {e}"))?;
        if signed.format != cache::FORMAT {
            return Err(format!("it has format {}", signed.format));
        }
        if self.0.is_empty() {
            return Err(format!(
                "`{}` signed it, and the workspace lists no `trusted` keys",
                signed.by
            ));
        }
        let signature = BASE64.decode(&signed.signature).ok();
        let signature = signature.and_then(|bytes| Signature::from_slice(&bytes).ok());
        let signature = signature.ok_or("it is not signed")?;
        let message = message(&signed.payload);
        let by =
            |(_, key): &&(String, VerifyingKey)| key.verify_strict(&message, &signature).is_ok();
        match self.0.iter().find(by) {
            Some(_) => Ok(signed.payload),
            None if self.0.iter().any(|(name, _)| *name == signed.by) => {
                Err(format!("its signature is not that of `{}`", signed.by))
            }
            None => Err(format!("`{}` signed it, whom the workspace does not trust", signed.by)),
        }
    }
}

fn message(payload: &str) -> Vec<u8> {
    [CONTEXT, payload.as_bytes()].concat()
}

fn named(text: &str) -> Option<(String, [u8; 32])> {
    let (name, bytes) = text.trim().split_once(':')?;
    Some((name.to_string(), BASE64.decode(bytes).ok()?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_listed_key_vouches_and_only_for_the_bytes_it_signed() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(format!("keys/{name}"));
            let public = Secret::generate(&path, name).unwrap();
            (Secret::parse(&fs::read_to_string(path).unwrap()).unwrap(), public)
        };
        let ((ci, public), (other, _)) = (make("ci"), make("other"));
        let trusted = Trusted::parse(&[public]).unwrap();
        assert!(ci.is_in(&trusted) && !other.is_in(&trusted));
        let check = |signed: &Signed| trusted.check(&serde_json::to_vec(signed).unwrap());
        let mut signed = ci.sign("{\"a\": 1}".into());
        assert_eq!(check(&signed).unwrap(), "{\"a\": 1}");
        signed.payload = "{\"a\": 2}".into();
        assert_eq!(check(&signed).unwrap_err(), "its signature is not that of `ci`");
        signed.signature = String::new();
        assert_eq!(check(&signed).unwrap_err(), "it is not signed");
        let told = "`other` signed it, whom the workspace does not trust";
        assert_eq!(check(&other.sign(String::new())).unwrap_err(), told);
        // A name is no proof.
        let impostor = Secret { name: "ci".into(), ..other };
        let told = "its signature is not that of `ci`";
        assert_eq!(check(&impostor.sign(String::new())).unwrap_err(), told);
        assert!(Secret::generate(&dir.path().join("keys/ci"), "ci").is_err());
    }
}
