//! What a build must survive and must not miss. The same probes, for other tools too, are in
//! tests/probes.

mod workspace;

use std::collections::BTreeSet;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use engine::gc::Keep;
use engine::{Event, Options};
use rustix::process::{Pid, Signal, kill_process};
use workspace::{RECIPE, Workspace};

const ONE_SLOW: &str = "[s]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n";

fn set_modified(path: &Path, at: SystemTime) {
    std::fs::File::options().write(true).open(path).unwrap().set_modified(at).unwrap();
}

#[test]
fn an_edit_of_the_same_size_with_its_time_restored_is_seen() {
    let w = Workspace::new(ONE_SLOW);
    let rows = w.path("recipes/rows.txt");
    let time = rows.metadata().unwrap().modified().unwrap();
    w.build("r").unwrap();
    w.write("recipes/rows.txt", "two\none\n");
    set_modified(&rows, time);
    assert_eq!(w.build("r").unwrap(), ["s"]);
    assert_eq!(w.output("s"), "two\none\n");
}

#[test]
fn a_clock_that_jumps_changes_nothing_and_hides_nothing() {
    let w = Workspace::new(ONE_SLOW);
    let rows = w.path("recipes/rows.txt");
    w.build("r").unwrap();
    let year = Duration::from_secs(365 * 24 * 3600);
    for time in [SystemTime::now() - 40 * year, SystemTime::now() + year] {
        set_modified(&rows, time);
        assert_eq!(w.build("r").unwrap(), [""; 0], "touched");
        w.write("recipes/rows.txt", &format!("{time:?}\n"));
        set_modified(&rows, time);
        assert_eq!(w.build("r").unwrap(), ["s"], "changed");
    }
}

#[test]
fn names_may_be_long_and_strange() {
    let w = Workspace::new("[a]\nstep = \"demo/upper\"\ntext = \"./in\"\n");
    let long = format!("{}/{}", "folder ".repeat(24).trim(), "ü日本".repeat(20));
    for name in [" a b ", "naïve – 数.txt", "-rf", "new\nline", "quote\"'", &long] {
        w.write(&format!("recipes/in/{name}"), "x");
    }
    assert!(long.len() > 300);
    assert_eq!(w.build("r").unwrap(), ["a"]);
    assert_eq!(w.output("a"), "XXXXXX");
}

#[test]
fn a_link_counts_as_what_it_leads_to() {
    let w = Workspace::new("[a]\nstep = \"demo/upper\"\ntext = \"./in\"\n");
    w.write("recipes/in/one", "1");
    w.write("recipes/in/two", "2");
    symlink("one", w.path("recipes/in/link")).unwrap();
    w.build("r").unwrap();
    assert_eq!(w.output("a"), "112");
    std::fs::remove_file(w.path("recipes/in/link")).unwrap();
    symlink("two", w.path("recipes/in/link")).unwrap();
    assert_eq!(w.build("r").unwrap(), ["a"]);
    assert_eq!(w.output("a"), "212");
    std::fs::remove_file(w.path("recipes/in/link")).unwrap();
    symlink("../rows.txt", w.path("recipes/in/link")).unwrap();
    let error = w.build("r").unwrap_err();
    assert!(error.contains("a symbolic link that leads out of its folder"), "{error}");
}

#[test]
fn an_altered_blob_is_never_laid_out() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    let (_, path) = w.blob_of("count");
    // Another inode, as a disk's damage has no writer; the same size and times.
    let time = path.metadata().unwrap().modified().unwrap();
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "7").unwrap();
    set_modified(&path, time);
    let trees = w.path("artifacts/v1/trees");
    let _ = Command::new("chmod").args(["-R", "u+w"]).arg(&trees).status();
    std::fs::remove_dir_all(&trees).unwrap();
    assert_eq!(w.build("r").unwrap(), ["count"]);
    assert_eq!(w.output("count"), "2");
}

#[test]
fn an_altered_artifact_is_laid_out_again() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    let file = w.path("artifacts/r/count/text.txt").canonicalize().unwrap();
    let time = file.metadata().unwrap().modified().unwrap();
    let _ = Command::new("chmod").arg("u+w").arg(file.parent().unwrap()).status();
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, "7").unwrap();
    set_modified(&file, time);
    assert_eq!(w.build("r").unwrap(), [""; 0]);
    assert_eq!(w.output("count"), "2");
}

