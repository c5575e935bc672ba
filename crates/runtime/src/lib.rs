//! A causal language model on ONNX Runtime: sessions, KV cache, sampling.
//!
//! Knows nothing of text: tokens come in, tokens and logits go out. Templates and tokenizers are
//! the checkpoint's.

mod error;
mod generate;
mod model;
mod sample;

use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ort::environment::Environment;

pub use error::Error;
pub use generate::GenerateOptions;
pub use model::{Model, Options};

/// ONNX Runtime, loaded. There is one to a process.
#[derive(Debug, Clone)]
pub struct Runtime {
    environment: Environment,
    version: String,
}

static LOADED: Mutex<Option<(PathBuf, Runtime)>> = Mutex::new(None);

impl Runtime {
    /// Loads the shared library at `path`, or the one in the folder `path`.
    ///
    /// Loading it again gives what is there; another library in the same process is refused.
    pub fn init(path: &Path) -> Result<Runtime, Error> {
        let library = library_at(path)?;
        let mut loaded = LOADED.lock().expect("no panic while holding it");
        match &*loaded {
            Some((old, runtime)) if *old == library => return Ok(runtime.clone()),
            Some((old, _)) => return Err(Error::AnotherLoaded { old: old.clone(), new: library }),
            None => {}
        }
        let load = |message: String| Error::Load { path: library.clone(), message };
        let environment = ort::init_from(&library)
            .map_err(|e| load(e.to_string()))?
            .with_name("anneal")
            .with_telemetry(false)
            .build()
            .map_err(|e| load(e.to_string()))?;
        environment.set_log_level(ort::logging::LogLevel::Error);
        let runtime = Runtime { environment, version: version(&library, ort::info()) };
        *loaded = Some((library, runtime.clone()));
        Ok(runtime)
    }

    /// `1.30.0`
    pub fn version(&self) -> &str {
        &self.version
    }

    fn loaded() -> Result<Runtime, Error> {
        let loaded = LOADED.lock().expect("no panic while holding it");
        loaded.as_ref().map(|(_, runtime)| runtime.clone()).ok_or(Error::NotLoaded)
    }
}

/// `path` itself, or the one file in it that is ONNX Runtime's library by name.
fn library_at(path: &Path) -> Result<PathBuf, Error> {
    let missing = |e: std::io::Error| Error::Load { path: path.into(), message: e.to_string() };
    let path = path.canonicalize().map_err(missing)?;
    if path.is_file() {
        return Ok(path);
    }
    let mut found = Vec::new();
    for entry in path.read_dir().map_err(missing)? {
        let entry = entry.map_err(missing)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_library = name.starts_with("libonnxruntime.") || name == "onnxruntime.dll";
        if is_library && !entry.path().is_symlink() {
            found.push(entry.path());
        }
    }
    found.sort();
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => Err(Error::Load { path, message: "no ONNX Runtime library in this folder".into() }),
        _ => Err(Error::Load { path, message: "several ONNX Runtime libraries".into() }),
    }
}

/// The version that the library's file is named by, else the branch that it says it was built from:
/// `libonnxruntime.so.1.30.0`, `ORT Build Info: git-branch=rel-1.30.0, git-commit-id=…`.
fn version(library: &Path, info: &str) -> String {
    let name = library.file_name().unwrap_or_default().to_string_lossy();
    if let Some((_, version)) = name.split_once(".so.") {
        return version.into();
    }
    let branch = info.split("git-branch=").nth(1).and_then(|s| s.split(',').next());
    branch.unwrap_or(info).trim().trim_start_matches("rel-").to_string()
}
