//! What the store promises, tried on a real disk.

use std::collections::BTreeMap;
use std::fs::{self, File, FileTimes, Permissions};
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Barrier, mpsc};
use std::thread;
use std::time::{Duration, SystemTime};

use step::{
    Action, ActionKey, ActionResult, BlobDigest, CodeDigest, Failure, Kind, Provenance, Tree,
};
use tempfile::TempDir;

use super::*;

struct Sandbox {
    dir: TempDir,
    store: Store,
}

impl Sandbox {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(&dir.path().join("v1")).unwrap();
        Self { dir, store }
    }

    /// A folder with these files, outside the store.
    fn folder(&self, name: &str, files: &[(&str, &str)]) -> PathBuf {
        let folder = self.dir.path().join(name);
        fs::create_dir_all(&folder).unwrap();
        for (path, content) in files {
            let path = folder.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        folder
    }

    fn ingest(&self, files: &[(&str, &str)]) -> Tree {
        let attempt = self.store.attempt("test").unwrap();
        for (path, content) in files {
            let path = attempt.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        self.store.ingest(attempt.path()).unwrap()
    }

    fn result(&self, action: &Action, files: &[(&str, &str)]) -> ActionResult {
        ActionResult {
            format: 1,
            key: action.key(),
            step: action.step.clone(),
            kind: Kind::Files,
            output: self.ingest(files).digest(),
            report: self.ingest(&[]).digest(),
            log: self.store.put_bytes(b"log").unwrap(),
            metrics: BTreeMap::new(),
            provenance: Provenance {
                started: 0,
                wall_seconds: 0.0,
                cpu_seconds: 0.0,
                peak_memory: 0,
                host: "test".into(),
                device: "cpu".into(),
                versions: BTreeMap::new(),
                git_commit: None,
                git_dirty: false,
                vouched_from: None,
            },
        }
    }

    /// Changes a byte of a blob behind the store's back, its mtime restored.
    fn corrupt(&self, digest: BlobDigest) {
        let path = self.store.blob_path(digest);
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        let mut bytes = fs::read(&path).unwrap();
        bytes[0] ^= 1;
        fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
        fs::write(&path, bytes).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_times(FileTimes::new().set_modified(modified)).unwrap();
    }
}

fn action(step: &str) -> Action {
    Action {
        format: 1,
        step: step.into(),
        params: serde_json::json!({}),
        inputs: BTreeMap::new(),
        code: CodeDigest::of(b""),
        tools: BTreeMap::new(),
        platform: None,
    }
}

/// Every file below `dir`, with its content.
fn contents(dir: &Path) -> BTreeMap<String, String> {
    fn visit(root: &Path, dir: &Path, out: &mut BTreeMap<String, String>) {
        for entry in fs::read_dir(dir).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                visit(root, &path, out);
            } else {
                let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
                out.insert(name, fs::read_to_string(path).unwrap());
            }
        }
    }
    let mut out = BTreeMap::new();
    visit(dir, dir, &mut out);
    out
}

fn owned(files: &[(&str, &str)]) -> BTreeMap<String, String> {
    files.iter().map(|(name, content)| (name.to_string(), content.to_string())).collect()
}

#[test]
fn a_folder_goes_in_and_comes_out() {
    let long = "长".repeat(85); // 255 bytes, the most that a name may have
    let deep = format!("{long}/{}/größe 🦀.txt", "x".repeat(255));
    assert!(deep.chars().count() > 300);
    let files = [("a", "1"), ("b/c", "2"), ("b/d", "1"), ("empty", ""), (deep.as_str(), "3")];
    let sandbox = Sandbox::new();
    let tree = sandbox.ingest(&files);
    assert_eq!(sandbox.store.tree(tree.digest()).unwrap(), tree);
    let out = sandbox.dir.path().join("out");
    sandbox.store.materialise(&tree, &out, true).unwrap();
    assert_eq!(contents(&out), owned(&files));
    let mode = fs::metadata(out.join("a")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o444, "what comes out is read-only");
    assert_eq!(sandbox.store.hash_path(&out).unwrap(), tree);
}

