//! What makes a target stale, what does not, and what survives a mishap: the engine on a small
//! workspace with quick steps and a real worker process.

mod workspace;

use std::time::Duration;

use engine::gc::Keep;
use engine::{Event, Options, Stale, Status, TargetId};
use workspace::{RECIPE, Workspace};

#[test]
fn a_second_build_runs_nothing() {
    let w = Workspace::new(RECIPE);
    assert_eq!(w.build("r").unwrap(), ["count", "shout"]);
    assert_eq!(w.output("shout"), "2");
    assert_eq!(w.build("r").unwrap(), [""; 0]);
}

#[test]
fn what_may_not_run_here_is_found_or_refused() {
    let w = Workspace::new(RECIPE);
    let refuse = |node: &engine::Node| {
        (node.def.name == "demo/lines").then(|| step::Failure::input(format!("not {}", node.id)))
    };
    let build = || {
        let engine = w.engine();
        let options = Options { refuse: Some(refuse), ..Options::default() };
        let outcome = engine.build(&w.graph(&engine, "r"), options, &mut |_| {}).unwrap();
        outcome.into_result().map(|built| built.len()).map_err(|error| error.to_string())
    };
    assert_eq!(build(), Err("not r/count".into()));
    w.build("r").unwrap();
    assert_eq!(build(), Ok(2));
}

#[test]
fn what_does_not_matter_makes_nothing_stale() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    w.write("recipes/rows.txt", "one\ntwo\n"); // touched
    w.write("crates/demo/src/lib.rs", "//! Docs.\nfn f() -> u8 {\n    1 // one\n}\n");
    w.write("recipes/r.toml", &format!("# A comment.\n{RECIPE}"));
    assert_eq!(w.build("r").unwrap(), [""; 0]);
}

#[test]
fn a_rerun_that_gives_the_same_bytes_stops_there() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    w.write("recipes/rows.txt", "other\nwords\n");
    assert_eq!(w.build("r").unwrap(), ["count"]);
    w.write("recipes/rows.txt", "three\nlines\nnow\n");
    assert_eq!(w.build("r").unwrap(), ["count", "shout"]);
}

#[test]
fn what_acts_outside_runs_only_when_it_is_told_to() {
    let send = "\n[send]\nstep = \"demo/send\"\ntext = \"shout\"\nto = \"them\"\n";
    let w = Workspace::new(&format!("{RECIPE}{send}"));
    assert_eq!(w.build("r").unwrap(), ["count", "shout"]);
    let refused = w.build("r/send").unwrap_err();
    assert!(refused.starts_with("r/send is no artifact: `demo/send` acts outside"), "{refused}");
    assert!(refused.ends_with("hint: say so: cargo xtask publish r/send"), "{refused}");

    let engine = w.engine();
    let graph = w.graph(&engine, "r/send");
    let node = graph.nodes.last().unwrap();
    for _ in 0..2 {
        let errand = engine::Errand {
            target: &node.id,
            step: node.def.name,
            act: step::worker::Act { target: node.params.clone(), task: "go".into() },
            inputs: engine.inputs_of(node).unwrap(),
        };
        let answer = engine.act(errand, &mut |_| {}).unwrap();
        assert_eq!((&answer["to"], &answer["task"]), (&"them".into(), &"go".into()));
        assert_eq!(answer["text"], "2");
    }
    assert!(engine.last(&node.id).is_none(), "it leaves nothing");

    let taken = format!("{RECIPE}{send}\n[more]\nstep = \"demo/upper\"\ntext = \"send\"\n");
    let refused = Workspace::new(&taken).build("r/more").unwrap_err();
    assert!(refused.contains("`send` acts outside, and leaves nothing to take"), "{refused}");
}

#[test]
fn why_names_the_field() {
    let reason = |w: &Workspace| match w.status("r").remove("count").unwrap() {
        Status::Stale(Stale::Changed(differences)) => {
            differences.iter().map(|d| d.field.clone()).collect::<Vec<_>>()
        }
        other => panic!("{other:?}"),
    };
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    w.write("recipes/rows.txt", "x\n");
    assert_eq!(reason(&w), ["inputs.text: rows.txt"]);
    w.write("recipes/rows.txt", "one\ntwo\n");
    w.write("crates/demo/src/lib.rs", "fn f() -> u8 { 2 }\n");
    assert_eq!(reason(&w), ["code: crates/demo/src/lib.rs"]);
    w.write("crates/demo/src/lib.rs", "fn f() -> u8 { 1 }\n");
    w.write("recipes/r.toml", &RECIPE.replace("\"./rows.txt\"", "\"./rows.txt\"\nlevel = 3"));
    assert_eq!(reason(&w), ["params.level"]);
}

