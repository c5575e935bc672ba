//! `bench engine`: what a build costs around the steps themselves, beside other build tools in the
//! same run. Whole processes, several times, medians.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde_json::Value;
use step::worker::{Input, Mode, Request};
use step::{Failure, Kind, StepDef};

use crate::display::{self, Table};

pub mod cache;
pub mod export;
mod peers;
pub mod train;

use peers::{PEERS, Peer};

/// How often a quick case is run; a slow one three times.
const TIMES: usize = 15;
/// Longer than the clock of any file system is coarse: younger files are not trusted to be at rest.
const AT_REST: Duration = Duration::from_millis(2200);

/// What was done, by whom, in what time.
struct Sample {
    case: String,
    tool: &'static str,
    wall: f64,
    /// Of the process and all that it waited for; seconds.
    cpu: f64,
}

pub fn engine(root: &Path, gib: u64) -> anyhow::Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let built = Command::new(cargo)
        .args(["build", "--release", "--locked", "--package", "xtask"])
        .current_dir(root)
        .status()?;
    if !built.success() {
        bail!(Failure::environment("the command line does not compile in release"));
    }
    let mut bench = Bench::new(root)?;
    bench.steps(6)?;
    bench.steps(1000)?;
    bench.inputs(gib)?;
    bench.restore()?;

    let mut table = Table::new(["case", "tool", "wall", "cpu", "runs"]);
    let mut rows: Vec<(&str, &str)> = Vec::new();
    for sample in &bench.samples {
        let row = (sample.case.as_str(), sample.tool);
        if rows.contains(&row) {
            continue;
        }
        rows.push(row);
        let same = bench.samples.iter().filter(|s| (s.case.as_str(), s.tool) == row);
        let (wall, cpu): (Vec<f64>, Vec<f64>) = same.map(|s| (s.wall, s.cpu)).unzip();
        let runs = wall.len().to_string();
        table.row([row.0.into(), row.1.into(), time(median(wall)), time(median(cpu)), runs]);
    }
    print!("{table}");
    bench.notes.iter().for_each(|note| println!("{note}"));
    Ok(())
}

struct Bench {
    root: PathBuf,
    /// Below the target folder: on the disk that builds use.
    dir: tempfile::TempDir,
    anneal: PathBuf,
    samples: Vec<Sample>,
    notes: Vec<String>,
}

impl Bench {
    fn new(root: &Path) -> anyhow::Result<Self> {
        let dir = tempfile::Builder::new().prefix("bench-").tempdir_in(root.join("target"))?;
        let anneal = root.join("target/release/xtask");
        Ok(Self { root: root.into(), dir, anneal, samples: vec![], notes: vec![] })
    }

    /// An empty workspace with the code of the real one.
    fn workspace(&self, name: &str) -> anyhow::Result<PathBuf> {
        let dir = self.dir.path().join(name);
        fs::create_dir_all(dir.join("recipes/b"))?;
        for shared in ["Cargo.toml", "Cargo.lock", "rust-toolchain.toml", "crates", "xtask"] {
            std::os::unix::fs::symlink(self.root.join(shared), dir.join(shared))?;
        }
        // The generator is a member of the workspace.
        std::os::unix::fs::symlink(self.root.join("recipes/demo"), dir.join("recipes/demo"))?;
        Ok(dir)
    }

    fn anneal(&self, dir: &Path) -> Command {
        let mut command = Command::new(&self.anneal);
        command.args(["--workspace"]).arg(dir).args(["build", "b"]);
        command.env("CARGO_TARGET_DIR", self.root.join("target"));
        command
    }

