//! What a build looked at when it found everything made: if none of it has moved, neither has any
//! target, and nothing has to be read, hashed or even parsed to know it.
//!
//! Knows nothing of keys. Losing it costs milliseconds.
//!
//! A file has not moved if its inode, its size and both its times are what they were. No call sets
//! a ctime back; and what is remembered had been at rest for longer than any file system's clock is
//! coarse when the build began. So a change since then shows.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use step::{ActionKey, BlobDigest, CodeDigest, TreeDigest};

use crate::build::Built;
use crate::capacity::threads_here;
use crate::resolve::{Graph, Node, Origin};
use crate::stamp::Stamp;
use crate::target::TargetId;
use crate::{Engine, held};

/// Another one means another layout, and nothing remembered.
const FORMAT: u32 = 2;
const AT_REST: Duration = Duration::from_secs(2);
/// Overrides of tools: whoever sets one may change what lies behind it in ways not watched here.
const OVERRIDES: [(&str, &str); 2] = [("libtorch", "LIBTORCH"), ("onnxruntime", "ORT_DYLIB_PATH")];

/// A path, and what it was; `None` if absent.
type Seen = (PathBuf, Option<Stamp>);

/// One set of targets as it was found made.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Fresh {
    format: u32,
    /// `PATH`, which finds programs.
    path: String,
    processor: Option<String>,
    /// The tools of the steps.
    tools: BTreeSet<String>,
    /// What every target hangs on: the program, the code, the recipes.
    all: Vec<Seen>,
    /// The code of each family.
    codes: BTreeMap<String, CodeDigest>,
    targets: HashMap<TargetId, Target>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Target {
    /// Found out once in a run.
    #[serde(skip)]
    rests: OnceLock<bool>,
    key: ActionKey,
    output: TreeDigest,
    /// The outputs that it was made from.
    inputs: BTreeMap<TargetId, TreeDigest>,
    /// Its files on the way in and out.
    seen: Vec<Seen>,
}

/// What is known of targets that were found made before.
#[derive(Debug, PartialEq, Eq)]
pub struct Remembered {
    /// How many there are.
    pub all: usize,
    /// Those that something has happened to since, or to what they are made of. All others are made.
    pub moved: Vec<TargetId>,
}

impl Target {
    fn rests(&self) -> bool {
        *self.rests.get_or_init(|| self.seen.iter().all(rests))
    }
}

impl Engine {
    /// What is known of the targets that these words stand for, without a look at any recipe.
    pub fn remembered(&self, words: &[String]) -> Option<Remembered> {
        self.recall(words);
        let fresh = held(&self.remembered);
        let all = &fresh.as_ref()?.targets;
        // Many are looked at by all threads; what was looked at once is known.
        const MANY: usize = 200;
        if all.len() >= MANY {
            let targets: Vec<&Target> = all.values().collect();
            std::thread::scope(|scope| {
                for part in targets.chunks(targets.len().div_ceil(threads_here())) {
                    scope.spawn(|| part.iter().for_each(|target| _ = target.rests()));
                }
            });
        }
        let mut moved: BTreeSet<&TargetId> =
            all.iter().filter(|(_, target)| !target.rests()).map(|(id, _)| id).collect();
        loop {
            let hangs = |target: &Target| target.inputs.keys().any(|id| moved.contains(id));
            let more = all.iter().filter(|(id, target)| !moved.contains(id) && hangs(target));
            let more: Vec<&TargetId> = more.map(|(id, _)| id).collect();
            if more.is_empty() {
                break;
            }
            moved.extend(more);
        }
        Some(Remembered { all: all.len(), moved: moved.into_iter().cloned().collect() })
    }

    /// The code of a family, if it is remembered.
    pub(crate) fn code_remembered(&self, family: &str) -> Option<CodeDigest> {
        held(&self.remembered).as_ref()?.codes.get(family).copied()
    }

    /// Takes up what is remembered of these words, if what all their targets hang on has not moved.
    pub(crate) fn recall(&self, words: &[String]) {
        let mut remembered = held(&self.remembered);
        if remembered.is_none() && !words.is_empty() {
            *remembered = self.fresh(words);
        }
    }

    fn fresh(&self, words: &[String]) -> Option<Fresh> {
        let bytes = fs::read(self.fresh_path(words)).ok()?;
        let fresh: Fresh = serde_json::from_slice(&bytes).ok()?;
        let same = fresh.format == FORMAT
            && fresh.path == path_variable()
            && fresh.processor == crate::plan::processor()
            && !overridden(&fresh.tools);
        (same && fresh.all.iter().all(rests)).then_some(fresh)
    }

    /// Remembers that everything was made, if all of it was at rest when the build `began`.
    pub(crate) fn remember_fresh(
        &self,
        words: &[String],
        graph: &Graph,
        built: &[Built],
        began: SystemTime,
    ) {
        // What was made just now is not at rest.
        if built.len() < graph.nodes.len() || built.iter().any(|b| b.ran) {
            return;
        }
        // The graph may be a part of what was asked for: the rest is as it was.
        let before = held(&self.remembered).take();
        let Some(mut fresh) = before.or_else(|| self.nothing_yet(graph)) else { return };
        let outputs: BTreeMap<&TargetId, TreeDigest> =
            built.iter().map(|b| (&b.id, b.output)).collect();
        for (node, built) in graph.nodes.iter().zip(built) {
            let known = fresh.targets.get(&node.id);
            if known.is_some_and(|target| target.key == built.key && target.rests()) {
                continue;
            }
            let Some(paths) = self.paths_of(node, built) else { return };
            let made_from = node.targets().map(|id| (id.clone(), outputs[id]));
            let target = Target {
                rests: OnceLock::new(),
                key: built.key,
                output: built.output,
                inputs: made_from.collect(),
                seen: paths.into_iter().map(see).collect(),
            };
            fresh.targets.insert(node.id.clone(), target);
        }
        let latest = nanoseconds(began - AT_REST);
        let seen = fresh.targets.values().flat_map(|t| &t.seen).chain(&fresh.all);
        if seen.filter_map(|(_, stamp)| stamp.as_ref()).any(|stamp| stamp.ctime() > latest) {
            return;
        }
        let bytes = serde_json::to_vec(&fresh).expect("paths of the engine are Unicode");
        let _ = crate::links::write_atomic(&self.fresh_path(words), &bytes);
    }

