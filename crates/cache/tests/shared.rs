//! Builds that share a cache: the engine, the cache's worker and quick steps, each a process of its
//! own, on stores of their own, with a real S3 server and a faulty network between them.

#[path = "../../engine/tests/workspace/mod.rs"]
mod workspace;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use engine::{Event, Options, Outcome, Remote};
use s3::testing::{Fault, KEY_ID, Proxy, SECRET, Server};
use workspace::{RECIPE, Workspace};

/// A cache for some builds, and a key that they believe.
struct Shared {
    settings: s3::Settings,
    dir: tempfile::TempDir,
    public: String,
}

impl Shared {
    fn on(settings: s3::Settings) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let public = keygen(&dir.path().join("ci.key"), "ci");
        Self { settings, dir, public }
    }

    fn remote(&self, write: bool) -> Remote {
        let key = self.dir.path().join("ci.key").to_string_lossy().into_owned();
        let env = [
            ("AWS_ACCESS_KEY_ID", KEY_ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            (cache::SIGNING_KEY_FILE, &key),
        ];
        Remote {
            settings: self.settings.clone(),
            write,
            trusted: vec![self.public.clone()],
            worker: Some(worker()),
            env: env.map(|(name, value)| (name.to_string(), value.to_string())).into(),
            lease: Duration::from_secs(2),
            ..Remote::at("s3://bucket/team".parse().unwrap())
        }
    }
}

fn worker() -> PathBuf {
    PathBuf::from(env!("CARGO_BIN_EXE_cache-worker"))
}

fn keygen(file: &std::path::Path, name: &str) -> String {
    let output = std::process::Command::new(worker()).arg("keygen").arg(file).arg(name).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// What a build came to: what ran, what came from the cache, what was said.
#[derive(Debug)]
struct Told {
    ran: Vec<String>,
    fetched: Vec<String>,
    said: String,
    result: Result<(), String>,
}

fn build(w: &Workspace, remote: Remote, target: &str) -> Told {
    build_with(w, remote, target, Options::default())
}

fn build_with(w: &Workspace, remote: Remote, target: &str, options: Options) -> Told {
    let engine = w.engine().with_remote(remote);
    let graph = w.graph(&engine, target);
    let said = Mutex::new(String::new());
    let built = engine.build(&graph, options, &mut |event| {
        let mut said = said.lock().unwrap();
        match event {
            Event::Note { text, .. } => *said += &format!("{text}\n"),
            Event::Warning { failure } => *said += &format!("warning: {}\n", failure.message),
            Event::Held { holder, .. } => *said += &format!("held by {holder}\n"),
            _ => {}
        }
    });
    let said = said.into_inner().unwrap();
    let mut told = Told { ran: Vec::new(), fetched: Vec::new(), said, result: Ok(()) };
    match built.and_then(Outcome::into_result) {
        Ok(built) => {
            for one in built {
                let name = one.id.target.clone();
                match (one.ran, one.fetched) {
                    (true, _) => told.ran.push(name),
                    (_, Some(_)) => told.fetched.push(name),
                    _ => {}
                }
            }
        }
        Err(error) => told.result = Err(error.to_string()),
    }
    told
}

/// The one object whose name begins so.
fn object(server: &Server, start: &str) -> PathBuf {
    let start = format!("team/v1/{start}");
    let names: Vec<String> =
        server.names().into_iter().filter(|name| name.starts_with(&start)).collect();
    assert!(!names.is_empty(), "no {start}");
    server.files().join(&names[0])
}

fn everything(server: &Server, start: &str) -> BTreeMap<String, Vec<u8>> {
    let start = format!("team/v1/{start}");
    let names = server.names().into_iter().filter(|name| name.starts_with(&start));
    names.map(|name| (name.clone(), fs::read(server.files().join(name)).unwrap())).collect()
}

#[test]
fn a_second_checkout_runs_nothing() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let (first, second) = (Workspace::new(RECIPE), Workspace::new(RECIPE));
    let told = build(&first, shared.remote(true), "r");
    assert_eq!((told.ran.len(), told.fetched.len()), (2, 0), "{told:?}");
    assert_eq!(everything(&server, "leases"), BTreeMap::new());
    let told = build(&second, shared.remote(false), "r");
    assert_eq!(
        (&told.ran[..], &told.fetched[..]),
        (&[][..], &["count", "shout"].map(String::from)[..]),
        "{told:?}"
    );
    assert_eq!(second.output("shout"), "2");
    // With all that explains it: the action, the parts of its code, the files it was made from.
    second.write("recipes/rows.txt", "x\n");
    let engine::Status::Stale(why) = second.status("r").remove("count").unwrap() else { panic!() };
    assert_eq!(why.to_string().split(':').next(), Some("inputs.text"));
    let (a, b) = (first.engine(), second.engine());
    let of = |engine: &engine::Engine| engine.last(&engine::TargetId::new("r", "shout")).unwrap();
    assert_eq!(of(&a), of(&b));
    let report = |engine: &engine::Engine| engine.store().tree(of(engine).report).unwrap();
    assert_eq!(report(&a), report(&b));
    assert!(!b.store().blob(of(&b).log).unwrap().is_empty());
    // A reader gives nothing.
    let before = server.names();
    second.write("recipes/rows.txt", "a\nb\nc\n");
    assert_eq!(build(&second, shared.remote(false), "r").ran, ["count", "shout"]);
    assert_eq!(server.names(), before);
}