#[test]
fn an_input_that_changes_while_the_step_runs_is_not_cached() {
    let w = Workspace::new("[s]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n");
    let error = w
        .build_with("r/s", &mut |event| {
            if matches!(event, Event::Started { .. }) {
                w.write("recipes/rows.txt", "changed\n");
            }
        })
        .unwrap_err();
    assert_eq!(
        error,
        "r/s: recipes/rows.txt changed while the step ran; its result is not kept\nhint: build again once the file is at rest"
    );
    assert_eq!(w.build("r/s").unwrap(), ["s"]);
    assert_eq!(w.output("s"), "changed\n");
}

#[test]
fn a_lost_or_corrupt_file_is_made_again() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    let (blob, path) = w.blob_of("count");

    std::fs::remove_file(&path).unwrap();
    assert!(matches!(w.status("r")["count"], Status::Stale(Stale::Lost(_))));
    assert_eq!(w.build("r").unwrap(), ["count"]);

    // The same size, other bytes: a scrub finds it, the next build makes it again.
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "9").unwrap();
    let report = w.engine().store().scrub(&mut |_| {}).unwrap();
    assert_eq!(report.corrupt, [blob]);
    assert_eq!(w.build("r").unwrap(), ["count"]);
    assert_eq!(w.output("count"), "2");
}

#[test]
fn a_failure_keeps_what_was_made_before_it() {
    let recipe = "[a]\nstep = \"demo/lines\"\ntext = \"./rows.txt\"\n[b]\nstep = \"demo/fail\"\ntext = \"a\"\n";
    let w = Workspace::new(recipe);
    assert_eq!(
        w.build("r/b").unwrap_err(),
        "r/b: rows.txt:3: no verb in this sentence\nhint: write one"
    );
    assert!(matches!(w.status("r/b")["a"], Status::Cached(_)));
}

#[test]
fn two_builders_run_an_action_once() {
    let w = Workspace::new("[s]\nstep = \"demo/slow\"\ntext = \"./rows.txt\"\n");
    let ran: usize = std::thread::scope(|scope| {
        let builders: Vec<_> =
            (0..4).map(|_| scope.spawn(|| w.build("r/s").unwrap().len())).collect();
        builders.into_iter().map(|b| b.join().unwrap()).sum()
    });
    assert_eq!(ran, 1);
}

#[test]
fn gc_keeps_what_targets_stand_for() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    w.write("recipes/rows.txt", "just one\n");
    w.build("r").unwrap();
    let swept = w.engine().gc(Keep::default(), false).unwrap();
    assert_eq!(swept.results_removed, 2);
    assert_eq!(w.build("r").unwrap(), [""; 0]);
    assert_eq!(w.output("shout"), "1");
}

#[test]
fn the_oldest_results_go_when_the_store_is_too_large() {
    let w = Workspace::new("[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\n");
    // Each 1,000 bytes and a small report; the last one stands for the target.
    for letter in ["a", "b", "c", "d"] {
        w.write("recipes/rows.txt", &letter.repeat(1000));
        w.build("r").unwrap();
    }
    let engine = w.engine();
    let results = || engine.store().actions().all().unwrap().len();
    let keep = |size| Keep { newer: Duration::MAX, max_size: Some(size) };
    for (size, dry_run, left) in
        [(1 << 20, false, 4), (3500, true, 4), (3500, false, 3), (3500, false, 3), (10, false, 1)]
    {
        engine.gc(keep(size), dry_run).unwrap();
        assert_eq!(results(), left, "{size} bytes");
    }
    assert_eq!(w.output("a"), "D".repeat(1000));

    w.write("Cargo.toml", "[workspace.metadata.anneal]\nmax-size = \"1 kB\"\n");
    w.write("recipes/rows.txt", "e");
    drop(engine);
    let engine = w.engine();
    let build = || engine.build(&w.graph(&engine, "r"), Options::default(), &mut |_| {}).unwrap();
    build();
    assert_eq!(engine.hold_size().unwrap().unwrap().results_removed, 1);
    assert_eq!(engine.hold_size().unwrap(), None, "nothing has come in since");
    w.write("Cargo.toml", "[workspace.metadata.anneal]\nmax-size = \"much\"\n");
    w.write("recipes/rows.txt", "f");
    build();
    let error = engine.hold_size().unwrap_err().to_string();
    assert!(error.contains("Cargo.toml: max-size = \"much\" is no size"), "{error}");
}