    /// As many copies of small files as steps: from nothing, then again, then one of them changed.
    fn steps(&mut self, steps: usize) -> anyhow::Result<()> {
        let dir = self.workspace(&format!("steps-{steps}"))?;
        let case = |what: &str| format!("{steps} steps, {what}");
        let mut recipe = String::new();
        for i in 0..steps {
            write_leaf(&dir, i, "first")?;
            _ = write!(
                recipe,
                "[t{i}]\nstep = \"command/run\"\nprogram = \"cp\"\nargs = [\"{{{i}.txt}}\", \"{{out}}/copy\"]\ninputs = [\"./b/{i}.txt\"]\n\n"
            );
        }
        fs::write(dir.join("recipes/b.toml"), recipe)?;
        let there =
            |peer: &&Peer| steps <= peer.most && engine::tools::on_path(peer.name).is_some();
        let peers: Vec<&Peer> = PEERS.iter().filter(there).collect();
        for peer in &peers {
            (peer.set_up)(&peer.dir(&dir)?, steps).with_context(|| peer.name)?;
        }
        std::thread::sleep(AT_REST);

        // What compiles the worker is not what is measured.
        run(&mut self.anneal(&dir))?;
        let store = dir.join("artifacts");
        for round in 0..3 {
            // Put aside: ext4 takes its time over the inodes of what was just deleted. What says
            // that the worker is compiled stays: cargo's time is not the build's.
            let aside = dir.join(format!("aside-{round}"));
            fs::rename(&store, &aside)?;
            fs::create_dir_all(store.join("v1"))?;
            fs::rename(aside.join("v1/workers"), store.join("v1/workers"))?;
            std::thread::sleep(AT_REST);
            self.measure(case("from nothing"), "anneal", &mut self.anneal(&dir))?;
            for peer in peers.iter().filter(|peer| round == 0 || !peer.patient) {
                let peer_dir = peer.dir(&dir)?;
                if round > 0 {
                    fs::rename(peer_dir.join("out"), peer_dir.join(format!("out-{round}")))?;
                    let _ = fs::remove_file(peer_dir.join(".ninja_log"));
                    fs::create_dir_all(peer_dir.join("out"))?;
                }
                self.measure(case("from nothing"), peer.name, &mut peer.command(&dir)?)?;
            }
        }
        std::thread::sleep(AT_REST);
        // Finds what is at rest by now, and remembers it.
        run(&mut self.anneal(&dir))?;
        for round in 0..TIMES {
            self.measure(case("nothing stale"), "anneal", &mut self.anneal(&dir))?;
            for peer in peers.iter().filter(|peer| round == 0 || !peer.patient) {
                self.measure(case("nothing stale"), peer.name, &mut peer.command(&dir)?)?;
            }
        }
        for round in 0..5 {
            let text = format!("change {round}");
            write_leaf(&dir, steps / 2, &text)?;
            for peer in &peers {
                write_leaf(&peer.dir(&dir)?, steps / 2, &text)?;
            }
            std::thread::sleep(AT_REST);
            self.measure(case("one changed"), "anneal", &mut self.anneal(&dir))?;
            for peer in peers.iter().filter(|peer| round == 0 || !peer.patient) {
                self.measure(case("one changed"), peer.name, &mut peer.command(&dir)?)?;
            }
        }
        Ok(())
    }

    /// Large inputs: hashed once, then known.
    fn inputs(&mut self, gib: u64) -> anyhow::Result<()> {
        let dir = self.workspace("inputs")?;
        for i in 0..gib {
            fill(&dir.join(format!("recipes/b/{i}.bin")), 1 << 30, i)?;
        }
        fs::write(
            dir.join("recipes/b.toml"),
            "[t]\nstep = \"command/run\"\nprogram = \"true\"\ninputs = [\"./b\"]\n",
        )?;
        std::thread::sleep(AT_REST);
        let mut plan = Command::new(&self.anneal);
        plan.args(["--workspace"]).arg(&dir).args(["plan", "b"]);
        for _ in 0..3 {
            let _ = fs::remove_file(dir.join("artifacts/v1/stat-cache"));
            self.measure(format!("{gib} GiB of new inputs"), "anneal", &mut plan)?;
        }
        let hashed = self.samples.last().map_or(f64::NAN, |sample| sample.wall);
        self.notes.push(format!("{gib} GiB hashed at {:.1} GB/s", gib as f64 * 1.0737 / hashed));
        run(&mut self.anneal(&dir))?;
        std::thread::sleep(AT_REST);
        run(&mut self.anneal(&dir))?;
        for _ in 0..TIMES {
            self.measure(
                format!("{gib} GiB of inputs, nothing stale"),
                "anneal",
                &mut self.anneal(&dir),
            )?;
        }
        Ok(())
    }

    /// An artifact of 2 GiB that another took the place of, and that is asked for again.
    fn restore(&mut self) -> anyhow::Result<()> {
        let dir = self.workspace("restore")?;
        let recipe = |bytes: u64| {
            let text = format!(
                "[t]\nstep = \"command/run\"\nprogram = \"head\"\nargs = [\"-c\", \"{bytes}\", \"/dev/urandom\"]\nstdout = \"large\"\n"
            );
            fs::write(dir.join("recipes/b.toml"), text)
        };
        for _ in 0..3 {
            for (bytes, case) in [(2 << 30, "2 GiB taken up again"), (1, "")] {
                recipe(bytes)?;
                let restored = dir.join("artifacts/b/t/large").exists();
                match case.is_empty() || !restored {
                    true => run(&mut self.anneal(&dir))?,
                    false => self.measure(case.into(), "anneal", &mut self.anneal(&dir))?,
                }
            }
        }
        Ok(())
    }

    fn measure(
        &mut self,
        case: String,
        tool: &'static str,
        command: &mut Command,
    ) -> anyhow::Result<()> {
        let before = children_cpu();
        let clock = Instant::now();
        run(command)?;
        let (wall, cpu) = (clock.elapsed().as_secs_f64(), children_cpu() - before);
        self.samples.push(Sample { case, tool, wall, cpu });
        Ok(())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // The stores' folders are read-only.
        writable(self.dir.path());
    }
}