#[test]
fn a_pinned_result_goes_as_nix_reads_it() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let w = Workspace::new("[rough]\nstep = \"demo/rough\"\ntext = \"./rows.txt\"\n");
    build(&w, shared.remote(true), "r");
    let engine = w.engine().with_remote(shared.remote(true));
    let graph = w.graph(&engine, "r");
    let pinned = engine.lock_results(&graph).unwrap()[0].after.clone().unwrap();
    for _ in 0..2 {
        assert_eq!(engine.push(&graph, &mut |_| {}).unwrap(), 1);
        let name = format!("team/nar/{}.nar", pinned.sha256);
        let mut archive = Vec::new();
        let artifact = w.path("artifacts/r/rough").canonicalize().unwrap();
        engine::nar::write(&artifact, &mut archive).unwrap();
        assert_eq!(fs::read(server.files().join(name)).unwrap(), archive);
    }
}

#[test]
fn eight_builders_make_each_action_once() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let recipe = "[a]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n\
                  [b]\nstep = \"demo/upper\"\ntext = \"a\"\n\
                  [c]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\nlevel = 3\n";
    let ran = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                let w = Workspace::new(recipe);
                let told = build(&w, shared.remote(true), "r");
                assert_eq!(told.result, Ok(()), "{told:?}");
                assert_eq!(w.output("b"), "ONE\nTWO\n");
                ran.fetch_add(told.ran.len(), Ordering::SeqCst);
            });
        }
    });
    assert_eq!(ran.into_inner(), 3);
    assert_eq!(everything(&server, "leases"), BTreeMap::new());
}

#[test]
fn a_lease_that_nobody_renews_runs_out() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let recipe = "[s]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n";
    // A builder dies while it runs: its lease stays.
    let dead = Workspace::new(recipe);
    let engine = dead.engine();
    let ready = engine.plan(&dead.graph(&engine, "r/s")).unwrap();
    assert!(!ready.up_to_date());
    build(&dead, shared.remote(true), "r/s");
    let result = object(&server, "results");
    let key = result.file_stem().unwrap().to_string_lossy().into_owned();
    fs::remove_file(&result).unwrap();
    let lease = r#"{"format": 1, "holder": "process 7 on elsewhere", "token": 7, "renewed": 3}"#;
    let bucket = server.bucket("team");
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let put = s3::Put::default();
    runtime.block_on(bucket.put(&format!("v1/leases/{key}.json"), lease.into(), &put)).unwrap();
    for write in [true, false] {
        let next = Workspace::new(recipe);
        let clock = Instant::now();
        let told = build(&next, shared.remote(write), "r/s");
        if write {
            assert_eq!(told.ran, ["s"], "{told:?}");
            assert!(told.said.contains("held by process 7 on elsewhere"), "{told:?}");
            assert!(clock.elapsed() > Duration::from_secs(2));
            assert_eq!(everything(&server, "leases"), BTreeMap::new());
        } else {
            assert_eq!(told.fetched, ["s"], "{told:?}");
        }
    }
}

