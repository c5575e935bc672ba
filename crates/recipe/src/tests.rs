//! What a recipe means, and how its mistakes are shown.

use super::*;
use insta::assert_snapshot;
use serde_json::json;

const PATH: &str = "recipes/demo.toml";

fn parse(text: &str) -> Recipe {
    Recipe::parse(Path::new(PATH), text).unwrap_or_else(|e| panic!("{e}"))
}

fn mistake(text: &str) -> String {
    let diagnostic = Recipe::parse(Path::new(PATH), text).expect_err("this recipe is wrong");
    diagnostic.render(false)
}

const GOOD: &str = r#"# Says when, in cron.
[dataset]
step     = "dataset/chat"
examples = "./rows.jsonl"
split    = { train = 0.8, "odd.key" = [1, 2] }

[eval]
step    = "eval/perplexity"
models  = ["base", "merged"]
require.onnx-int4.perplexity_ratio = "< 1.05"
big     = 0x7fff_ffff
yes     = true
"#;

#[test]
fn a_recipe_is_read_in_its_order() {
    let recipe = parse(GOOD);
    assert_eq!(recipe.name, "demo");
    assert_eq!(recipe.about.as_deref(), Some("Says when, in cron."));
    let names: Vec<_> = recipe.targets.iter().map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["dataset", "eval"]);
    let eval = recipe.target("eval").unwrap();
    assert_eq!(eval.step.value, "eval/perplexity");
    assert_eq!(&GOOD[eval.header.clone()], "eval");
    let values: Vec<_> =
        eval.entries.iter().map(|e| (e.key.value.as_str(), e.value.value.clone())).collect();
    assert_eq!(
        values,
        [
            ("models", json!(["base", "merged"])),
            ("require", json!({"onnx-int4": {"perplexity_ratio": "< 1.05"}})),
            ("big", json!(0x7fff_ffff_u32)),
            ("yes", json!(true)),
        ]
    );
}

