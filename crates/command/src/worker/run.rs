//! `command/run`: starts the program, waits, and leaves nothing of it running.
//!
//! What it prints never reaches the engine's protocol: it goes to a file, and from there to the log.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Seek};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use command::run::Run;
use command::template::{self, Part};
use rustix::process::{Pid, Signal, WaitOptions};
use step::Failure;
use step::worker::{Input, Job};

pub fn run(job: &Job) -> Result<()> {
    let params: Run = job.params()?;
    let places = places(job)?;
    let program = executable(fill(&params.program, "program", &places)?)?;
    let mut command = Command::new(&program);
    for (i, word) in params.args.iter().enumerate() {
        command.arg(fill(word, &format!("args[{i}]"), &places)?);
    }
    for (name, word) in &params.env {
        command.env(name, fill(word, &format!("env.{name}"), &places)?);
    }
    let mut log = log().context("cannot make a place for what the program prints")?;
    let stdout = match &params.stdout {
        Some(name) => create(&job.out().join(name))?,
        None => log.try_clone()?,
    };
    let stderr = log.try_clone()?;
    command.current_dir(job.out()).stdin(Stdio::null()).stdout(stdout).stderr(stderr);

    adopt_orphans();
    let status = start(&mut command, &program)?;
    // What still runs could go on writing to files that are the result by then.
    let left = end_orphans();
    let mut said = Vec::new();
    log.rewind().and_then(|()| log.read_to_end(&mut said)).context("cannot read the log")?;
    std::io::Write::write_all(&mut std::io::stderr(), &said)?;
    if left > 0 {
        job.note(format!("ended {left} processes that `{}` had left behind", params.program));
    }
    let how = match (status.code(), status.signal()) {
        (Some(0), _) => return declared(job, &params),
        (Some(code), _) => format!("ended with exit code {code}"),
        (_, Some(signal)) => format!("died of signal {signal}"),
        _ => "ended badly".into(),
    };
    Err(Failure::input(format!("`{}` {how}{}", params.program, tail(&said))).into())
}

/// The program, or where it is an input, a copy that may be run: files in the store are not.
fn executable(program: OsString) -> Result<OsString> {
    let path = Path::new(&program);
    let Some(name) = path.file_name().filter(|_| path.is_absolute()) else { return Ok(program) };
    let copy = std::env::temp_dir().join(name);
    fs::copy(path, &copy)
        .and_then(|_| fs::set_permissions(&copy, fs::Permissions::from_mode(0o755)))
        .with_context(|| format!("cannot copy {} to {}", path.display(), copy.display()))?;
    Ok(copy.into())
}

/// Where the program's output goes until it has ended: into memory, where the system can.
fn log() -> std::io::Result<File> {
    #[cfg(target_os = "linux")]
    return Ok(rustix::fs::memfd_create("program.log", rustix::fs::MemfdFlags::CLOEXEC)?.into());
    #[cfg(not(target_os = "linux"))]
    File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(std::env::temp_dir().join("program.log"))
}

/// Place → path.
fn places(job: &Job) -> Result<BTreeMap<String, PathBuf>> {
    let mut places = BTreeMap::from([("out".to_string(), job.out().to_path_buf())]);
    for input in job.inputs("inputs") {
        if places.insert(input.label.clone(), path_of(input)?).is_some() {
            return Err(Failure::input(format!("two inputs are called `{}`", input.label))
                .hint("`out` is the output folder; rename the file or the target")
                .into());
        }
    }
    Ok(places)
}

/// The file, where the input is one file of the user's; else the folder.
fn path_of(input: &Input) -> Result<PathBuf> {
    let file = input.path.join(&input.label);
    let mut entries = fs::read_dir(&input.path)
        .with_context(|| format!("cannot read {}", input.path.display()))?;
    let alone = entries.next().is_some() && entries.next().is_none();
    Ok(if alone && file.is_file() { file } else { input.path.clone() })
}