/// What is wrong in the bucket is a miss with its reason, the step runs, the store has right bytes,
/// and what was wrong is mended.
#[test]
fn a_wrong_byte_in_the_bucket_is_a_miss() {
    type Spoil = fn(&Server);
    let spoil: [(&str, Spoil, &str); 6] = [
        ("a flipped chunk", |s| flip(&object(s, "chunks")), "other bytes than its name says"),
        ("half a chunk", |s| truncate(&object(s, "chunks")), "other bytes than its name says"),
        (
            "a lost chunk",
            |s| fs::remove_file(object(s, "chunks")).unwrap(),
            "is lost, or has other bytes",
        ),
        ("a flipped result", |s| flip(&object(s, "results")), "result is not used"),
        ("half a result", |s| truncate(&object(s, "results")), "it cannot be read"),
        ("a result that says more", forge, "its signature is not that of `ci`"),
    ];
    for (what, spoil, why) in spoil {
        let server = Server::start();
        let shared = Shared::on(server.settings());
        let recipe = "[shout]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\n";
        build(&Workspace::new(recipe), shared.remote(true), "r");
        spoil(&server);
        let second = Workspace::new(recipe);
        let told = build(&second, shared.remote(true), "r");
        assert_eq!(told.ran, ["shout"], "{what}: {told:?}");
        assert!(told.said.contains(why), "{what}: {told:?}");
        assert_eq!(second.output("shout"), "ONE\nTWO\n");
        assert_eq!(second.engine().store().scrub(&mut |_| {}).unwrap().corrupt, []);
        let third = Workspace::new(recipe);
        let told = build(&third, shared.remote(false), "r");
        assert_eq!(told.fetched, ["shout"], "{what}: {told:?}");
    }
}

/// Of a file in several pieces, the one that is broken is found, and sent again.
#[test]
fn the_broken_piece_of_a_large_file_is_told() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let recipe = "[shout]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\n";
    let workspace = || {
        let workspace = Workspace::new(recipe);
        let rows: String = (0..400_000).map(|row: u64| format!("{:x}\n", row * row * 77)).collect();
        workspace.write("recipes/rows.txt", &rows);
        workspace
    };
    build(&workspace(), shared.remote(true), "r");
    // What is smaller lies with a log, which tells the time.
    let mut pieces = everything(&server, "chunks");
    pieces.retain(|_, bytes| bytes.len() > 256 << 10);
    assert!(pieces.len() > 1, "{:?}", pieces.keys());
    for (name, bytes) in &pieces {
        let path = server.files().join(name);
        flip(&path);
        let second = workspace();
        let told = build(&second, shared.remote(true), "r");
        assert_eq!(told.ran, ["shout"], "{told:?}");
        let short = name.rsplit('/').next().unwrap();
        assert!(told.said.contains(short), "{short}: {told:?}");
        assert!(fs::read(path).unwrap() == *bytes);
        assert_eq!(build(&workspace(), shared.remote(false), "r").fetched, ["shout"]);
    }
}

fn flip(path: &std::path::Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &std::path::Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() / 2]).unwrap();
}

fn forge(server: &Server) {
    let path = object(server, "results");
    let text = fs::read_to_string(&path).unwrap();
    let forged = text.replace("demo/upper", "demo/uqper");
    assert_ne!(text, forged);
    fs::write(path, forged).unwrap();
}

#[test]
fn a_result_is_believed_by_its_signature_alone() {
    let server = Server::start();
    let (ours, theirs) = (Shared::on(server.settings()), Shared::on(server.settings()));
    build(&Workspace::new(RECIPE), theirs.remote(true), "r");
    let told = build(&Workspace::new(RECIPE), ours.remote(false), "r");
    assert_eq!(told.ran.len(), 2);
    assert!(told.said.contains("its signature is not that of `ci`"), "{told:?}");
    let nobody = Remote { trusted: Vec::new(), ..theirs.remote(false) };
    let told = build(&Workspace::new(RECIPE), nobody, "r");
    assert!(told.said.contains("lists no `trusted` keys"), "{told:?}");
    let mut mute = ours.remote(true);
    mute.env.remove(cache::SIGNING_KEY_FILE);
    let told = build(&Workspace::new(RECIPE), mute, "r");
    assert!(told.said.contains("nothing to sign with"), "{told:?}");
    assert_eq!(told.result, Ok(()));
}

#[test]
fn a_cache_that_cannot_be_reached_costs_a_warning() {
    let down = s3::Settings {
        endpoint: Some("http://127.0.0.1:9".into()),
        path_style: true,
        ..Default::default()
    };
    let told = build(&Workspace::new(RECIPE), Shared::on(down).remote(true), "r");
    assert_eq!((told.ran.len(), told.result), (2, Ok(())));
    assert_eq!(told.said.matches("warning").count(), 1, "{}", told.said);
    assert!(told.said.contains("127.0.0.1:9"), "{}", told.said);
    let server = Server::start();
    let mut wrong = Shared::on(server.settings()).remote(false);
    wrong.env.insert("AWS_SECRET_ACCESS_KEY".into(), "guess".into());
    let told = build(&Workspace::new(RECIPE), wrong, "r");
    assert_eq!((told.ran.len(), told.result), (2, Ok(())));
    assert!(told.said.contains("403"), "{}", told.said);
}