#[test]
fn a_worker_that_babbles_harms_nothing() {
    let w = Workspace::new("[a]\nstep = \"demo/babble\"\ntext = \"./rows.txt\"\n");
    assert_eq!(w.build("r").unwrap(), ["a"]);
    let engine = w.engine();
    let result = engine.last(&engine::TargetId::new("r", "a")).unwrap();
    assert_eq!(result.metrics, [("words".to_string(), 1.0)].into());
    let log = engine.store().blob(result.log).unwrap();
    let log = String::from_utf8_lossy(&log);
    assert!(log.contains(r#""name": "half"#), "{log}");
}

#[test]
fn a_step_touches_what_is_its_own_and_nothing_else() {
    if !engine::sandbox::available() {
        assert!(std::env::var_os("CI").is_none(), "this kernel has no Landlock");
        return;
    }
    let w = Workspace::new("[a]\nstep = \"demo/nosy\"\ntext = \"./rows.txt\"\n");
    w.build("r").unwrap();
    let denied = "PermissionDenied";
    let expected = [
        ("read its input", "done"),
        ("read a recipe", denied),
        ("list the store", denied),
        ("write beside", denied),
        ("write its input", denied),
        ("write its scratch", "done"),
        ("write /dev/null", "done"),
        ("make a device", denied),
        ("connect", denied),
    ];
    let expected: String = expected.iter().map(|(what, how)| format!("{what}: {how}\n")).collect();
    assert_eq!(w.output("a"), expected);
}

#[test]
fn gc_does_not_disturb_a_build() {
    let w = Workspace::new(ONE_SLOW);
    let mut refused = None;
    w.build_with("r", &mut |event| {
        if matches!(event, Event::Note { text: "begins", .. }) {
            refused = w.engine().gc(Keep::default(), false).err().map(|e| e.to_string());
        }
    })
    .unwrap();
    assert!(refused.is_some_and(|e| e.contains("in use by another process")));
    assert_eq!(w.output("s"), "one\ntwo\n");
    assert_eq!(w.build("r").unwrap(), [""; 0]);
}

/// Two steps of one thread each, of which each takes 400 ms.
const TWO_SLOW: &str = "\
[a]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n\
[b]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\nlevel = 1\n";

#[test]
fn steps_run_side_by_side_as_far_as_there_are_threads() {
    for (threads, most) in [(1, 1), (2, 2)] {
        let w = Workspace::new(TWO_SLOW);
        let engine = w.engine();
        let (mut running, mut peak) = (0, 0);
        let options = Options { threads: Some(threads), ..Options::default() };
        let outcome = engine.build(&w.graph(&engine, "r"), options, &mut |event| {
            match event {
                Event::Note { text: "begins", .. } => running += 1,
                Event::Note { text: "ends", .. } => running -= 1,
                _ => {}
            }
            peak = peak.max(running);
        });
        assert_eq!(outcome.unwrap().built.len(), 2);
        assert_eq!(peak, most, "{threads} threads");
    }
}

#[test]
fn a_failure_stops_what_hangs_on_it_and_nothing_else_if_one_goes_on() {
    let recipe = "\
[a]\nstep = \"demo/fail\"\ntext = \"./rows.txt\"\n\
[b]\nstep = \"demo/upper\"\ntext = \"a\"\n\
[c]\nstep = \"demo/lines\"\ntext = \"./rows.txt\"\n\
[d]\nstep = \"demo/upper\"\ntext = \"c\"\n";
    let cases = [(false, vec![], vec!["b", "c", "d"]), (true, vec!["c", "d"], vec!["b"])];
    for (keep_going, built, lost) in cases {
        let w = Workspace::new(recipe);
        let engine = w.engine();
        let options = Options { keep_going, threads: Some(1), ..Options::default() };
        let outcome = engine.build(&w.graph(&engine, "r"), options, &mut |_| {}).unwrap();
        let names = |ids: Vec<&engine::TargetId>| {
            ids.into_iter().map(|id| id.target.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names(outcome.built.iter().map(|b| &b.id).collect()), built);
        assert_eq!(names(outcome.failed.iter().map(|(id, _)| id).collect()), ["a"]);
        assert_eq!(names(outcome.lost.iter().collect()), lost);
    }
}

#[test]
fn a_stopped_build_keeps_what_is_made_and_leaves_nothing_running() {
    let w = Workspace::new(&format!(
        "[first]\nstep = \"demo/lines\"\ntext = \"./rows.txt\"\n{ONE_SLOW}more = [\"first\"]\n"
    ));
    let engine = w.engine();
    let running = engine.running();
    let outcome = engine.build(&w.graph(&engine, "r"), Options::default(), &mut |event| {
        if let Event::Started { target, .. } = event
            && target.target == "s"
        {
            let running = running.clone();
            std::thread::spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                running.stop();
            });
        }
    });
    let outcome = outcome.unwrap();
    assert_eq!(outcome.built.len(), 1);
    assert_eq!(outcome.failed[0].1.to_string(), "r/s: stopped");
    assert_eq!(processes_of(w.dir.path()), [0_i32; 0]);
    assert_eq!(w.build("r").unwrap(), ["s"]);
}

#[test]
fn a_step_that_is_stopped_may_keep_what_it_has_and_says_so() {
    // The second one does not end by itself.
    for (level, said) in [(0, vec!["begins", "stopped at row 3"]), (1, vec!["begins"])] {
        let recipe =
            format!("[c]\nstep = \"demo/careful\"\ntext = \"./rows.txt\"\nlevel = {level}\n");
        let w = Workspace::new(&recipe);
        let engine = w.engine();
        let mut notes = Vec::new();
        let outcome = engine.build(&w.graph(&engine, "r"), Options::default(), &mut |event| {
            if let Event::Note { text, .. } = event {
                if text == "begins" {
                    engine.running().stop();
                }
                notes.push(text.to_string());
            }
        });
        assert_eq!(outcome.unwrap().failed[0].1.to_string(), "r/c: stopped");
        assert_eq!(notes, said);
        assert_eq!(processes_of(w.dir.path()), [0_i32; 0]);
    }
}

#[test]
fn what_is_remembered_as_made_is_forgotten_with_any_change() {
    let w = Workspace::new("[a]\nstep = \"demo/upper\"\ntext = \"./in\"\n");
    w.write("recipes/in/rows.txt", "x");
    let words = vec!["r".to_string()];
    let build = || {
        let engine = w.engine();
        let options = Options { words: words.clone(), ..Options::default() };
        let outcome = engine.build(&w.graph(&engine, "r"), options, &mut |_| {}).unwrap();
        assert!(outcome.failed.is_empty());
    };
    let remembered = || {
        let known = w.engine().remembered(&words)?;
        known.moved.is_empty().then_some(known.all)
    };
    // Only what has been at rest for longer than clocks are coarse can be remembered.
    let settle = || {
        build();
        assert_eq!(remembered(), None);
        std::thread::sleep(Duration::from_millis(2100));
        build();
        assert_eq!(remembered(), Some(1));
    };
    settle();
    let changes: [(&str, &dyn Fn()); 6] = [
        ("an input", &|| w.write("recipes/in/rows.txt", "y")),
        ("a new input", &|| w.write("recipes/in/more.txt", "z")),
        ("the recipe", &|| {
            w.write("recipes/r.toml", "[a]\nstep = \"demo/lines\"\ntext = \"./in\"\n")
        }),
        ("the code", &|| w.write("crates/demo/src/lib.rs", "fn f() -> u8 { 3 }\n")),
        ("a blob", &|| std::fs::remove_file(w.blob_of("a").1).unwrap()),
        ("the link", &|| std::fs::remove_file(w.path("artifacts/r/a")).unwrap()),
    ];
    for (what, change) in changes {
        change();
        assert_eq!(remembered(), None, "{what}");
        settle();
    }
}

#[test]
fn only_what_has_moved_is_asked_for_again() {
    let w = Workspace::new(
        "[a]\nstep = \"demo/upper\"\ntext = \"./x\"\n\
         [b]\nstep = \"demo/lines\"\ntext = \"a\"\n\
         [c]\nstep = \"demo/upper\"\ntext = \"./y\"\n",
    );
    let write = |name: &str, text: &str| w.write(&format!("recipes/{name}"), text);
    write("x", "one");
    write("y", "one");
    let words = vec!["r".to_string()];
    let build = |graph: &dyn Fn(&engine::Engine) -> engine::Graph| {
        let engine = w.engine();
        let graph = graph(&engine);
        let options = Options { words: words.clone(), ..Options::default() };
        let outcome = engine.build(&graph, options, &mut |_| {}).unwrap();
        outcome.built.iter().filter(|b| b.ran).count()
    };
    let all = |engine: &engine::Engine| w.graph(engine, "r");
    let moved = |engine: &engine::Engine| {
        let known = engine.remembered(&words).unwrap();
        assert_eq!(known.all, 3);
        engine.resolver().graph(&known.moved).unwrap()
    };
    let rest = || std::thread::sleep(Duration::from_millis(2100));
    assert_eq!(build(&all), 3);
    rest();
    assert_eq!(build(&all), 0);
    write("x", "two");
    assert_eq!(w.engine().remembered(&words).unwrap().moved.len(), 2);
    assert_eq!(build(&moved), 2);
    assert_eq!(w.output("a"), "TWO");
    rest();
    assert_eq!(build(&moved), 0);
    let nothing = engine::Remembered { all: 3, moved: vec![] };
    assert_eq!(w.engine().remembered(&words), Some(nothing));
}

/// Not a test: the process that other tests start, and kill. Builds the workspace it is told of.
#[test]
fn builder() {
    let Some(root) = std::env::var_os("PROBE_WORKSPACE") else { return };
    let worker = env!("CARGO_BIN_EXE_engine-test-worker").into();
    let engine = engine::Engine::open(Path::new(&root), workspace::REGISTRY).unwrap();
    let engine = engine.with_workers(engine::Workers::Fixed(worker));
    let mut resolver = engine.resolver();
    let wanted = resolver.expand(&["r".to_string()]).unwrap();
    let graph = resolver.graph(&wanted).unwrap();
    let built = engine.build(&graph, Options::default(), &mut |_| {}).unwrap();
    for made in built.into_result().unwrap().iter().filter(|b| b.ran) {
        println!("made {}", made.id);
    }
}

/// Starts a builder of this workspace in a process of its own.
fn start_builder(w: &Workspace) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["builder", "--exact", "--nocapture", "--test-threads", "1"])
        .env("PROBE_WORKSPACE", w.path(""))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