#[test]
fn a_name_that_no_disk_can_hold_is_an_error_that_names_it() {
    let sandbox = Sandbox::new();
    let digest = sandbox.store.put_bytes(b"x").unwrap();
    let path = "n".repeat(300);
    let tree = Tree::new(vec![step::Entry { path: path.clone(), digest, size: 1 }]).unwrap();
    let out = sandbox.dir.path().join("out");
    let error = sandbox.store.materialise(&tree, &out, false).unwrap_err();
    assert!(error.to_string().contains(&path), "{error}");
}

#[test]
fn links_and_special_files_are_refused_by_name_and_nothing_moves() {
    for make in [(|path: &Path| symlink("a", path).unwrap()) as fn(&Path), |path| {
        drop(std::os::unix::net::UnixListener::bind(path).unwrap())
    }] {
        let sandbox = Sandbox::new();
        let folder = sandbox.folder("in", &[("a", "1"), ("sub/b", "2")]);
        make(&folder.join("sub/odd"));
        let error = sandbox.store.ingest(&folder).unwrap_err();
        assert!(matches!(&error, StoreError::Refused { path, .. } if path.ends_with("sub/odd")));
        assert!(folder.join("a").exists() && folder.join("sub/b").exists());
    }
}

#[test]
fn a_file_with_a_second_name_is_copied() {
    let sandbox = Sandbox::new();
    let folder = sandbox.folder("in", &[("a", "first")]);
    let outside = sandbox.dir.path().join("outside");
    fs::hard_link(folder.join("a"), &outside).unwrap();
    let tree = sandbox.store.ingest(&folder).unwrap();
    fs::write(&outside, "other").unwrap();
    sandbox.store.verify_blob(tree.entries()[0].digest).unwrap();
}

#[test]
fn single_files() {
    let sandbox = Sandbox::new();
    let folder = sandbox.folder("in", &[("a", "1"), ("b", "2")]);
    let store = &sandbox.store;
    assert_eq!(store.put_file(&folder.join("a")).unwrap(), BlobDigest::of(b"1"));
    assert!(folder.join("a").exists());
    assert_eq!(store.take_file(&folder.join("b")).unwrap(), BlobDigest::of(b"2"));
    assert!(!folder.join("b").exists());
    assert_eq!(store.blob(BlobDigest::of(b"2")).unwrap(), b"2");
    assert!(!store.has(BlobDigest::of(b"3")));
}

#[test]
fn corruption_is_found_named_and_healed() {
    let sandbox = Sandbox::new();
    let files = [("model.safetensors", "weights"), ("config.json", "{}")];
    let tree = sandbox.ingest(&files);
    let digest = BlobDigest::of(b"weights");
    sandbox.corrupt(digest);
    let out = sandbox.dir.path().join("out");
    let error = sandbox.store.materialise(&tree, &out, true).unwrap_err();
    let StoreError::Corrupt { digest: named, path, quarantine } = &error else {
        panic!("expected a corrupt blob, got {error}")
    };
    assert_eq!((*named, path.as_path()), (digest, Path::new("model.safetensors")));
    assert!(quarantine.is_file());
    assert!(!sandbox.store.has(digest));
    let failure = Failure::from(error);
    assert!(failure.message.contains("model.safetensors") && failure.hint.is_some());

    let again = sandbox.dir.path().join("again");
    let error = sandbox.store.materialise(&tree, &again, false).unwrap_err();
    assert!(
        matches!(&error, StoreError::Missing { path, .. } if path.ends_with("model.safetensors"))
    );

    sandbox.ingest(&files);
    let fresh = sandbox.dir.path().join("fresh");
    sandbox.store.materialise(&tree, &fresh, true).unwrap();
    assert_eq!(contents(&fresh), owned(&files));
}