#[test]
fn every_value_can_be_pointed_at() {
    let recipe = parse(GOOD);
    for (target, path, shown) in [
        ("dataset", "examples", Some(r#""./rows.jsonl""#)),
        ("dataset", "split", Some(r#"{ train = 0.8, "odd.key" = [1, 2] }"#)),
        ("dataset", "split.train", Some("0.8")),
        ("dataset", "split.odd.key[1]", Some("2")),
        ("dataset", "split.odd.key.1", Some("2")),
        ("dataset", "split.test", Some(r#"{ train = 0.8, "odd.key" = [1, 2] }"#)),
        ("dataset", "splits", None),
        ("eval", "models[1]", Some(r#""merged""#)),
        ("eval", "models[7]", Some(r#"["base", "merged"]"#)),
        ("eval", "require.onnx-int4.perplexity_ratio", Some(r#""< 1.05""#)),
        ("eval", "", None),
        ("nowhere", "step", None),
    ] {
        let span = recipe.span_of(target, path);
        assert_eq!(span.map(|s| &GOOD[s]), shown, "{target}: {path}");
    }
    let models = &recipe.target("eval").unwrap().entries[0];
    assert_eq!(&GOOD[models.span_of(&["0"])], r#""base""#);
}

#[test]
fn inputs_are_told_apart_by_their_first_character() {
    let target = |recipe: Option<&str>, target: &str| InputRef::Target {
        recipe: recipe.map(Into::into),
        target: target.into(),
    };
    for (text, expected) in [
        ("base", target(None, "base")),
        ("demo/base", target(Some("demo"), "base")),
        ("./base", InputRef::Path("./base".into())),
        ("../site", InputRef::Path("../site".into())),
        ("/data/rows.jsonl", InputRef::Path("/data/rows.jsonl".into())),
    ] {
        assert_eq!(InputRef::parse(text), expected, "{text}");
    }
}

#[test]
fn broken_toml() {
    assert_snapshot!(mistake("[base]\nstep = \"source/huggingface\nrev = 1\n"));
}

#[test]
fn a_table_twice() {
    assert_snapshot!(mistake("[base]\nstep = \"a/b\"\n\n[base]\nstep = \"a/b\"\n"));
}

#[test]
fn a_key_twice() {
    assert_snapshot!(mistake("[base]\nstep = \"a/b\"\nrank = 1\nrank = 2\n"));
}

#[test]
fn no_step() {
    assert_snapshot!(mistake("[base]\nrev = \"main\"\n"));
}

#[test]
fn a_misspelt_step() {
    assert_snapshot!(mistake("[base]\nstpe = \"source/huggingface\"\n"));
}

#[test]
fn a_step_that_is_no_string() {
    assert_snapshot!(mistake("[base]\nstep = [\"merge/lora\"]\n"));
}

#[test]
fn a_header_of_two_words() {
    assert_snapshot!(mistake("[site.small]\nstep = \"site/chat\"\n"));
}

#[test]
fn odd_names() {
    let all: Vec<_> = ["../evil", ".hidden", "-f", "", "a b", "a\tb"]
        .iter()
        .map(|name| mistake(&format!("[{name:?}]\nstep = \"a/b\"\n")))
        .collect();
    assert_snapshot!(all.join("\n\n"));
}

#[test]
fn names_in_other_alphabets_are_fine() {
    let recipe = parse("[\"größe-2\"]\nstep = \"a/b\"\n[\"模型_q4\"]\nstep = \"a/b\"\n");
    assert_eq!(recipe.targets.len(), 2);
}

#[test]
fn names_that_differ_in_case_only() {
    assert_snapshot!(mistake("[Base]\nstep = \"a/b\"\n[base]\nstep = \"a/b\"\n"));
}

#[test]
fn a_list_of_tables() {
    assert_snapshot!(mistake("[[base]]\nstep = \"a/b\"\n"));
}

#[test]
fn a_key_outside_of_any_table() {
    assert_snapshot!(mistake("seed = 42\n\n[base]\nstep = \"a/b\"\n"));
}

#[test]
fn values_that_json_does_not_have() {
    let all: Vec<_> = ["2026-01-01", "nan", "-inf", "9223372036854775808"]
        .iter()
        .map(|value| mistake(&format!("[base]\nstep = \"a/b\"\nx = [{value}]\n")))
        .collect();
    assert_snapshot!(all.join("\n\n"));
}

#[test]
fn an_empty_recipe() {
    assert_snapshot!(mistake("# Nothing yet.\n"));
}

#[test]
fn a_file_that_is_not_there() {
    let error = Recipe::load(Path::new("/nowhere/demo.toml")).unwrap_err();
    assert_snapshot!(error.relative_to(Path::new("/nowhere")));
}

#[test]
fn a_name_that_no_folder_can_have() {
    let error =
        Recipe::parse(Path::new("recipes/two words.toml"), "[a]\nstep=\"a/b\"").unwrap_err();
    assert_snapshot!(error);
}

#[test]
fn the_full_picture() {
    let text = "# Größe.\r\n[adapter]\r\nstep = \"train/lora\"\r\n\t\"名前\" = 4\r\n";
    let recipe = parse(text);
    let key = &recipe.targets[0].entries[0].key;
    let diagnostic = recipe
        .diagnostic(key.span.clone(), "`train/lora` has no key `名前`")
        .label("unknown key")
        .note("its keys are alpha, rank")
        .help("did you mean `rank`?");
    assert_eq!(diagnostic.place(), "recipes/demo.toml:4:2");
    assert_snapshot!(diagnostic.render(false));
    assert!(diagnostic.render(true).contains("\u{1b}["), "colour is there when it is asked for");
    let failure = step::Failure::from(diagnostic);
    assert_eq!(failure.message, "recipes/demo.toml:4:2: `train/lora` has no key `名前`");
    assert_eq!(failure.hint.as_deref(), Some("did you mean `rank`?"));
}

#[test]
fn no_span_makes_a_diagnostic_panic() {
    let recipe = parse("[größe]\nstep = \"a/b\"\n".replace("größe", "\"größe\"").as_str());
    for start in 0..40 {
        for end in 0..40 {
            recipe.diagnostic(start..end, "somewhere").render(false);
        }
    }
}

mod lock {
    use step::{ActionKey, BlobDigest, TreeDigest};

    use super::*;

    fn example() -> Lock {
        let mut lock = Lock::default();
        let pin = json!({
            "commit": "0123abcd",
            "files": [
                {"path": "model.safetensors", "size": 536_223_056, "sha256": "ab".repeat(32)},
                {"path": "größe \"x\".json", "size": 1, "sha256": null},
            ],
            "gated": false,
        });
        lock.set("base", &json!({"repo": "a/b", "rev": "main", "token": null}), &pin);
        lock.set(
            "a-first",
            &json!({}),
            &json!({"nested": {"deep": {"x": 0.5}}, "list": [[1], []]}),
        );
        let result = PinnedResult {
            action: ActionKey::of(b"action"),
            declared: BlobDigest::of(b"declared"),
            tree: TreeDigest::of(b"tree"),
            sha256: "cd".repeat(32),
        };
        lock.set_result("base", Some(result.clone()));
        lock.set_result("gone", Some(result));
        lock.set_result("gone", None);
        lock
    }

    #[test]
    fn its_bytes_are_stable() {
        assert_snapshot!(example().to_text());
    }

    #[test]
    fn it_is_read_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("demo.lock");
        std::fs::write(path.with_extension("toml"), GOOD).unwrap();
        assert_eq!(Lock::load(&path).unwrap(), Lock::default());
        example().save(&path).unwrap();
        let read = Lock::load(&path).unwrap();
        assert_eq!(read, example());
        read.save(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), example().to_text());
        assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 2, "no temporary file is left");
    }

    #[test]
    fn a_pin_is_for_the_parameters_it_was_made_for() {
        let lock = example();
        assert!(lock.pin("base", &json!({"rev": "main", "repo": "a/b"})).is_some());
        assert!(lock.pin("base", &json!({"rev": "v2", "repo": "a/b"})).is_none());
        assert!(lock.pin("other", &json!({})).is_none());
    }

    #[test]
    fn a_broken_one_is_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("demo.lock");
        let shown: Vec<_> = [
            "version = 1\n<<<<<<< HEAD\n",
            "version = 1\n[target.base]\nasked = {}\npins = {}\n",
            "version = 2\nsomething = \"new\"\n",
            "[target]\n",
        ]
        .iter()
        .map(|text| {
            std::fs::write(&path, text).unwrap();
            Lock::load(&path).unwrap_err().relative_to(dir.path()).to_string()
        })
        .collect();
        assert_snapshot!(shown.join("\n\n"));
    }
}

#[test]
fn a_matrix_is_a_target_for_each_combination() {
    let text = "[a]\nstep = \"x/y\"\nalpha = 1\n\n[a.matrix]\nrank = [8, 16]\nrate = [0.5]\n";
    let recipe = Recipe::parse(Path::new("r.toml"), text).unwrap();
    let names: Vec<&str> = recipe.variants("a").map(|t| t.name.as_str()).collect();
    assert_eq!(names, ["a-rank-8-rate-0_5", "a-rank-16-rate-0_5"]);
    assert!(recipe.target("a").is_none());
    let second = recipe.target(names[1]).unwrap();
    let keys: Vec<&str> = second.entries.iter().map(|e| e.key.value.as_str()).collect();
    assert_eq!(keys, ["alpha", "rank", "rate"]);
    // A mistake in a value is shown where that value stands.
    let span = recipe.span_of(names[1], "rank").unwrap();
    assert_eq!(&text[span], "16");
}

#[test]
fn what_a_matrix_gets_wrong_is_shown() {
    for (matrix, message) in [
        ("matrix = 3", "`matrix` is a table of lists"),
        ("matrix = { rank = 8 }", "`rank` takes a list of values in a matrix"),
        ("matrix = { rank = [] }", "`rank` takes a list of values in a matrix"),
        ("rank = 8\nmatrix = { rank = [8] }", "`rank` stands in the table and in its matrix"),
        ("matrix = { rank = [8, 8] }", "`a-rank-8` and `a-rank-8` are the same"),
    ] {
        let text = format!("[a]\nstep = \"x/y\"\n{matrix}\n");
        let error = Recipe::parse(Path::new("r.toml"), &text).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
}
