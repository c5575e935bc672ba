//! A small workspace with quick steps, for the engine's tests.

#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::path::PathBuf;

use engine::{Engine, Event, Graph, Options, Outcome, Registry, Status, TargetId, Workers};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use step::{BlobDigest, Family, InputDef, Kind, Known, Needs, Rebuild, Step, StepDef};

macro_rules! demo_step {
    ($type:ident, $name:literal, $threads:expr) => {
        demo_step!($type, $name, $threads, Rebuild::BitForBit);
    };
    ($type:ident, $name:literal, $threads:expr, $rebuild:expr) => {
        #[derive(Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields)]
        struct $type {
            #[serde(default)]
            level: u32,
        }

        impl Step for $type {
            const NAME: &'static str = $name;
            const ABOUT: &'static str = "A step of the tests.";
            const INPUTS: &'static [InputDef] =
                &[InputDef::one("text", &[Kind::Files]), InputDef::many("more", &[Kind::Files])];
            const OUTPUT: Kind = Kind::Files;
            const REBUILD: Rebuild = $rebuild;

            fn needs(&self, _: &Known) -> Needs {
                let tflop = (self.level > 0).then_some(f64::from(self.level));
                Needs { threads: $threads, tflop, ..Needs::default() }
            }
        }
    };
}

demo_step!(Upper, "demo/upper", None);
demo_step!(Rough, "demo/rough", None, Rebuild::WithinTolerance(0.1));
demo_step!(Lines, "demo/lines", None);
demo_step!(Fail, "demo/fail", None);
demo_step!(Slow, "demo/slow", Some(1));
demo_step!(Careful, "demo/careful", Some(1));
demo_step!(Full, "demo/full", None);
demo_step!(Babble, "demo/babble", None);
demo_step!(Nosy, "demo/nosy", None);

/// Says what it was asked, and of which bytes.
#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Outside {
    to: String,
}

impl Step for Outside {
    const NAME: &'static str = "demo/send";
    const ABOUT: &'static str = "A step that acts outside.";
    const INPUTS: &'static [InputDef] = &[InputDef::one("text", &[Kind::Files])];
    const OUTPUT: Kind = Kind::Files;
    const ACTS: bool = true;
}

static FAMILY: Family = Family {
    name: "demo",
    steps: &[
        StepDef::of::<Upper>(),
        StepDef::of::<Rough>(),
        StepDef::of::<Lines>(),
        StepDef::of::<Fail>(),
        StepDef::of::<Slow>(),
        StepDef::of::<Careful>(),
        StepDef::of::<Full>(),
        StepDef::of::<Babble>(),
        StepDef::of::<Nosy>(),
        StepDef::of::<Outside>(),
    ],
    build_tools: &[],
};

pub const REGISTRY: Registry = Registry { families: &[&FAMILY] };

pub const RECIPE: &str = r#"
[count]
step = "demo/lines"
text = "./rows.txt"

[shout]
step = "demo/upper"
text = "count"
"#;

/// A workspace in a temporary folder.
pub struct Workspace {
    pub dir: tempfile::TempDir,
}

impl Workspace {
    pub fn new(recipe: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = Self { dir };
        this.write("Cargo.toml", "[workspace]\n");
        this.write(
            "Cargo.lock",
            "version = 4\n\n[[package]]\nname = \"demo\"\nversion = \"0.1.0\"\n",
        );
        this.write("crates/demo/Cargo.toml", "[package]\nname = \"demo\"\n");
        this.write("crates/demo/src/lib.rs", "fn f() -> u8 { 1 }\n");
        this.write("recipes/r.toml", recipe);
        this.write("recipes/rows.txt", "one\ntwo\n");
        this
    }

    pub fn path(&self, path: &str) -> PathBuf {
        self.dir.path().canonicalize().unwrap().join(path)
    }

    pub fn write(&self, path: &str, text: &str) {
        let path = self.path(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    pub fn engine(&self) -> Engine {
        let worker = PathBuf::from(env!("CARGO_BIN_EXE_engine-test-worker"));
        Engine::open(&self.path(""), REGISTRY).unwrap().with_workers(Workers::Fixed(worker))
    }

    /// The first file that was made as this target of `r`, and where the store keeps it.
    pub fn blob_of(&self, target: &str) -> (BlobDigest, PathBuf) {
        let engine = self.engine();
        let last = engine.last(&TargetId::new("r", target)).unwrap();
        let blob = engine.store().tree(last.output).unwrap().entries()[0].digest;
        (blob, engine.store().blob_path(blob))
    }

    /// All of `target` and what it needs.
    pub fn graph(&self, engine: &Engine, target: &str) -> Graph {
        let mut resolver = engine.resolver();
        let wanted = resolver.expand(&[target.to_string()]).unwrap();
        resolver.graph(&wanted).unwrap()
    }

    /// Builds `target` and says which targets ran.
    pub fn build(&self, target: &str) -> Result<Vec<String>, String> {
        self.build_with(target, &mut |_| {})
    }

    pub fn build_with(
        &self,
        target: &str,
        on: &mut (dyn FnMut(&Event) + Send),
    ) -> Result<Vec<String>, String> {
        let engine = self.engine();
        let mut resolver = engine.resolver();
        let show = |error: engine::Error| match error {
            engine::Error::Failure(step::Failure { message, hint: Some(hint), .. }) => {
                format!("{message}\nhint: {hint}")
            }
            other => other.to_string(),
        };
        let wanted = resolver.expand(&[target.to_string()]).map_err(show)?;
        let graph = resolver.graph(&wanted).map_err(show)?;
        let built = engine.build(&graph, Options::default(), &mut |event| on(&event));
        let built = built.and_then(Outcome::into_result).map_err(show)?;
        Ok(built.into_iter().filter(|b| b.ran).map(|b| b.id.target).collect())
    }

    pub fn status(&self, target: &str) -> BTreeMap<String, Status> {
        let engine = self.engine();
        let mut resolver = engine.resolver();
        let wanted = resolver.expand(&[target.to_string()]).unwrap();
        let plan = engine.plan(&resolver.graph(&wanted).unwrap()).unwrap();
        plan.targets.into_iter().map(|t| (t.id.target, t.status)).collect()
    }

    pub fn output(&self, target: &str) -> String {
        let path = self.path("artifacts/r").join(target).join("text.txt");
        std::fs::read_to_string(path).unwrap()
    }
}