/// Workers and builders that work in this folder.
fn processes_of(dir: &Path) -> Vec<i32> {
    let name = dir.file_name().unwrap().to_str().unwrap();
    let all = std::fs::read_dir("/proc").unwrap().flatten();
    let ids = all.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let ours = |id: &i32| {
        let read = |file: &str| std::fs::read(format!("/proc/{id}/{file}")).unwrap_or_default();
        // A zombie has no command line any more.
        [read("cmdline"), read("environ")]
            .iter()
            .any(|text| text.windows(name.len()).any(|w| w == name.as_bytes()))
    };
    ids.filter(|id| *id != std::process::id() as i32).filter(ours).collect()
}

#[test]
fn eight_builders_make_each_target_once() {
    let recipe: String = (0..6)
        .map(|i| format!("[t{i}]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\nlevel = {i}\n"))
        .collect();
    for builders in [2, 8] {
        let w = Workspace::new(&recipe);
        let started: Vec<Child> = (0..builders).map(|_| start_builder(&w)).collect();
        let mut made = Vec::new();
        for builder in started {
            let output = builder.wait_with_output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).unwrap();
            made.extend(text.lines().filter_map(|l| Some(l.split_once("made ")?.1.to_string())));
        }
        assert_eq!(made.len(), 6, "{made:?}");
        assert_eq!(made.into_iter().collect::<BTreeSet<_>>().len(), 6);
    }
}