#[test]
fn the_first_result_wins_a_race() {
    let sandbox = Sandbox::new();
    let action = action("test/race");
    let results: Vec<_> =
        (0..8).map(|i| sandbox.result(&action, &[("out", &i.to_string())])).collect();
    let start = Barrier::new(results.len());
    let winners: Vec<ActionResult> = thread::scope(|scope| {
        let threads: Vec<_> = results
            .iter()
            .map(|result| {
                scope.spawn(|| {
                    start.wait();
                    sandbox.store.actions().record(result).unwrap()
                })
            })
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(winners.iter().all(|w| *w == winners[0]), "everybody hears of one winner");
    let kept = sandbox.store.actions().lookup(action.key()).unwrap();
    assert_eq!(kept.found().as_ref(), Some(&winners[0]));
    assert_eq!(sandbox.store.actions().all().unwrap(), [winners[0].clone()]);
}

#[test]
fn a_result_without_its_files_is_lost_and_may_be_replaced() {
    let sandbox = Sandbox::new();
    let action = action("test/lost");
    let actions = sandbox.store.actions();
    assert_eq!(actions.lookup(action.key()).unwrap(), Lookup::Never);
    let first = sandbox.result(&action, &[("weights", "first")]);
    actions.record(&first).unwrap();

    let blob = sandbox.store.blob_path(BlobDigest::of(b"first"));
    fs::remove_file(&blob).unwrap();
    fs::write(&blob, "shorter by some").unwrap();
    let lost = |text: &str| Lookup::Lost(text.into());
    let expected = lost("weights no longer has its size of 5 bytes");
    assert_eq!(actions.lookup(action.key()).unwrap(), expected);
    fs::remove_file(&blob).unwrap();
    assert_eq!(actions.lookup(action.key()).unwrap(), lost("weights is lost"));

    let second = sandbox.result(&action, &[("weights", "second")]);
    assert_eq!(actions.record(&second).unwrap(), second);
    assert_eq!(actions.lookup(action.key()).unwrap().found(), Some(second));
}

#[test]
fn an_action_is_kept_under_its_key() {
    let sandbox = Sandbox::new();
    let action = action("test/kept");
    assert_eq!(sandbox.store.put_action(&action).unwrap(), action.key());
    assert_eq!(sandbox.store.action(action.key()).unwrap(), action);
}

#[test]
fn sources_are_read_where_they_lie() {
    let sandbox = Sandbox::new();
    let folder = sandbox.folder("src", &[("a", "1"), ("sub/b", "2"), (".git/config", "x")]);
    symlink("a", folder.join("link")).unwrap();
    let tree = sandbox.store.hash_path(&folder).unwrap();
    let paths: Vec<_> = tree.entries().iter().map(|e| e.path.as_str()).collect();
    assert_eq!(paths, ["a", "link", "sub/b"]);
    assert!(!sandbox.store.has(tree.entries()[0].digest), "looking takes nothing in");
    assert_eq!(sandbox.store.ingest_copy(&folder).unwrap(), tree);
    assert!(folder.join("a").exists(), "originals stay");
    let out = sandbox.dir.path().join("out");
    sandbox.store.materialise(&tree, &out, true).unwrap();
    assert_eq!(contents(&out), owned(&[("a", "1"), ("link", "1"), ("sub/b", "2")]));

    let file = sandbox.store.hash_path(&folder.join("a")).unwrap();
    assert_eq!(file.entries()[0].path, "a");

    for (target, what) in [("/etc/hostname", "leads out"), ("sub", "no file")] {
        let _ = fs::remove_file(folder.join("bad"));
        symlink(target, folder.join("bad")).unwrap();
        let error = sandbox.store.hash_path(&folder).unwrap_err();
        assert!(error.to_string().contains("src/bad"), "{error}");
        assert!(error.to_string().contains(what), "{error}");
    }
}

/// Takes two seconds: that is how long a file must have been at rest to be remembered.
#[test]
fn an_edit_of_the_same_size_with_its_mtime_restored_is_seen() {
    let sandbox = Sandbox::new();
    let path = sandbox.folder("src", &[("rows", "before")]).join("rows");
    let digest = |store: &Store| store.hash_path(&path).unwrap().entries()[0].digest;
    let cache = sandbox.store.root().join("stat-cache");
    assert_eq!(digest(&sandbox.store), BlobDigest::of(b"before"));
    sandbox.store.save_stat_cache();
    assert!(!cache.exists(), "a file that was just written is not remembered");

    thread::sleep(Duration::from_millis(2100));
    assert_eq!(digest(&sandbox.store), BlobDigest::of(b"before"));
    sandbox.store.save_stat_cache();
    let (ours, false_one) =
        (BlobDigest::of(b"before").to_string(), BlobDigest::of(b"").to_string());
    let text = fs::read_to_string(&cache).unwrap();
    assert!(text.contains(&ours));
    fs::write(&cache, text.replace(&ours, &false_one)).unwrap();
    let poisoned = Store::open(sandbox.store.root()).unwrap();
    assert_eq!(digest(&poisoned), BlobDigest::of(b""), "an unchanged file is not read again");

    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    fs::write(&path, "after!").unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_times(FileTimes::new().set_modified(modified)).unwrap();
    assert_eq!(digest(&sandbox.store), BlobDigest::of(b"after!"));
}

#[test]
fn scrub_finds_what_is_bad_and_says_who_loses() {
    let sandbox = Sandbox::new();
    let action = action("test/scrub");
    let result = sandbox.result(&action, &[("good", "good"), ("bad", "bad"), ("gone", "gone")]);
    sandbox.store.actions().record(&result).unwrap();
    let (bad, gone) = (BlobDigest::of(b"bad"), BlobDigest::of(b"gone"));
    sandbox.corrupt(bad);
    fs::remove_file(sandbox.store.blob_path(gone)).unwrap();
    let stranger = sandbox.store.root().join("cas/notes.txt");
    fs::write(&stranger, "").unwrap();

    let mut last = ScrubProgress::default();
    let report = sandbox.store.scrub(&mut |at| last = at).unwrap();
    assert_eq!(report.corrupt, [bad]);
    assert_eq!(report.strangers, [stranger]);
    assert!(report.unreadable.is_empty());
    assert_eq!((last.blobs, last.bytes), (report.blobs, report.bytes));
    assert_eq!((last.blobs, last.bytes), (last.of_blobs, last.of_bytes));
    let lost: Vec<_> = report.lost.iter().map(|l| (l.part, l.path.as_str(), l.digest)).collect();
    assert_eq!(lost, [("output", "bad", bad), ("output", "gone", gone)]);
    assert!(report.lost.iter().all(|l| l.key == action.key() && l.step == "test/scrub"));
}

#[test]
fn gc_keeps_what_can_be_reached() {
    let sandbox = Sandbox::new();
    let store = &sandbox.store;
    let (kept, dropped) = (action("test/kept"), action("test/dropped"));
    for (action, content) in [(&kept, "kept"), (&dropped, "dropped")] {
        store.put_action(action).unwrap();
        let result = sandbox.result(action, &[("out", content), ("shared", "shared")]);
        store.actions().record(&result).unwrap();
        fs::write(store.scratch(action.key()).unwrap().join("checkpoint"), "1").unwrap();
    }
    let loose = sandbox.ingest(&[("loose", "loose")]);
    let (waiting, unknown) = (action("test/waiting"), action("test/unknown"));
    let checkpoint = store.scratch(waiting.key()).unwrap();
    let forgotten = store.scratch(unknown.key()).unwrap();
    let living = store.attempt("living").unwrap();
    let dead = store.root().join("attempts/dead-123");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("half"), "half").unwrap();

    let roots = [Root::Action(kept.key()), Root::Action(waiting.key()), Root::Tree(loose.digest())];
    let options = |dry_run| GcOptions { roots: &roots, dry_run, ..GcOptions::default() };
    let told = store.gc(options(true)).unwrap();
    assert!(store.has(BlobDigest::of(b"dropped")) && dead.exists(), "a dry run removes nothing");
    assert_eq!(store.gc(options(false)).unwrap(), told);

    assert_eq!((told.results_kept, told.results_removed), (1, 1));
    assert_eq!((told.attempts_removed, told.scratch_removed), (1, 3));
    for (content, stays) in
        [("kept", true), ("shared", true), ("loose", true), ("log", true), ("dropped", false)]
    {
        assert_eq!(store.has(BlobDigest::of(content.as_bytes())), stays, "{content}");
    }
    assert!(store.actions().lookup(kept.key()).unwrap().found().is_some());
    assert_eq!(store.action(kept.key()).unwrap(), kept, "why needs it");
    assert!(store.tree(loose.digest()).is_ok());
    assert_eq!(store.actions().lookup(dropped.key()).unwrap(), Lookup::Never);
    assert!(checkpoint.exists() && !forgotten.exists());
    assert!(living.path().exists() && !dead.exists());
    assert!(store.scrub(&mut |_| {}).unwrap().lost.is_empty());

    let hour = Duration::from_secs(3600);
    let young = GcOptions { keep_newer: hour, dry_run: true, ..GcOptions::default() };
    assert_eq!(store.gc(young).unwrap().results_removed, 0);
    let but_one = GcOptions { drop: &[kept.key()], ..young };
    assert_eq!(store.gc(but_one).unwrap().results_removed, 1);
}

#[test]
fn gc_keeps_the_files_of_a_result_that_is_an_input_too() {
    let sandbox = Sandbox::new();
    let store = &sandbox.store;
    let first = action("test/first");
    let result = sandbox.result(&first, &[("weights", "weights")]);
    store.actions().record(&result).unwrap();
    // Results are gone through by key: some of these come before the first one.
    let later = |i: u8| Action {
        inputs: [("model".to_string(), result.output)].into(),
        ..action(&format!("test/later-{i}"))
    };
    let later: Vec<Action> = (0..16).map(later).collect();
    assert!(later.iter().any(|a| a.key() < first.key()));
    for action in &later {
        store.put_action(action).unwrap();
        store.actions().record(&sandbox.result(action, &[("other", "other")])).unwrap();
    }
    let roots: Vec<Root> = later.iter().chain([&first]).map(|a| Root::Action(a.key())).collect();
    let options = GcOptions { roots: &roots, ..GcOptions::default() };
    store.gc(options).unwrap();
    assert_eq!(store.actions().lookup(first.key()).unwrap().found(), Some(result));
}

#[test]
fn gc_waits_for_no_one_and_disturbs_no_one() {
    let sandbox = Sandbox::new();
    let other = Store::open(sandbox.store.root()).unwrap();
    let options = GcOptions::default();
    assert!(matches!(sandbox.store.gc(options), Err(StoreError::Busy { .. })));
    drop(other);
    sandbox.store.gc(options).unwrap();
}

#[test]
fn one_builder_an_action() {
    let sandbox = Sandbox::new();
    let key = ActionKey::of(b"x");
    let guard = sandbox.store.lock(key, &mut |_| panic!("nobody to wait for")).unwrap();
    let (heard, holder) = mpsc::channel();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            sandbox.store.lock(key, &mut |who| heard.send(who.clone()).unwrap()).unwrap()
        });
        let who = holder.recv().unwrap();
        assert_eq!(who.pid, Some(std::process::id()));
        assert!(who.host.is_some());
        assert!(!waiting.is_finished());
        drop(guard);
        waiting.join().unwrap();
    });
}