fn fill(word: &str, at: &str, places: &BTreeMap<String, PathBuf>) -> Result<OsString> {
    let mut out = OsString::new();
    for part in template::parse(word).map_err(Failure::bug)? {
        match part {
            Part::Text(text) => out.push(text),
            Part::Place(name) => match places.get(&name) {
                Some(path) => out.push(path),
                None => {
                    let known: Vec<&str> = places.keys().map(String::as_str).collect();
                    return Err(Failure::input(format!("{at}: no input is called `{name}`"))
                        .hint(format!("there are {}; add it to `inputs`", known.join(", ")))
                        .into());
                }
            },
        }
    }
    Ok(out)
}

fn create(path: &Path) -> Result<File> {
    let parent = path.parent().expect("a file in a folder");
    fs::create_dir_all(parent)
        .and_then(|()| File::create(path))
        .with_context(|| format!("cannot write {}", path.display()))
}

fn start(command: &mut Command, program: &OsString) -> Result<std::process::ExitStatus> {
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(|| {
            #[cfg(target_os = "linux")]
            rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
            Ok(())
        });
    }
    let shown = program.to_string_lossy();
    let mut child = command.spawn().map_err(|e| match e.kind() {
        ErrorKind::NotFound => Failure::environment(format!("there is no program `{shown}`"))
            .hint("install it, or set PATH so that it is found"),
        ErrorKind::PermissionDenied => Failure::input(format!("`{shown}` is not executable"))
            .hint("name its interpreter as the program, and the file among `args`"),
        _ => Failure::environment(format!("cannot start `{shown}`: {e}")),
    })?;
    child.wait().with_context(|| format!("cannot wait for `{shown}`"))
}

/// A child whose parent has died becomes ours, whatever session or group it went to.
fn adopt_orphans() {
    #[cfg(target_os = "linux")]
    let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
}

/// Kills what is left of the program, and says how many processes that were.
fn end_orphans() -> usize {
    let mut ended = BTreeSet::new();
    // Killing a process can hand us its children: go on until there are none.
    while let children @ [_, ..] = children().as_slice() {
        for child in children {
            let _ = rustix::process::kill_process(*child, Signal::KILL);
            let _ = rustix::process::waitpid(Some(*child), WaitOptions::empty());
            ended.insert(child.as_raw_nonzero());
        }
    }
    ended.len()
}

fn children() -> Vec<Pid> {
    let tasks = fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    let lists = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    let ids = lists.flat_map(|list| {
        list.split_whitespace().filter_map(|id| id.parse().ok()).collect::<Vec<i32>>()
    });
    ids.filter_map(Pid::from_raw).collect()
}

/// Holds the output to what the recipe declares of it.
fn declared(job: &Job, params: &Run) -> Result<()> {
    let Some(outputs) = &params.outputs else { return Ok(()) };
    let mut made = BTreeSet::new();
    files_below(job.out(), "", &mut made)?;
    let mut declared: BTreeSet<String> = outputs.iter().cloned().collect();
    declared.extend(params.stdout.clone());
    let list = |names: Vec<&String>| {
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    };
    let missing: Vec<_> = declared.difference(&made).collect();
    if !missing.is_empty() {
        return Err(Failure::input(format!("`{}` did not make {}", params.program, list(missing)))
            .hint("`{out}` in `args` is the folder to write to; the program is started in it")
            .into());
    }
    let more: Vec<_> = made.difference(&declared).collect();
    if !more.is_empty() {
        return Err(Failure::input(format!("`{}` also made {}", params.program, list(more)))
            .hint("add it to `outputs`, or leave `outputs` out to keep whatever is made")
            .into());
    }
    Ok(())
}

fn files_below(dir: &Path, prefix: &str, out: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))? {
        let entry = entry?;
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            files_below(&entry.path(), &format!("{name}/"), out)?;
        } else {
            out.insert(name);
        }
    }
    Ok(())
}

