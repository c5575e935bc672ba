//! What the store promises of any folder and any history, held against a model in memory.
//!
//! `PROPTEST_CASES` says how many cases of each.

mod model;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use model::{Files, KEYS, Model, NAMES, Read, SIZES, action, content, input, result, tree};
use proptest::prelude::*;
use proptest::test_runner::Config;
use step::{ActionResult, BlobDigest, Tree, canonical};
use store::{GcOptions, Lookup, Root, Store, StoreError};
use tempfile::TempDir;

/// `few` cases, unless the environment says how many.
fn config(few: u32) -> Config {
    let asked = std::env::var_os("PROPTEST_CASES").is_some();
    let default = Config::default();
    let cases = if asked { default.cases } else { few };
    // What failed is printed, and belongs into a test of its own.
    Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..default }
}

fn bytes(seed: u8, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Every file below `dir`, with its bytes.
fn contents(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    fn visit(root: &Path, dir: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                visit(root, &path, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                out.insert(name, fs::read(path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    visit(dir, dir, &mut out);
    out
}

/// In memory, where there is a disk for that: to sync a real one takes most of the time.
fn memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

// ── any folder ──

#[derive(Debug, Clone)]
enum Piece {
    Folder,
    /// `linked`: it has a second name outside.
    File {
        size: usize,
        seed: u8,
        linked: bool,
    },
}

/// What may stand between two slashes of a tree's path.
fn name() -> impl Strategy<Value = String> {
    let fit = |text: String| {
        let mut name: String = text.chars().filter(|c| !['/', '\\', '\0'].contains(c)).collect();
        while name.len() > 255 {
            name.pop();
        }
        let odd = ["", ".", ".."].contains(&&*name) || store::SKIPPED.contains(&&*name);
        if odd { "odd".into() } else { name }
    };
    prop_oneof![
        4 => "[a-c]{1,2}",
        2 => "[ .'\"\n-]{0,3}[a-zä ]{1,9}",
        2 => "\\PC{1,40}",
        1 => "[a-c]{255}",
        1 => "[\u{4e00}-\u{9fff}]{85}",
    ]
    .prop_map(fit)
}

/// Sizes on both sides of what BLAKE3 and the store read at once.
fn size() -> impl Strategy<Value = usize> {
    prop_oneof![
        3 => 0..=40_usize,
        3 => (1..=16_usize, 0..=2_usize).prop_map(|(blocks, more)| blocks * 1024 + more - 1),
        1 => (1 << 18) - 1..=(1 << 18) + 1_usize,
        1 => 0..300_000_usize,
    ]
}

/// Path → what is there; where two would be in each other's way, the first stays.
fn folder() -> impl Strategy<Value = BTreeMap<String, Piece>> {
    let file = (size(), 0..3_u8, prop::bool::weighted(0.1))
        .prop_map(|(size, seed, linked)| Piece::File { size, seed, linked });
    let piece = prop_oneof![6 => file, 1 => Just(Piece::Folder)];
    prop::collection::vec((prop::collection::vec(name(), 1..=4), piece), 0..12).prop_map(|all| {
        let mut folder: BTreeMap<String, Piece> = BTreeMap::new();
        for (parts, piece) in all {
            let path = parts.join("/");
            let within = |a: &str, b: &str| a == b || a.starts_with(&format!("{b}/"));
            if !folder.keys().any(|other| within(&path, other) || within(other, &path)) {
                folder.insert(path, piece);
            }
        }
        folder
    })
}

fn make<'a>(dir: &Path, outside: &Path, pieces: impl Iterator<Item = (&'a String, &'a Piece)>) {
    fs::create_dir_all(dir).unwrap();
    for (i, (path, piece)) in pieces.enumerate() {
        let path = dir.join(path);
        match piece {
            Piece::Folder => fs::create_dir_all(path).unwrap(),
            Piece::File { size, seed, linked } => {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, bytes(*seed, *size)).unwrap();
                if *linked {
                    let name = format!("{}-{i}", dir.file_name().unwrap().to_str().unwrap());
                    fs::hard_link(path, outside.join(name)).unwrap();
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn a_folder_that_goes_in_comes_out(folder in folder()) {
        let dir = tempfile::tempdir().unwrap();
        let [v1, one, two, out, outside] =
            ["v1", "one", "two", "out", "outside"].map(|name| dir.path().join(name));
        fs::create_dir(&outside).unwrap();
        let store = Store::open(&v1).unwrap();
        make(&one, &outside, folder.iter());
        make(&two, &outside, folder.iter().rev());
        let expected = contents(&one);

        let seen = store.hash_path(&one).unwrap();
        let kept = store.ingest(&one).unwrap();
        prop_assert_eq!(seen.digest(), kept.digest());
        prop_assert_eq!(store.ingest_copy(&two).unwrap().digest(), kept.digest());
        prop_assert_eq!(&contents(&two), &expected, "the user's own files stay");
        prop_assert_eq!(store.ingest(&two).unwrap().digest(), kept.digest());
        prop_assert_eq!(contents(&one).len() + contents(&two).len(), 0);
        prop_assert_eq!(&store.tree(kept.digest()).unwrap(), &kept);

        // Whoever has a second name can write through it, but not to what is in the store.
        for linked in fs::read_dir(&outside).unwrap() {
            fs::write(linked.unwrap().path(), "other").unwrap();
        }
        let elsewhere = memory();
        for out in [out, elsewhere.path().join("out")] {
            store.materialise(&kept, &out, true).unwrap();
            prop_assert!(contents(&out) == expected);
            prop_assert_eq!(store.hash_path(&out).unwrap().digest(), kept.digest());
            for path in expected.keys() {
                let mode = fs::metadata(out.join(path)).unwrap().permissions().mode();
                prop_assert_eq!(mode & 0o777, 0o444, "{}", path);
            }
        }
    }
}

// ── any history ──

#[derive(Debug, Clone)]
enum Damage {
    /// One bit, the file's times as they were.
    Flip,
    /// The last byte is gone.
    Cut,
    /// All of it is gone.
    Gone,
}

#[derive(Debug, Clone)]
enum Kept {
    Action(u8),
    Tree(Files),
}

#[derive(Debug, Clone)]
enum Op {
    Put(u8),
    Ingest(Files),
    Record {
        key: u8,
        output: Files,
        report: Files,
        log: u8,
    },
    Forget(u8),
    Lookup(u8),
    Materialise {
        files: Files,
        verify: bool,
    },
    /// A blob that is there, by its place among them.
    Read(usize),
    Damage(usize, Damage),
    /// `other`: somebody else has the store open.
    Gc {
        roots: Vec<Kept>,
        young: bool,
        dry_run: bool,
        other: bool,
    },
    Scrub,
    Reopen,
}

fn files() -> impl Strategy<Value = Files> {
    let any = prop::collection::btree_map(0..NAMES.len() as u8, 0..SIZES.len() as u8, 0..=3);
    // What one action gives, another takes.
    prop_oneof![3 => any, 1 => (0..KEYS).prop_map(input)]
}

fn op(damage: u32) -> impl Strategy<Value = Op> {
    let which = 0..SIZES.len() as u8;
    let kind = prop_oneof![Just(Damage::Flip), Just(Damage::Cut), Just(Damage::Gone)];
    let root = prop_oneof![(0..KEYS).prop_map(Kept::Action), files().prop_map(Kept::Tree)];
    let record = (0..KEYS, files(), files(), which.clone());
    let gc = (prop::collection::vec(root, 0..4), any::<bool>(), any::<bool>(), any::<bool>());
    prop_oneof![
        2 => which.prop_map(Op::Put),
        3 => files().prop_map(Op::Ingest),
        6 => record.prop_map(|(key, output, report, log)| Op::Record { key, output, report, log }),
        1 => (0..KEYS).prop_map(Op::Forget),
        4 => (0..KEYS).prop_map(Op::Lookup),
        4 => (files(), any::<bool>()).prop_map(|(files, verify)| Op::Materialise { files, verify }),
        3 => any::<usize>().prop_map(Op::Read),
        damage => (any::<usize>(), kind).prop_map(|(which, kind)| Op::Damage(which, kind)),
        2 => gc.prop_map(|(roots, young, dry_run, other)| Op::Gc { roots, young, dry_run, other }),
        1 => Just(Op::Scrub),
        1 => Just(Op::Reopen),
    ]
}

/// A store, and the folder that all of it is in.
struct Machine {
    dir: TempDir,
    /// None only while it is opened again.
    store: Option<Store>,
    model: Model,
    steps: u64,
}

impl Machine {
    fn new() -> Self {
        let dir = memory();
        let store = Some(Store::open(&dir.path().join("v1")).unwrap());
        Self { dir, store, model: Model::default(), steps: 0 }
    }

    fn store(&self) -> &Store {
        self.store.as_ref().unwrap()
    }

    /// Does it to the store and to the model, which must agree on what comes of it.
    fn step(&mut self, op: &Op) {
        self.steps += 1;
        let (steps, dir) = (self.steps, self.dir.path().to_path_buf());
        let store = self.store.as_ref().unwrap();
        let model = &mut self.model;
        match op {
            Op::Put(which) => {
                store.put_bytes(&content(*which)).unwrap();
                model.put(content(*which));
            }
            Op::Ingest(files) => {
                assert_eq!(ingest(store, files), tree(files));
                model.put_files(files);
            }
            Op::Record { key, output, report, log } => {
                let result = result(*key, output, report, *log, steps);
                model.put(action(*key).to_canonical());
                model.put_files(output);
                model.put_files(report);
                model.put(content(*log));
                let kept = record(store, *key, output, report, *log, &result);
                assert_eq!(kept, model.record(result), "the first one wins");
            }
            Op::Forget(key) => {
                store.actions().forget(action(*key).key()).unwrap();
                model.results.remove(&action(*key).key());
            }
            Op::Lookup(key) => {
                let key = action(*key).key();
                let known = model.results.contains_key(&key);
                match (store.actions().lookup(key).unwrap(), model.lookup(key)) {
                    (Lookup::Found(found), Some(expected)) => {
                        assert_eq!(*found, expected);
                        for entry in store.tree(found.output).unwrap().entries() {
                            let size = fs::metadata(store.blob_path(entry.digest)).unwrap().len();
                            assert_eq!(size, entry.size, "{}", entry.path);
                        }
                    }
                    (Lookup::Lost(_), None) if known => {}
                    (Lookup::Never, None) if !known => {}
                    other => panic!("{other:?}"),
                }
            }
            Op::Materialise { files, verify } => {
                let (tree, out) = (tree(files), dir.join("out"));
                let expected = model.materialise(&tree, *verify);
                let said = store.materialise(&tree, &out, *verify);
                match (&said, &expected) {
                    (Ok(()), Ok(())) => {}
                    (
                        Err(StoreError::Missing { path, .. } | StoreError::Corrupt { path, .. }),
                        Err((at, _)),
                    ) => assert_eq!(path, Path::new(at)),
                    other => panic!("{other:?}"),
                }
                assert_eq!(Read::of(&said), expected.err().map_or(Read::Sound, |(_, read)| read));
                let laid_out = contents(&out);
                assert!(said.is_err() || laid_out.len() == files.len());
                for entry in tree.entries() {
                    let Some(bytes) = laid_out.get(&entry.path) else { continue };
                    // Nobody asked whether a blob is sound: then it is laid out as it lies there.
                    let sound = BlobDigest::of(bytes) == entry.digest;
                    assert!(sound || !verify && *bytes == model.blobs[&entry.digest]);
                }
                fs::remove_dir_all(out).unwrap();
            }
            Op::Read(which) => {
                let Some(digest) = nth(&model.blobs, *which) else { return };
                let bytes = store.blob(digest);
                assert_eq!(Read::of(&bytes), model.read(digest));
                assert!(bytes.is_err() || bytes.unwrap() == model.blobs[&digest]);
            }
            Op::Damage(which, how) => {
                let Some(digest) = nth(&model.blobs, *which) else { return };
                let bytes = model.blobs.get_mut(&digest).unwrap();
                if let Damage::Gone = how {
                    fs::remove_file(store.blob_path(digest)).unwrap();
                    model.blobs.remove(&digest);
                } else if !bytes.is_empty() {
                    match how {
                        Damage::Flip => bytes[0] ^= 1,
                        _ => _ = bytes.pop(),
                    }
                    overwrite(&store.blob_path(digest), bytes);
                }
            }
            Op::Gc { roots, young, dry_run, other } => {
                let roots: Vec<Root> = roots.iter().map(root).collect();
                let other = other.then(|| Store::open(store.root()).unwrap());
                let told = store.gc(options(&roots, *young, *dry_run));
                if other.is_some() {
                    assert!(matches!(told, Err(StoreError::Busy { .. })));
                    return;
                }
                let told = told.unwrap();
                let told =
                    [told.results_kept, told.results_removed, told.blobs_kept, told.blobs_removed];
                assert_eq!(told, model.gc(&roots, *young, *dry_run));
            }
            Op::Scrub => {
                let report = store.scrub(&mut |_| {}).unwrap();
                let blobs = model.blobs.len();
                let (corrupt, lost) = model.scrub();
                assert_eq!((report.blobs, report.corrupt), (blobs, corrupt));
                assert!(report.unreadable.is_empty() && report.strangers.is_empty());
                assert_eq!(report.lost, lost);
            }
            Op::Reopen => {
                self.store = None;
                self.store = Some(Store::open(&dir.join("v1")).unwrap());
            }
        }
    }

    /// What lies on disk is what the model says, to the byte.
    fn check(&self) {
        let root = self.store().root();
        let blobs = contents(&root.join("cas")).into_iter().map(|(path, bytes)| {
            let name = path.rsplit('/').next().unwrap();
            (name.parse::<BlobDigest>().unwrap(), bytes)
        });
        assert!(blobs.eq(self.model.blobs.clone()), "blobs");
        let mut results = contents(&root.join("actions")).into_values();
        let expected = self.model.results.values().map(canonical::to_vec);
        assert!(expected.eq(results.by_ref()), "results");
        assert_eq!(contents(&root.join("tmp")).len(), 0, "nothing half-written stays");
    }
}

fn ingest(store: &Store, files: &Files) -> Tree {
    let attempt = store.attempt("test").unwrap();
    for (name, which) in files {
        let path = attempt.path().join(NAMES[usize::from(*name)]);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content(*which)).unwrap();
    }
    store.ingest(attempt.path()).unwrap()
}

/// As the engine does it.
fn record(
    store: &Store,
    key: u8,
    output: &Files,
    report: &Files,
    log: u8,
    result: &ActionResult,
) -> ActionResult {
    store.put_action(&action(key)).unwrap();
    ingest(store, output);
    ingest(store, report);
    store.put_bytes(&content(log)).unwrap();
    store.actions().record(result).unwrap()
}

fn root(kept: &Kept) -> Root {
    match kept {
        Kept::Action(key) => Root::Action(action(*key).key()),
        Kept::Tree(files) => Root::Tree(tree(files).digest()),
    }
}

fn options(roots: &[Root], young: bool, dry_run: bool) -> GcOptions<'_> {
    let keep_newer = if young { Duration::from_secs(3600) } else { Duration::ZERO };
    GcOptions { roots, keep_newer, dry_run, ..GcOptions::default() }
}

fn nth(blobs: &BTreeMap<BlobDigest, Vec<u8>>, which: usize) -> Option<BlobDigest> {
    blobs.keys().nth(which % blobs.len().max(1)).copied()
}

/// Other bytes behind the store's back, the times as they were.
fn overwrite(path: &Path, bytes: &[u8]) {
    let before = fs::metadata(path).unwrap();
    let times = FileTimes::new()
        .set_modified(before.modified().unwrap())
        .set_accessed(before.accessed().unwrap());
    fs::set_permissions(path, Permissions::from_mode(0o644)).unwrap();
    fs::write(path, bytes).unwrap();
    File::options().write(true).open(path).unwrap().set_times(times).unwrap();
    fs::set_permissions(path, before.permissions()).unwrap();
}

proptest! {
    #![proptest_config(config(32))]

    #[test]
    fn a_store_is_as_its_history_says(history in prop::collection::vec(op(6), 1..40)) {
        let mut machine = Machine::new();
        for op in &history {
            machine.step(op);
            machine.check();
        }
        // Read to the end, none gives wrong bytes.
        for digest in machine.model.blobs.keys().copied().collect::<Vec<_>>() {
            let read = machine.store().blob(digest);
            assert_eq!(Read::of(&read), machine.model.read(digest));
        }
        machine.check();
    }
}

// ── two histories at once ──

/// Goes through `history` in a store that others use too. They may take away what it has put in, so
/// only this is left: no wrong bytes, and no error but that something is not there any more.
fn work(path: &Path, out: &Path, history: &[Op], who: u64, known: &BTreeSet<BlobDigest>) {
    let mut store = Some(Store::open(path).unwrap());
    for (i, op) in history.iter().enumerate() {
        let opened = store.as_ref().unwrap();
        match op {
            Op::Put(which) => _ = opened.put_bytes(&content(*which)).unwrap(),
            Op::Ingest(files) => assert_eq!(ingest(opened, files), tree(files)),
            Op::Record { key, output, report, log } => {
                let result = result(*key, output, report, *log, who + i as u64);
                let kept = record(opened, *key, output, report, *log, &result);
                assert_eq!(kept.key, result.key);
            }
            Op::Forget(key) => opened.actions().forget(action(*key).key()).unwrap(),
            Op::Lookup(key) => {
                let key = action(*key).key();
                let found = opened.actions().lookup(key).unwrap().found();
                assert!(found.is_none_or(|found| found.key == key));
            }
            // Without a check, what was damaged before may be laid out.
            Op::Materialise { files, .. } => {
                let out = out.join(i.to_string());
                let laid_out = opened.materialise(&tree(files), &out, true);
                let complete = Read::of(&laid_out) == Read::Sound;
                let expected = files
                    .iter()
                    .map(|(name, which)| (NAMES[usize::from(*name)].to_string(), content(*which)));
                let expected: BTreeMap<_, _> = expected.collect();
                let found = contents(&out);
                assert!(!complete || found.len() == expected.len());
                assert!(found.iter().all(|(path, bytes)| expected[path] == *bytes));
            }
            Op::Read(which) => {
                let digest = *known.iter().nth(which % known.len()).unwrap();
                let bytes = opened.blob(digest);
                if Read::of(&bytes) == Read::Sound {
                    assert_eq!(BlobDigest::of(&bytes.unwrap()), digest);
                }
            }
            Op::Damage(which, _) => {
                let digest = *known.iter().nth(which % known.len()).unwrap();
                let _ = fs::remove_file(opened.blob_path(digest));
            }
            Op::Gc { roots, young, dry_run, .. } => {
                let roots: Vec<Root> = roots.iter().map(root).collect();
                match opened.gc(options(&roots, *young, *dry_run)) {
                    Ok(_) | Err(StoreError::Busy { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            Op::Scrub => {
                let report = opened.scrub(&mut |_| {}).unwrap();
                assert!(report.unreadable.is_empty(), "{:?}", report.unreadable);
            }
            Op::Reopen => {
                drop(store.take());
                store = Some(Store::open(path).unwrap());
            }
        }
    }
}

proptest! {
    #![proptest_config(Config { max_shrink_iters: 50, ..config(32) })]

    /// Each thread has opened the store for itself: to the kernel's locks, two processes.
    #[test]
    fn two_at_once_get_no_wrong_bytes(
        before in prop::collection::vec(op(12), 0..12),
        one in prop::collection::vec(op(2), 1..30),
        two in prop::collection::vec(op(2), 1..30),
    ) {
        let mut machine = Machine::new();
        before.iter().for_each(|op| machine.step(op));
        let path = machine.store().root().to_path_buf();
        machine.store = None;
        let mut known: BTreeSet<BlobDigest> =
            (0..SIZES.len() as u8).map(|which| BlobDigest::of(&content(which))).collect();
        known.extend(machine.model.blobs.keys());

        let start = Barrier::new(2);
        thread::scope(|scope| {
            for (who, history) in [(1000, &one), (2000, &two)] {
                let out: PathBuf = machine.dir.path().join(format!("out-{who}"));
                let (path, known, start) = (&path, &known, &start);
                scope.spawn(move || {
                    start.wait();
                    work(path, &out, history, who, known);
                });
            }
        });
        let store = Store::open(&path).unwrap();
        store.scrub(&mut |_| {}).unwrap();
        let report = store.scrub(&mut |_| {}).unwrap();
        prop_assert_eq!((report.corrupt.len(), report.strangers.len()), (0, 0));
        prop_assert_eq!(contents(&path.join("tmp")).len(), 0);
    }
}