#[test]
fn a_newer_store_is_refused() {
    let sandbox = Sandbox::new();
    let root = sandbox.store.root().to_path_buf();
    fs::write(root.join("version"), "2\n").unwrap();
    let error = Store::open(&root).unwrap_err();
    assert!(matches!(error, StoreError::Format { found: 2, .. }), "{error}");
    assert!(Failure::from(error).hint.unwrap().contains("newer Anneal"));
    fs::write(root.join("version"), "x\n").unwrap();
    assert!(matches!(Store::open(&root), Err(StoreError::Malformed { .. })));
}

#[test]
fn a_full_disk_and_a_read_only_one_have_their_own_errors() {
    let os = |code| std::io::Error::from_raw_os_error(code);
    let path = Path::new("/artifacts/v1/tmp/x");
    for (code, hint) in [(28, "xtask gc"), (122, "xtask gc"), (30, "writable"), (13, "owns")] {
        let failure = Failure::from(io("write", path)(os(code)));
        assert_eq!(failure.class, step::Class::Environment);
        assert!(failure.message.contains("/artifacts/v1/tmp/x"), "{failure}");
        assert!(failure.hint.unwrap().contains(hint), "{code}");
    }
}

#[test]
fn after_a_power_cut_what_came_in_last_is_held_to_its_digests() {
    let sandbox = Sandbox::new();
    let marks = |store: &Store| fs::read_dir(store.root().join("unsynced")).unwrap().count();
    let (before, after) = (action("test/before"), action("test/after"));
    let made = |action: &Action, text: &str| {
        let result = sandbox.result(action, &[("file", text)]);
        sandbox.store.actions().record(&result).unwrap();
        sandbox.store.tree(result.output).unwrap().entries()[0].digest
    };
    let old = made(&before, "long there");
    assert_eq!(marks(&sandbox.store), 1);
    sandbox.store.settle().unwrap();
    assert_eq!(marks(&sandbox.store), 0);
    let hour_ago = SystemTime::now() - Duration::from_secs(3600);
    let path = sandbox.store.blob_path(old);
    fs::set_permissions(&path, Permissions::from_mode(0o644)).unwrap();
    File::options().write(true).open(&path).unwrap().set_modified(hour_ago).unwrap();
    let new = made(&after, "came in last");

    // The cut: files of the last build are not what they were, and the machine is started again.
    let mark = fs::read_dir(sandbox.store.root().join("unsynced")).unwrap().next().unwrap();
    fs::write(mark.unwrap().path(), "another boot").unwrap();
    sandbox.corrupt(new);
    sandbox.corrupt(old);
    let Sandbox { dir, store } = sandbox;
    std::mem::forget(store); // nobody got to tidy up

    let store = Store::open(&dir.path().join("v1")).unwrap();
    assert!(matches!(store.actions().lookup(after.key()).unwrap(), Lookup::Lost(_)));
    assert_eq!(marks(&store), 0);
    // What was on disk before is not read again.
    assert!(matches!(store.actions().lookup(before.key()).unwrap(), Lookup::Found(_)));
}

