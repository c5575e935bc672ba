//! The build tools that `bench engine` measures beside ours, each with its own files.
//!
//! Knows nothing of what is measured.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::run;

/// Another build tool, if it is on `PATH`.
pub struct Peer {
    pub name: &'static str,
    args: &'static [&'static str],
    /// One round is enough of it: it takes seconds or minutes.
    pub patient: bool,
    /// With more steps than this it is not asked: a thousand take some of them ten minutes.
    pub most: usize,
    /// Writes what makes it copy `recipes/b/<i>.txt` to `out/<i>`, for so many.
    pub set_up: fn(&Path, usize) -> anyhow::Result<()>,
}

pub const PEERS: [Peer; 5] = [
    Peer {
        name: "ninja",
        args: &["--quiet"],
        patient: false,
        most: usize::MAX,
        set_up: |dir, steps| {
            let mut text = String::from("rule copy\n  command = cp $in $out\n");
            (0..steps).for_each(|i| _ = writeln!(text, "build out/{i}: copy recipes/b/{i}.txt"));
            Ok(fs::write(dir.join("build.ninja"), text)?)
        },
    },
    Peer {
        name: "make",
        args: &["--silent", "-j2"],
        patient: false,
        most: usize::MAX,
        set_up: |dir, steps| {
            let mut text = String::from("all:");
            (0..steps).for_each(|i| _ = write!(text, " out/{i}"));
            text.push('\n');
            (0..steps).for_each(|i| _ = writeln!(text, "out/{i}: recipes/b/{i}.txt\n\tcp $< $@"));
            Ok(fs::write(dir.join("Makefile"), text)?)
        },
    },
    Peer {
        name: "snakemake",
        args: &["--cores", "2", "--quiet", "all"],
        patient: true,
        most: usize::MAX,
        set_up: |dir, steps| {
            let text = format!(
                "rule all:\n    input: expand(\"out/{{i}}\", i=range({steps}))\n\
                 rule copy:\n    input: \"recipes/b/{{i}}.txt\"\n    output: \"out/{{i}}\"\n    \
                 shell: \"cp {{input}} {{output}}\"\n"
            );
            Ok(fs::write(dir.join("Snakefile"), text)?)
        },
    },
    Peer {
        name: "dvc",
        args: &["repro", "--quiet"],
        patient: true,
        most: 100,
        set_up: |dir, steps| {
            let mut text = String::from("stages:\n  copy:\n    foreach:\n");
            (0..steps).for_each(|i| _ = writeln!(text, "    - {i}"));
            text += "    do:\n      cmd: cp recipes/b/${item}.txt out/${item}\n      \
                     deps: [\"recipes/b/${item}.txt\"]\n      outs: [\"out/${item}\"]\n";
            fs::write(dir.join("dvc.yaml"), text)?;
            run(Command::new("dvc").args(["init", "--quiet", "--no-scm"]).current_dir(dir))
        },
    },
    Peer {
        name: "turbo",
        args: &["run", "build", "--no-daemon"],
        patient: true,
        most: 100,
        set_up: |dir, steps| {
            let root = "{\"name\": \"b\", \"packageManager\": \"npm@10.0.0\", \"workspaces\": [\"packages/*\"]}\n";
            fs::write(dir.join("package.json"), root)?;
            let lock = "{\"name\": \"b\", \"lockfileVersion\": 3, \"packages\": {\"\": {\"name\": \"b\"}}}\n";
            fs::write(dir.join("package-lock.json"), lock)?;
            let tasks =
                "{\"tasks\": {\"build\": {\"outputs\": [\"out\"], \"inputs\": [\"in.txt\"]}}}\n";
            fs::write(dir.join("turbo.json"), tasks)?;
            for i in 0..steps {
                let package = dir.join(format!("packages/{i}"));
                fs::create_dir_all(&package)?;
                // Its inputs are files of the package.
                fs::hard_link(dir.join(format!("recipes/b/{i}.txt")), package.join("in.txt"))?;
                let text = format!(
                    "{{\"name\": \"p{i}\", \"version\": \"1.0.0\", \"scripts\": {{\"build\": \"cp in.txt out\"}}}}\n"
                );
                fs::write(package.join("package.json"), text)?;
            }
            run(Command::new("git").args(["init", "--quiet"]).current_dir(dir))
        },
    },
];

impl Peer {
    /// A folder of its own in the bench's, with a copy of the leaves.
    pub fn dir(&self, bench: &Path) -> anyhow::Result<PathBuf> {
        let dir = bench.join(format!("peer-{}", self.name));
        if !dir.exists() {
            fs::create_dir_all(dir.join("recipes/b"))?;
            fs::create_dir_all(dir.join("out"))?;
            for leaf in fs::read_dir(bench.join("recipes/b"))? {
                let leaf = leaf?;
                fs::copy(leaf.path(), dir.join("recipes/b").join(leaf.file_name()))?;
            }
        }
        Ok(dir)
    }

    pub fn command(&self, bench: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(self.name);
        command.args(self.args).current_dir(self.dir(bench)?);
        command.envs([("TURBO_TELEMETRY_DISABLED", "1"), ("DO_NOT_TRACK", "1")]);
        Ok(command)
    }
}