/// Kills the builder, a worker, or both, at random moments; then a build gives the right bytes, and
/// nothing goes on running. `PROBE_KILLS` says how often.
#[test]
fn kills_cost_time_only() {
    let times = std::env::var("PROBE_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let w = Workspace::new(
        "[s]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n[u]\nstep = \"demo/upper\"\ntext = \"s\"\n",
    );
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    for round in 0..times {
        let text = format!("round {round}\n").repeat(1 + next(2000) as usize);
        w.write("recipes/rows.txt", &text);
        let mut builder = start_builder(&w);
        // Starting takes some 20 ms, the slow step 400.
        std::thread::sleep(Duration::from_millis(next(520)));
        let target = next(3);
        let id = builder.id() as i32;
        for process in processes_of(w.dir.path()) {
            let is_builder = process == id;
            if target == 2 || is_builder == (target == 0) {
                let _ = kill_process(Pid::from_raw(process).unwrap(), Signal::KILL);
            }
        }
        let _ = builder.wait();
        if target != 1 {
            // A worker is ended by the kernel, which may take a moment; alone it would go on for
            // 400 ms.
            let end = Instant::now() + Duration::from_millis(150);
            while !processes_of(w.dir.path()).is_empty() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(5));
            }
            assert_eq!(processes_of(w.dir.path()), [0_i32; 0], "round {round}");
        }
        w.build("r").unwrap_or_else(|e| panic!("round {round}: {e}"));
        // The texts are long, so they are not shown.
        assert!(w.output("s") == text, "round {round}");
        assert!(w.output("u") == text.to_uppercase(), "round {round}");
    }
    let report = w.engine().store().scrub(&mut |_| {}).unwrap();
    assert_eq!((report.corrupt, report.lost, report.strangers), (vec![], vec![], vec![]));
    println!("{times} kills");
}