#[test]
fn a_rebuild_is_held_to_its_bytes() {
    let w = Workspace::new(RECIPE);
    w.build("r").unwrap();
    let engine = w.engine();
    let mut resolver = engine.resolver();
    let wanted = resolver.expand(&["r".to_string()]).unwrap();
    let graph = resolver.graph(&wanted).unwrap();
    let rebuilt = engine.rebuild(&graph, &mut |_| {}).unwrap();
    let identical = |r: &engine::verify::Rebuilt| r.verdict == engine::verify::Verdict::Identical;
    assert!(rebuilt.iter().all(identical), "{rebuilt:?}");
    assert_eq!(rebuilt.len(), graph.nodes.len());

    // A target by its name: that one, from what its inputs are.
    let graph = resolver.graph(&wanted[1..2]).unwrap();
    let rebuilt = engine.rebuild(&graph, &mut |_| {}).unwrap();
    assert_eq!(rebuilt.len(), 1);
    assert_eq!(rebuilt[0].id, wanted[1]);
}

/// Recipes with one mistake each, and what a person sees.
#[test]
fn what_it_would_take_follows_from_an_earlier_run() {
    let recipe = |level: u32| {
        format!(
            r#"
[first]
step = "demo/lines"
text = "./rows.txt"
level = {level}

[next]
step = "demo/upper"
text = "./rows.txt"
level = 3

[other]
step = "demo/upper"
text = "./rows.txt"
"#
        )
    };
    let w = Workspace::new(&recipe(2));
    let seconds = |target: &str| {
        let engine = w.engine();
        let plan = engine.plan(&w.graph(&engine, "r")).unwrap();
        plan.get(&TargetId::new("r", target)).unwrap().seconds
    };
    assert_eq!((seconds("first"), seconds("next")), (None, None));
    w.build("r/first").unwrap();
    let took = w.engine().last(&TargetId::new("r", "first")).unwrap().provenance.wall_seconds;
    assert!(took > 0.0);
    // It is made; three take half as long again as two; nobody counts what it computes.
    assert_eq!(seconds("first"), None);
    assert!((seconds("next").unwrap() / took - 1.5).abs() < 1e-9);
    assert_eq!(seconds("other"), None);
    // The target itself with twice the work.
    w.write("recipes/r.toml", &recipe(4));
    assert!((seconds("first").unwrap() / took - 2.0).abs() < 1e-9);
}

#[test]
fn mistakes_are_shown_at_their_place() {
    let cases = [
        ("unknown_step", "[a]\nstep = \"demo/uper\"\ntext = \"./rows.txt\"\n"),
        ("unknown_key", "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\nlevle = 2\n"),
        ("wrong_type", "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\nlevel = \"high\"\n"),
        ("missing_input", "[a]\nstep = \"demo/upper\"\n"),
        ("missing_file", "[a]\nstep = \"demo/upper\"\ntext = \"./row.txt\"\n"),
        ("missing_target", "[a]\nstep = \"demo/upper\"\ntext = \"aa\"\n"),
        ("missing_recipe", "[a]\nstep = \"demo/upper\"\ntext = \"q/a\"\n"),
        ("not_a_list", "[a]\nstep = \"demo/upper\"\ntext = [\"./rows.txt\"]\n"),
        (
            "cycle",
            "[a]\nstep = \"demo/upper\"\ntext = \"b\"\n[b]\nstep = \"demo/upper\"\ntext = \"a\"\n",
        ),
        ("no_disk_space", "[a]\nstep = \"demo/full\"\ntext = \"./rows.txt\"\n"),
    ];
    let mut all = String::new();
    for (name, recipe) in cases {
        let w = Workspace::new(recipe);
        let error = w.build("r/a").expect_err(name);
        all.push_str(&format!("── {name} ──\n{error}\n\n"));
    }
    insta::assert_snapshot!(all);
}

#[test]
fn a_matrix_is_built_as_the_targets_that_it_stands_for() {
    let w = Workspace::new(
        "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\nmatrix = { level = [1, 2] }\n\
         [all]\nstep = \"demo/lines\"\ntext = \"./rows.txt\"\nmore = [\"a\"]\n",
    );
    assert_eq!(w.build("r/a").unwrap(), ["a-level-1", "a-level-2"]);
    assert_eq!(w.build("r/all").unwrap(), ["all"]);
    w.write(
        "recipes/r.toml",
        "[a]\nstep = \"demo/upper\"\ntext = \"./rows.txt\"\nmatrix = { level = [1, 2] }\n\
         [b]\nstep = \"demo/upper\"\ntext = \"a\"\n",
    );
    let error = w.build("r/b").unwrap_err();
    assert!(error.contains("`a` is 2 targets, and `text` takes one"), "{error}");
}
