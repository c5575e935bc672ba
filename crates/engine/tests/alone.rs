//! What a build that keeps its own results (Nix) asks of the engine: one step by itself, and the pins of
//! results that it fetches.

use std::collections::BTreeMap;

use engine::{Given, TargetId, nar};

mod workspace;
use workspace::{RECIPE, Workspace};

const ROUGH: &str = r#"
[count]
step = "demo/lines"
text = "./rows.txt"

[rough]
step = "demo/rough"
text = "count"
"#;

#[test]
fn a_step_by_itself_gives_what_a_build_gives() {
    let built = Workspace::new(RECIPE);
    built.build("r").unwrap();
    let id = TargetId::new("r", "shout");
    let theirs = built.engine().last(&id).unwrap().output;

    // Neither the code nor the files of other targets are there.
    let bare = Workspace::new(RECIPE);
    std::fs::remove_dir_all(bare.path("crates")).unwrap();
    std::fs::remove_file(bare.path("recipes/rows.txt")).unwrap();
    let worker = env!("CARGO_BIN_EXE_engine-test-worker").into();
    let mut given = Given { worker, ..Given::default() };
    let out = bare.path("out");
    let refused = bare.engine().make_alone(&id, &given, &out, &mut |_| {}).unwrap_err();
    assert_eq!(refused.to_string(), "r/shout: its input r/count was not handed over");

    let count = TargetId::new("r", "count");
    given.inputs = BTreeMap::from([(count.clone(), built.engine().link(&count))]);
    let ours = bare.engine().make_alone(&id, &given, &out, &mut |_| {}).unwrap();
    assert_eq!(ours.digest(), theirs);
    assert_eq!(std::fs::read_to_string(out.join("text.txt")).unwrap(), "2");
}

#[test]
fn results_that_may_come_out_otherwise_are_pinned_while_they_are_current() {
    let w = Workspace::new(ROUGH);
    let pin = || {
        let engine = w.engine();
        engine.lock_results(&w.graph(&engine, "r")).unwrap()
    };
    let current = || {
        let engine = w.engine();
        let all = engine.locked_results(&w.graph(&engine, "r")).unwrap();
        all.into_iter().map(|(_, _, current)| current).collect::<Vec<_>>()
    };
    assert!(pin().is_empty());

    w.build("r").unwrap();
    let [pinned] = &pin()[..] else { panic!("`rough` alone is pinned") };
    let id = TargetId::new("r", "rough");
    let after = pinned.after.clone().unwrap();
    assert_eq!((&pinned.id, &pinned.before), (&id, &None));
    assert_eq!(after.tree, w.engine().last(&id).unwrap().output);
    assert_eq!(
        after.sha256,
        nar::sha256(&w.path("artifacts/r/rough").canonicalize().unwrap()).unwrap()
    );
    assert_eq!(pin()[0].before, pinned.after);
    assert_eq!(current(), [true]);

    // A row behind an input counts, too.
    w.write("recipes/rows.txt", "one\ntwo\nthree\n");
    assert_eq!(current(), [false]);
    assert_eq!(pin()[0].after, None);
    assert_eq!(current(), [false; 0]);
}