#[test]
fn a_store_without_conditional_writes_is_shared_without_leases() {
    let server = Server::unconditional();
    let shared = Shared::on(server.settings());
    let told = build(&Workspace::new(RECIPE), shared.remote(true), "r");
    assert!(told.said.contains("ignores conditional writes"), "{told:?}");
    let told = build(&Workspace::new(RECIPE), shared.remote(false), "r");
    assert_eq!(told.fetched.len(), 2, "{told:?}");
}

#[test]
fn what_is_only_fetched_is_never_made() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    build(&Workspace::new(RECIPE), shared.remote(true), "r/count");
    let w = Workspace::new(RECIPE);
    let only_fetch = Options { only_fetch: true, keep_going: true, ..Options::default() };
    let told = build_with(&w, shared.remote(false), "r", only_fetch);
    assert_eq!(told.result, Err("r/shout: the shared cache has no result for it".into()));
    assert_eq!(w.output("count"), "2");
}

/// An artifact of 320 MB goes up and comes down through less memory than it has.
#[cfg(target_os = "linux")]
#[test]
fn a_large_artifact_takes_little_memory() {
    let server = Server::start();
    let shared = Shared::on(server.settings());
    let recipe = "[large]\nstep = \"demo/upper\"\ntext = \"./large.txt\"\n";
    let mut chance = 1_u32;
    let text: String = (0..320_000_000 / 8)
        .map(|_| {
            chance = chance.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            format!("{chance:08x}")
        })
        .collect();
    for write in [true, false] {
        let w = Workspace::new(recipe);
        w.write("recipes/large.txt", &text);
        let engine = w.engine().with_remote(shared.remote(write));
        let graph = w.graph(&engine, "r");
        let built = engine.build(&graph, Options::default(), &mut |_| {}).unwrap();
        assert_eq!(built.into_result().unwrap()[0].ran, write);
        // Its worker lives as long as the engine.
        let peak = peak_memory_of_workers();
        assert!((1..200_000_000).contains(&peak), "{peak} bytes");
    }
}

/// The most memory that a cache's worker of this process has had so far, of those that live.
fn peak_memory_of_workers() -> u64 {
    let us = format!("PPid:\t{}", std::process::id());
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let statuses = processes.filter_map(|p| fs::read_to_string(p.path().join("status")).ok());
    let ours = statuses.filter(|s| s.starts_with("Name:\tcache-worker") && s.contains(&us));
    let peak = |status: String| {
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?.to_string();
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    ours.filter_map(peak).max().unwrap_or(0) * 1024
}

/// Builders share a cache through two hundred faults of every kind, flipped bits among them.
#[test]
fn no_fault_of_the_network_makes_a_wrong_byte() {
    let server = Server::start();
    let proxy = Proxy::start(&server, 11, &Fault::ALL, 4, 200);
    let shared = Shared::on(proxy.settings());
    let recipe = "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\n\
                  [b]\nstep = \"demo/lines\"\ntext = \"a\"\n\
                  [c]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\nlevel = 3\n";
    let (mut made, mut fetched, mut round) = (0, 0, 0);
    while proxy.left() > 0 {
        let rows = format!("row {}\nof {round}\n", round / 3);
        let rows: String = (0..40_000).map(|_| rows.as_str()).collect();
        let w = Workspace::new(recipe);
        w.write("recipes/rows.txt", &rows);
        let told = build(&w, shared.remote(true), "r");
        assert_eq!(told.result, Ok(()), "{told:?}");
        assert!(w.output("a") == rows.to_uppercase() && w.output("c") == w.output("a"));
        assert_eq!(w.output("b"), "80000");
        assert_eq!(w.engine().store().scrub(&mut |_| {}).unwrap().corrupt, []);
        made += told.ran.len();
        fetched += told.fetched.len();
        round += 1;
        assert!(round < 100, "{} faults left", proxy.left());
    }
    assert!(made > 0 && fetched + made == 3 * round, "{made} {fetched} {round}");
    // Nothing is lost: what all of this left behind serves a builder on a good network.
    let w = Workspace::new(recipe);
    let direct = Shared { settings: server.settings(), ..shared };
    w.write("recipes/rows.txt", "the last\n");
    assert_eq!(build(&w, direct.remote(true), "r").ran.len(), 3);
    let told = build(&w_again(recipe), direct.remote(false), "r");
    assert_eq!(told.fetched.len(), 3, "{told:?}");
}

fn w_again(recipe: &str) -> Workspace {
    let w = Workspace::new(recipe);
    w.write("recipes/rows.txt", "the last\n");
    w
}