/// The last lines of what the program said, for an error.
fn tail(said: &[u8]) -> String {
    const LINES: usize = 12;
    let text = String::from_utf8_lossy(said);
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(LINES)..];
    if last.is_empty() { String::new() } else { format!("; it said:\n{}", last.join("\n")) }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};
    use step::worker::{Mode, Request};
    use step::{Kind, StepDef};

    use super::*;

    /// A step ends every child of its process, and here that would be another test's program.
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// Runs a step in a folder of its own; the files it made, or what went wrong.
    fn made(params: Value, inputs: &[(&str, &str)]) -> Result<BTreeMap<String, String>, Failure> {
        let Value::Object(params) = params else { unreachable!("tests pass objects") };
        let dir = tempfile::tempdir().unwrap();
        let folder = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(&path).unwrap();
            path
        };
        let input = |(label, text): &(&str, &str)| {
            let path = folder(&format!("in-{label}"));
            fs::write(path.join(label), text).unwrap();
            let label = label.to_string();
            Input { origin: label.clone(), label, kind: Kind::Files, path }
        };
        let request = Request {
            format: 1,
            step: "command/run".into(),
            mode: Mode::Build,
            params: (StepDef::of::<Run>().resolve)(params).unwrap(),
            inputs: BTreeMap::from([("inputs".into(), inputs.iter().map(input).collect())]),
            out: folder("out"),
            report: folder("report"),
            scratch: folder("scratch"),
            tools: BTreeMap::new(),
            threads: 1,
        };
        let out = request.out.clone();
        let _alone = ALONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        run(&Job::new(request, std::io::sink())).map_err(|e| Failure::from_anyhow(&e))?;
        let mut names = BTreeSet::new();
        files_below(&out, "", &mut names).unwrap();
        Ok(names
            .into_iter()
            .map(|n| (n.clone(), fs::read_to_string(out.join(n)).unwrap()))
            .collect())
    }

    fn shell(script: &str) -> Value {
        json!({"program": "sh", "args": ["-c", script]})
    }

    #[test]
    fn a_program_reads_its_inputs_and_writes_its_outputs() {
        let params = json!({
            "program": "sh",
            "args": ["-c", "cat \"$1\" && echo two > \"$2/b\" && echo $GREETING >> b", "sh", "{a b.txt}", "{out}"],
            "env": {"GREETING": "{{hello}}"},
            "stdout": "deep/a", "outputs": ["b"],
        });
        let made = made(params, &[("a b.txt", "one\n")]).unwrap();
        let expected = [("b", "two\n{hello}\n"), ("deep/a", "one\n")];
        assert_eq!(made, expected.map(|(a, b)| (a.to_string(), b.to_string())).into());
    }

    #[test]
    fn a_program_may_be_an_input() {
        let script = "#!/bin/sh\necho \"$1\" > made\n";
        let params = json!({"program": "{command-test-tool}", "args": ["it"]});
        let made = made(params, &[("command-test-tool", script)]).unwrap();
        assert_eq!(made, [("made".to_string(), "it\n".to_string())].into());
    }

    #[test]
    fn what_goes_wrong_is_told_with_what_the_program_said() {
        let failed = made(shell("echo no such row >&2; exit 3"), &[]).unwrap_err();
        assert_eq!(failed.message, "`sh` ended with exit code 3; it said:\nno such row");
        let failed = made(shell("kill -9 $$"), &[]).unwrap_err();
        assert_eq!(failed.message, "`sh` died of signal 9");
        let failed = made(json!({"program": "no-such-program"}), &[]).unwrap_err();
        assert_eq!(failed.message, "there is no program `no-such-program`");
        let failed = made(json!({"program": "sh", "args": ["{rows}"]}), &[]).unwrap_err();
        assert_eq!(failed.message, "args[0]: no input is called `rows`");
        let with = |outputs: Value| json!({"program": "sh", "args": ["-c", "echo > a"], "outputs": outputs});
        assert_eq!(
            made(with(json!(["a", "b"])), &[]).unwrap_err().message,
            "`sh` did not make `b`"
        );
        assert_eq!(made(with(json!([])), &[]).unwrap_err().message, "`sh` also made `a`");
    }

    #[test]
    fn nothing_of_it_goes_on_running() {
        let script = "setsid sh -c 'while :; do echo x >> late; sleep 0.01; done' & sleep 0.1";
        let before = std::time::Instant::now();
        let made = made(shell(script), &[]).unwrap();
        assert!(before.elapsed().as_secs() < 10);
        assert!(made.contains_key("late"), "the child never ran");
        let running = fs::read_dir("/proc").unwrap().flatten().any(|process| {
            let line = fs::read_to_string(process.path().join("cmdline")).unwrap_or_default();
            line.contains("echo x >> late") && !line.contains("setsid")
        });
        assert!(!running);
    }
}
