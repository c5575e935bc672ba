//! What a step may touch: it reads its inputs and tools, writes its own folders, and nothing else;
//! without the network, unless it is there for that. Landlock holds it to that on Linux.
//!
//! Knows nothing of steps.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What one worker may touch.
#[derive(Debug, Default)]
pub(crate) struct Allowed {
    /// Files and folders to read, and to run.
    pub read: BTreeSet<PathBuf>,
    pub write: BTreeSet<PathBuf>,
    pub network: bool,
}

/// Where systems keep libraries, programs and settings. None of it is a person's own.
const SYSTEM: &[&str] = &[
    "/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin", "/etc", "/opt", "/nix", "/proc", "/sys",
    "/run",
];
/// Devices that programs expect, shared memory, and accelerators: no disks.
const DEVICES: &[&str] =
    &["null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts", "shm", "dri", "kfd"];
/// Variables that lead to libraries or certificates elsewhere.
const LEADING: &[&str] = &["LD_LIBRARY_PATH", "SSL_CERT_FILE", "SSL_CERT_DIR"];

impl Allowed {
    /// A program, and what is installed with it: `/home/me/.pyenv` of `/home/me/.pyenv/bin/python3`.
    pub fn program(&mut self, path: &Path) {
        for path in [Some(path.to_path_buf()), path.canonicalize().ok()].into_iter().flatten() {
            let folder = path.parent().filter(|f| f.ends_with("bin") || f.ends_with("shims"));
            self.read.extend(folder.and_then(Path::parent).map(Path::to_path_buf));
            self.read.insert(path);
        }
    }
}

/// The newest rules of Landlock that are asked for; an older kernel keeps those that it knows.
#[cfg(target_os = "linux")]
const RULES: landlock::ABI = landlock::ABI::V5;

/// Rules for a process to lay on itself (`step::worker`); none where the kernel has no Landlock.
#[cfg(target_os = "linux")]
pub(crate) fn rules(allowed: &Allowed) -> io::Result<Option<OwnedFd>> {
    use landlock::{Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr};

    let leading = LEADING.iter().filter_map(std::env::var_os);
    let leading = leading.flat_map(|value| std::env::split_paths(&value).collect::<Vec<_>>());
    let read = allowed.read.iter().cloned().chain(SYSTEM.iter().map(PathBuf::from)).chain(leading);
    let write = allowed.write.iter().cloned().chain(devices());
    let rules = |paths: Vec<PathBuf>, access| landlock::path_beneath_rules(paths, access);
    let made = (|| {
        let mut ruleset = Ruleset::default().handle_access(AccessFs::from_all(RULES))?;
        if !allowed.network {
            ruleset = ruleset.handle_access(AccessNet::from_all(RULES))?;
        }
        ruleset
            .create()?
            .add_rules(rules(read.collect(), AccessFs::from_read(RULES)))?
            .add_rules(rules(write.collect(), AccessFs::from_all(RULES)))
    })();
    made.map(Into::into).map_err(|e: landlock::RulesetError| io::Error::other(e))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn rules(_: &Allowed) -> io::Result<Option<OwnedFd>> {
    Ok(None)
}

#[cfg(target_os = "linux")]
fn devices() -> Vec<PathBuf> {
    static KNOWN: std::sync::OnceLock<Vec<PathBuf>> = std::sync::OnceLock::new();
    let find = || {
        let dev = Path::new("/dev");
        let all = std::fs::read_dir(dev).into_iter().flatten().flatten();
        let nvidia = all.filter(|e| e.file_name().to_string_lossy().starts_with("nvidia"));
        let fixed = DEVICES.iter().map(|name| dev.join(name));
        fixed.chain(nvidia.map(|entry| entry.path())).collect()
    };
    KNOWN.get_or_init(find).clone()
}

/// Whether this kernel can hold steps to what they may touch.
pub fn available() -> bool {
    rules(&Allowed::default()).is_ok_and(|rules| rules.is_some())
}