    /// What all targets of the graph hang on, and none of them. `None` if it cannot be watched.
    fn nothing_yet(&self, graph: &Graph) -> Option<Fresh> {
        let tools = graph.nodes.iter().flat_map(|node| node.def.tools);
        let tools: BTreeSet<String> = tools.map(ToString::to_string).collect();
        let families: BTreeSet<&str> = graph.nodes.iter().map(|node| node.family.name).collect();
        let code = |family: &str| Some((family.to_string(), self.family_code(family).ok()?));
        (!overridden(&tools)).then_some(Fresh {
            format: FORMAT,
            path: path_variable(),
            processor: crate::plan::processor(),
            tools,
            all: self.paths_of_all(graph).into_iter().map(see).collect(),
            codes: families.into_iter().map(code).collect::<Option<_>>()?,
            targets: HashMap::new(),
        })
    }

    /// The files that a target hangs on alone, and those that it is made of. `None` if they cannot
    /// be listed.
    fn paths_of(&self, node: &Node, built: &Built) -> Option<Vec<PathBuf>> {
        let mut paths = Vec::new();
        for input in &node.inputs {
            if let Origin::Path { path, .. } = &input.from {
                below(path, &|_| true, &mut paths).ok()?;
            }
        }
        let tree = self.store().tree(built.output).ok()?;
        let digests = tree.entries().iter().map(|entry| entry.digest);
        paths.extend(digests.map(|digest| self.store().blob_path(digest)));
        let link = self.link(&node.id);
        paths.extend(tree.entries().iter().map(|entry| link.join(&entry.path)));
        paths.push(link);
        paths.push(self.pointer(&node.id));
        Some(paths)
    }

    fn paths_of_all(&self, graph: &Graph) -> BTreeSet<PathBuf> {
        let mut paths = BTreeSet::new();
        paths.extend(std::env::current_exe());
        for name in ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "recipes"] {
            paths.insert(self.root().join(name));
        }
        // The pins of the page's libraries.
        paths.insert(self.root().join("site/package-lock.json"));
        for node in &graph.nodes {
            let recipe = self.root().join("recipes").join(&node.id.recipe);
            paths.extend(["toml", "lock"].map(|end| recipe.with_added_extension(end)));
        }
        let programs = graph.nodes.iter().flat_map(|node| (node.def.programs)(&node.params));
        for program in programs.collect::<BTreeSet<_>>() {
            // One may come to lie in a folder that is searched earlier.
            for dir in std::env::split_paths(&path_variable()) {
                let file = dir.join(&program);
                let found = file.is_file();
                paths.extend([dir, file]);
                if found {
                    break;
                }
            }
        }
        let mut code = Vec::new();
        let counts = |path: &Path| !path.ends_with("target");
        let _ = below(&self.root().join("crates"), &counts, &mut code);
        paths.extend(code);
        paths
    }

    fn fresh_path(&self, words: &[String]) -> PathBuf {
        let name = BlobDigest::of(words.join("\0").as_bytes()).to_string();
        self.store().root().join("fresh").join(&name[..32])
    }

    /// The target as it is remembered, if nothing of it has moved and it was made from these.
    pub(crate) fn still_made(
        &self,
        node: &Node,
        outputs: &BTreeMap<TargetId, TreeDigest>,
    ) -> Option<Built> {
        let fresh = held(&self.remembered);
        let target = fresh.as_ref()?.targets.get(&node.id)?;
        let same = |(id, output): (&TargetId, &TreeDigest)| outputs.get(id) == Some(output);
        let fits = target.inputs.iter().all(same) && target.rests();
        fits.then(|| Built {
            id: node.id.clone(),
            key: target.key,
            output: target.output,
            ran: false,
            fetched: None,
        })
    }
}

/// Everything at and below `path` that `counts`, folders too: what comes or goes moves its folder.
fn below(
    path: &Path,
    counts: &dyn Fn(&Path) -> bool,
    out: &mut Vec<PathBuf>,
) -> std::io::Result<()> {
    out.push(path.to_path_buf());
    if fs::metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            let path = entry?.path();
            if counts(&path) {
                below(&path, counts, out)?;
            }
        }
    }
    Ok(())
}

fn see(path: PathBuf) -> Seen {
    let stamp = Stamp::of(&path);
    (path, stamp)
}

fn rests((path, then): &Seen) -> bool {
    Stamp::of(path) == *then
}

fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

fn overridden(tools: &BTreeSet<String>) -> bool {
    let set = |&(_, variable): &(&str, &str)| std::env::var_os(variable).is_some();
    OVERRIDES.iter().filter(|(tool, _)| tools.contains(*tool)).any(set)
}

fn path_variable() -> String {
    std::env::var("PATH").unwrap_or_default()
}