fn run(command: &mut Command) -> anyhow::Result<()> {
    let output = command.stdin(Stdio::null()).output().context("cannot start it")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!(Failure::environment(format!("{command:?}: {}\n{said}", output.status)));
    }
    Ok(())
}

/// Seconds of processor time of all children that have ended so far.
fn children_cpu() -> f64 {
    // SAFETY: getrusage fills the whole struct, for which zeros are a value.
    let usage = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        libc::getrusage(libc::RUSAGE_CHILDREN, &mut usage);
        usage
    };
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    seconds(usage.ru_utime) + seconds(usage.ru_stime)
}

/// How many the machine has.
pub fn threads() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The request of one run of ours with resolved parameters, in `run`, whose folders it makes.
fn request(
    run: &Path,
    def: &StepDef,
    params: Value,
    inputs: &[(&str, Kind, PathBuf)],
    threads: usize,
) -> anyhow::Result<PathBuf> {
    let folder = |name: &str| -> anyhow::Result<PathBuf> {
        let dir = run.join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    };
    let input = |(name, kind, path): &(&str, Kind, PathBuf)| {
        let (label, origin) = (name.to_string(), name.to_string());
        (name.to_string(), vec![Input { label, kind: *kind, path: path.clone(), origin }])
    };
    let request = Request {
        format: 1,
        step: def.name.into(),
        mode: Mode::Build,
        params,
        inputs: inputs.iter().map(input).collect(),
        out: folder("out")?,
        report: folder("report")?,
        scratch: folder("scratch")?,
        tools: Default::default(),
        threads,
    };
    let path = run.join("request.json");
    fs::write(&path, serde_json::to_vec_pretty(&request)?)?;
    Ok(path)
}

/// What a process took.
#[derive(Clone, Copy, Default)]
struct Usage {
    /// Seconds.
    wall: f64,
    /// User and system time; seconds.
    cpu: f64,
    /// Bytes that were resident at its peak.
    memory: f64,
}

/// Of one process after another; of memory, what the largest had.
impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.wall += other.wall;
        self.cpu += other.cpu;
        self.memory = self.memory.max(other.memory);
    }
}

/// Gives each side the same machine to begin with: nothing is left to be written, and the host of a
/// virtual machine has handed over the memory that is about to be used. Without it, a process pays for
/// what the host took back before: many times what it does itself.
fn settle() {
    const BYTES: usize = 4 << 30;
    // In a process of its own, since what is started from here is said to have had our peak.
    // SAFETY: the child asks for memory and ends; it shares no lock with us that it would take.
    unsafe {
        libc::sync();
        match libc::fork() {
            0 => {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE;
                let how = libc::PROT_READ | libc::PROT_WRITE;
                libc::mmap(std::ptr::null_mut(), BYTES, how, flags, -1, 0);
                libc::_exit(0);
            }
            child => libc::waitpid(child, std::ptr::null_mut(), 0),
        };
    }
}

/// Waits for a process that was started at `clock`, which nobody else waits for.
fn used(child: &Child, clock: Instant) -> anyhow::Result<Usage> {
    let mut status = 0;
    // SAFETY: the child is ours and nobody else waits for it; zeros are a value of the struct.
    let (waited, usage) = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        (libc::wait4(child.id() as i32, &raw mut status, 0, &raw mut usage), usage)
    };
    if waited < 0 {
        return Err(std::io::Error::last_os_error()).context("cannot wait for it");
    }
    let wall = clock.elapsed().as_secs_f64();
    let status = ExitStatus::from_raw(status);
    if !status.success() {
        bail!(Failure::environment(format!("it ended badly: {status}")));
    }
    let seconds = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    let cpu = seconds(usage.ru_utime) + seconds(usage.ru_stime);
    Ok(Usage { wall, cpu, memory: usage.ru_maxrss as f64 * 1024.0 })
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn time(seconds: f64) -> String {
    if seconds < 1.0 { format!("{:.1} ms", seconds * 1e3) } else { display::seconds(seconds) }
}

fn write_leaf(dir: &Path, i: usize, text: &str) -> std::io::Result<()> {
    fs::write(dir.join(format!("recipes/b/{i}.txt")), format!("{text} {i}\n"))
}

/// Bytes that no file system stores in less.
fn fill(path: &Path, size: usize, seed: u64) -> std::io::Result<()> {
    let mut file = std::io::BufWriter::new(fs::File::create(path)?);
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for _ in 0..size / 8 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        file.write_all(&state.to_le_bytes())?;
    }
    file.flush()
}

fn writable(dir: &Path) {
    let _ = Command::new("chmod").arg("-R").arg("u+w").arg(dir).status();
}
