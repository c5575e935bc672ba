//! The page's libraries, through npm and a committed lock file.
//!
//! Knows nothing of what the page does with them. npm checks each package against the lock.

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;
use step::Failure;

use super::io;

/// The folder with package.json and package-lock.json, in the workspace.
const FOLDER: &str = "site";
/// The package whose version stands for all of them.
const MAIN: &str = "@huggingface/transformers";
/// What of the packages is kept, and under which name: what a page loads. The rest (builds for
/// Node, source maps) is twenty times as much.
pub const KEEP: &[(&str, &str)] = &[
    ("@huggingface/transformers/dist/transformers.min.js", "transformers.min.js"),
    ("onnxruntime-web/dist/ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.mjs"),
    ("onnxruntime-web/dist/ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.wasm"),
    (
        "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.mjs",
        "ort-wasm-simd-threaded.asyncify.mjs",
    ),
    (
        "onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm",
        "ort-wasm-simd-threaded.asyncify.wasm",
    ),
    ("@huggingface/transformers/LICENSE", "licenses/transformers.txt"),
    ("onnxruntime-web/package.json", "licenses/onnxruntime-web.json"),
];

/// Its version, and the bytes that pin it: of every package that ships, name, version and hash.
/// Development packages do not count.
pub fn pins(root: &Path) -> Result<(String, Vec<u8>), Failure> {
    let path = root.join(FOLDER).join("package-lock.json");
    let bytes = std::fs::read(&path).map_err(|e| io("read", &path, e))?;
    let lock: Value = serde_json::from_slice(&bytes)
        .map_err(|e| Failure::input(format!("{} is not a lock of npm: {e}", path.display())))?;
    let packages = lock["packages"].as_object().into_iter().flatten();
    let mut pins = String::new();
    let mut version = None;
    for (place, package) in packages.filter(|(place, _)| !place.is_empty()) {
        if package["dev"] == true {
            continue;
        }
        let field = |name: &str| package[name].as_str().unwrap_or_default();
        if place.ends_with(MAIN) {
            version = Some(field("version").to_string());
        }
        pins.push_str(&format!("{place} {} {}\n", field("version"), field("integrity")));
    }
    let version = version.ok_or_else(|| {
        Failure::input(format!("{} does not pin {MAIN}", path.display()))
            .hint(format!("run `npm install --save-exact {MAIN}` in {FOLDER}/"))
    })?;
    Ok((version, pins.into_bytes()))
}

/// Installs the packages and keeps the page's part of them in `dir`, an empty folder. Their
/// install scripts do not run.
pub fn fetch(root: &Path, dir: &Path, tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
    let installed = dir.join("npm");
    std::fs::create_dir_all(&installed).map_err(|e| io("create", &installed, e))?;
    for name in ["package.json", "package-lock.json"] {
        let from = root.join(FOLDER).join(name);
        std::fs::copy(&from, installed.join(name)).map_err(|e| io("copy", &from, e))?;
    }
    tell("installing the page's libraries with npm");
    install(&installed)?;
    for (from, to) in KEEP {
        let (from, to) = (installed.join("node_modules").join(from), dir.join(to));
        let parent = to.parent().expect("a file below dir");
        std::fs::create_dir_all(parent).map_err(|e| io("create", parent, e))?;
        std::fs::rename(&from, &to).map_err(|e| io("keep", &from, e))?;
    }
    std::fs::remove_dir_all(&installed).map_err(|e| io("remove", &installed, e))
}

fn install(dir: &Path) -> Result<(), Failure> {
    let output = Command::new("npm")
        .args(["ci", "--omit=dev", "--ignore-scripts", "--no-audit", "--no-fund"])
        .current_dir(dir)
        .stdin(Stdio::null())
        .output()
        .map_err(|e| {
            Failure::environment(format!("cannot fetch {MAIN}: npm does not start: {e}"))
                .hint("install Node.js (Debian: `apt install npm`)")
        })?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said: Vec<&str> = said.lines().filter(|l| !l.trim().is_empty()).collect();
    let last = said[said.len().saturating_sub(8)..].join("\n");
    Err(Failure::environment(format!("npm could not fetch {MAIN}:\n{last}"))
        .hint("check the network and npm's settings (`npm config list`) and try again"))
}