/// A process that is killed while it writes leaves whole blobs or none.
#[test]
fn a_kill_leaves_no_half_blob() {
    const CHILD: &str = "ANNEAL_TEST_WRITER";
    if let Some(root) = std::env::var_os(CHILD) {
        let store = Store::open(Path::new(&root)).unwrap();
        for round in 0u64.. {
            let attempt = store.attempt("writer").unwrap();
            for name in ["a", "b"] {
                let bytes = format!("{round}{name}").repeat(200_000);
                fs::write(attempt.path().join(name), bytes).unwrap();
            }
            store.ingest(attempt.path()).unwrap();
            store.put_bytes(format!("{round}c").repeat(200_000).as_bytes()).unwrap();
        }
    }
    let sandbox = Sandbox::new();
    let root = sandbox.store.root().to_path_buf();
    let mut blobs = 0;
    for wait in [40, 90, 150] {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "tests::a_kill_leaves_no_half_blob"])
            .env(CHILD, &root)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        // The clock starts with the first attempt, not with the process.
        while fs::read_dir(root.join("attempts")).unwrap().count() == 0 {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        let report = sandbox.store.scrub(&mut |_| {}).unwrap();
        assert_eq!((report.corrupt.len(), report.strangers.len()), (0, 0));
        blobs = report.blobs;
        let options = GcOptions::default();
        let swept = sandbox.store.gc(options).unwrap();
        assert!(swept.attempts_removed <= 1);
        assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
    }
    assert!(blobs > 0, "the writer got to write");
}

#[test]
fn what_comes_in_from_elsewhere_is_kept_only_under_its_own_digest() {
    let Sandbox { dir: _dir, store } = Sandbox::new();
    let digest = BlobDigest::of(b"one two");
    let receive = |parts: [&[u8]; 2]| {
        let mut incoming = store.receive().unwrap();
        parts.iter().for_each(|part| incoming.write(part).unwrap());
        incoming.finish(digest).unwrap()
    };
    let came = receive([b"one", b" too"]).unwrap_err();
    let mut bytes = [0; 7];
    came.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"one too");
    assert!(!store.has(digest));
    drop(store.receive().unwrap());
    receive([b"one", b" two"]).unwrap();
    receive([b"one ", b"two"]).unwrap();
    assert_eq!(store.blob(digest).unwrap(), b"one two");
    assert_eq!(fs::read_dir(store.root().join("tmp")).unwrap().count(), 0);
}
